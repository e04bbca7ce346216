"""`serve`: a converted model behind an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

import click

from ds4convert.cli.options import serve_options, unused_without_head
from ds4convert.cli.session import Session, common
from ds4convert.cli.shell.group import cli
from ds4convert.cli.shell.kinds import FOLDER_NAME


@cli.command()
@click.argument("mlx_dir", type=FOLDER_NAME)
@serve_options
@common()
def serve(session: Session, mlx_dir: str, drain_seconds: int, **choices: Any) -> None:
    """Serve a converted model to OpenAI clients, and to a page that shows which tokens the head drafted.

    /v1/chat/completions, /v1/completions, /v1/models; and /health, /metrics, and the page at /. Where the folder has a
    head, every request decodes with it, greedy or sampled; --no-mtp turns it off. Every request is a line on standard
    error, unless -q is given. SIGTERM finishes what runs. --json tells url, model and mtp_active once it listens.

    \b
    Example: ds4convert serve DeepSeek-V4-Flash-mlx
             ds4convert serve DeepSeek-V4-Flash-mlx --draft-depth 2 --port 9000 --api-key SECRET
             ds4convert serve DeepSeek-V4-Flash-mlx --allowed-origin http://localhost:3000
    """
    from ds4convert.api.opening import local
    from ds4convert.serving import server

    session.warn_of_unused(unused_without_head(choices["mtp"]))
    level = {0: logging.WARNING, 1: logging.INFO}.get(session.verbose, logging.DEBUG)
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s: %(message)s")
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("ds4convert").setLevel(level)
    running = server.open_server(local(mlx_dir), server.Options(**choices), session.note, session.warn)
    is_active, has_head = running.site.metrics.mtp_active, running.site.has_head
    mode = "with the head" if is_active else "without its head (--no-mtp)" if has_head else "without a head"
    facts = {"url": server.url(running), "model": running.site.name, "mtp_active": running.site.metrics.mtp_active}
    with contextlib.closing(running):  # also where nobody reads what is told: the generation thread has to end
        if session.as_json:
            session.emit(facts, "")
            sys.stdout.flush()
        session.note(f"Serving {running.site.name} {mode} at {server.url(running)} (Ctrl-C ends)")
        server.serve(running, drain_seconds, session.note)
