"""What an issue report needs to know of the machine and the installation: no names, no secrets."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ds4convert.api.reporting import document
from ds4convert.checkpoint.types import JSON
from ds4convert.words import macs, project

NEEDED = ("click", "huggingface_hub", "jinja2", "mlx", "mlx-lm", "numpy", "safetensors", "tqdm", "xxhash")
OPTIONAL = ("mlx-vlm", "mtplx", "tokenizers", "transformers")
MEASURING = ("ds4convert", "mlx", "mlx-lm", "numpy")
"""Packages on which figures of a run depend."""
SECRET = ("TOKEN", "KEY", "PASSWORD", "SECRET")
"""What the name of a variable has in it whose value is not shown."""


def environment() -> JSON:
    """Return versions, platform, memory, what Metal allows, settings of the Hub and of this program, as a document."""
    return document(
        {
            "version": project.version(),
            "address": project.address(),
            "python": platform.python_version(),
            "platform": _platform(),
            "cores": os.cpu_count(),
            "memory_bytes": _memory(),
            "metal": _metal(),
            "packages": {name: _version(name) for name in (*NEEDED, *OPTIONAL)},
            "hub": _hub(),
            "variables": _variables(),
        }
    )


def described() -> tuple[tuple[str, str], ...]:
    """Return machine and versions as rows of a name and a text, for a page about what was measured on it."""
    where, memory, metal = _platform(), _memory(), _metal()
    cores = f"{os.cpu_count()} cores" if os.cpu_count() else ""
    parts = [metal["device"] or processor() or where["machine"], cores]
    parts += [f"{memory / macs.GIB:.0f} GiB of memory"] if memory else []
    packages = {name: _version(name) for name in MEASURING}
    told = {
        "Machine": ", ".join(p for p in parts if p),
        "System": f"{where['system']} ({where['machine']})",
        "Python": platform.python_version(),
        "Versions": ", ".join(f"{name} {found}" for name, found in packages.items() if found),
    }
    return tuple(told.items())


def processor() -> str | None:
    """Return the name of the processor as the system tells it; None where it does not."""
    if sys.platform == "darwin":
        words = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() or None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _platform() -> JSON:
    mac, libc = platform.mac_ver()[0], " ".join(platform.libc_ver()).strip()
    system = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    return {"system": system, "machine": platform.machine(), "libc": libc or None}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _metal() -> JSON:
    """Return whether MLX loads and has a GPU by Metal, and then what of the memory it may use."""
    told: JSON = {"available": False, "device": None, "working_set_bytes": None, "wired_limit_mb": None, "error": None}
    try:
        from ds4convert.inference.load import metal_limits

        found = metal_limits()
    except Exception as e:  # a broken installation is what this command is asked about
        return told | {"error": f"{type(e).__name__}: {e}"}
    return told if found is None else told | found | {"available": True, "wired_limit_mb": _wired_limit()}


def _wired_limit() -> int | None:
    """Return the `iogpu.wired_limit_mb` of a Mac, 0 where it is as delivered; None elsewhere."""
    if sys.platform != "darwin":
        return None
    words = ["/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    return int(done.stdout) if done.stdout.strip().isdigit() else None


def _hub() -> JSON:
    try:
        from ds4convert.hub.settings import settings

        return {**settings(), "error": None}
    except Exception as e:  # as above
        return {"endpoint": None, "offline": None, "cache": None, "token": None, "error": f"{type(e).__name__}: {e}"}


def _variables() -> dict[str, str]:
    """Return the variables that set defaults of this program, those that may be secret by name alone."""
    from ds4convert.hub.settings import at_home, without_secrets

    found = {}
    for name in sorted(n for n in os.environ if n.startswith("DS4CONVERT_")):
        value = os.environ[name]
        if any(word in name for word in SECRET):
            value = "(set)"
        found[name] = without_secrets(value) if "://" in value else at_home(value)
    return found
