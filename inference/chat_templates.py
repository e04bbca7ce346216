"""Chat templates of strangers, tried in a process with limits before they are used.

Jinja's sandbox (which Transformers renders them in) keeps a template from files and code, not from time and memory: its
own documentation says so ("Security Considerations": restrict CPU and memory by other means). A template that writes
two short chats within `SECONDS` and `BYTES` passes; one that fails in any other way is told of where it is used.
"""

from __future__ import annotations

import subprocess
from importlib import resources

from ds4convert import isolation
from ds4convert.errors import InputError

SECONDS = 10
"""Of computing, for two chats of a few words; real templates take some milliseconds."""

BYTES = 1 << 30
"""Of address space. macOS does not hold a process to it; `SECONDS` does there."""

MOST_BYTES = 1 << 20
"""Of a template's text; that of DeepSeek-V4 has 21 kB."""

_TRY = f"""
import re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
try:
    resource.setrlimit(resource.RLIMIT_AS, ({BYTES}, {BYTES}))
except (OSError, ValueError):
    pass
from jinja2.sandbox import ImmutableSandboxedEnvironment
def refuse(text):
    raise ValueError(text)
text = re.sub(r"{{%-?\\s*(end)?generation\\s*-?%}}", "", sys.stdin.buffer.read().decode("utf-8", "replace"))
for count in (1, 3):
    chat = [{{"role": ("user", "assistant")[n % 2], "content": "two and three?"}} for n in range(count)]
    try:
        more = ["jinja2.ext.loopcontrols"]
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=more)
        env.globals.update(raise_exception=refuse, strftime_now=lambda form: "1 Jan 2026")
        env.from_string(text).render(messages=chat, tools=None, add_generation_prompt=True, bos_token="", eos_token="")
    except MemoryError:
        sys.exit(9)
    except Exception:
        pass
"""


def check(text: str, where: str) -> None:
    """Raise `InputError` for a chat template that does not end, or takes more memory than any real one."""
    if text in _ours():
        return
    why = f"is longer than {MOST_BYTES:,} bytes" if len(text.encode("utf-8", "replace")) > MOST_BYTES else _tried(text)
    if why:
        raise InputError(
            f"{where}: its chat template {why}; a template is a stranger's program, so it is not used",
            hint="Take the one of a folder that you trust (chat_template.jinja)",
        )


def _ours() -> set[str]:
    """Return the texts of the templates that come with this package."""
    folder = resources.files("ds4convert.manifests") / "templates"
    return {p.read_text("utf-8") for p in folder.iterdir() if p.name.endswith(".jinja")}


def _tried(text: str) -> str:
    """Return what a template did that no real one does; "" for nothing."""
    command, raw = isolation.interpreter(_TRY), text.encode("utf-8", "replace")
    try:
        done = subprocess.run(
            command, input=raw, env=isolation.environment(), capture_output=True, timeout=6 * SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"does not end within {6 * SECONDS} seconds"
    if done.returncode == 9:
        return f"takes more than {BYTES >> 30} GiB of memory for a few words"
    return f"does not end within {SECONDS} seconds of computing" if done.returncode < 0 else ""
