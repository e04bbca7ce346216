"""`serve`: a converted model behind an OpenAI-compatible server."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click

from ds4convert.choices import serve_options
from ds4convert.cli.session import Session, cli, common, local


@cli.command()
@click.argument("mlx_dir")
@serve_options
@common()
def serve(session: Session, mlx_dir: str, drain_seconds: int, **choices: Any) -> None:
    """Serve a converted model to OpenAI clients, and to a page that shows which tokens the head drafted.

    Built on mlx-lm's server: /v1/chat/completions, /v1/completions, /v1/models; and /health, /metrics, and the page
    at /. With --mtp every request decodes with the head, greedy or sampled; without a head, --mtp is a warning.
    SIGTERM finishes what runs. --json tells url, model and mtp_active once it listens.

    \b
    Example: ds4convert serve DeepSeek-V4-Flash-mlx --mtp
             ds4convert serve DeepSeek-V4-Flash-mlx --mtp --draft-depth 2 --port 9000 --api-key SECRET
    """
    from ds4convert.serving import server

    logging.basicConfig(level=logging.INFO if session.verbose else logging.WARNING, stream=sys.stderr)
    log = session.note if session.verbose else lambda text: None
    running = server.open_server(local(mlx_dir), server.Options(**choices), log, session.warn)
    mode = "with the head" if running.site.metrics.mtp_active else "without a head"
    facts = {"url": server.url(running), "model": running.site.name, "mtp_active": running.site.metrics.mtp_active}
    if session.as_json:
        session.emit(facts, "")
        sys.stdout.flush()
    session.note(f"Serving {running.site.name} {mode} at {server.url(running)} (Ctrl-C ends)")
    server.serve(running, drain_seconds, session.note)
