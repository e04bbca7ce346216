"""What lies in a file's place, told from its first bytes: a pointer, a web page, text, another format, nothing.

Each answer says what it is and how to get the file itself. Pure; knows nothing of JSON or safetensors.
"""

from __future__ import annotations

from collections.abc import Iterable

from ds4convert.words.terminal import show

LFS_BEGINS = b"version https://git-lfs.github.com/spec/"
"""First bytes of every pointer. Source: git-lfs, docs/spec.md ("The required keys ... version")."""

ANNEX_BEGINS = b"/annex/objects/"
"""First bytes of a file whose content git-annex has not fetched. Source: git-annex, internals/pointer_file."""

FETCH = "fetch the file itself: `git lfs pull` in a clone, or `ds4convert pull REPO DEST`"
_SAFE = "take the release in safetensors"
_PICKLE = (
    f"opening it would run code of whoever made it, so it is not read; {_SAFE}, or save it as safetensors with the "
    "program that made it"
)
FORMATS = (
    (b"GGUF", f"is a GGUF file of llama.cpp, whose weights are rounded already; {_SAFE}"),
    (b"PK\x03\x04", f"is a zip archive, such as a PyTorch checkpoint (.bin, .pt): {_PICKLE}"),
    (b"\x80\x02", f"is a Python pickle, such as an old PyTorch checkpoint: {_PICKLE}"),
    (b"\x80\x03", f"is a Python pickle: {_PICKLE}"),
    (b"\x80\x04\x95", f"is a Python pickle: {_PICKLE}"),
    (b"\x1f\x8b\x08", "is compressed with gzip; unpack it: rename it to NAME.gz and run `gunzip NAME.gz`"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it: `zstd -d`"),
    (b"\xfd7zXZ\x00", "is compressed with xz; unpack it: `xz -d`"),
    (b"\x89HDF\r\n\x1a\n", f"is an HDF5 file; {_SAFE}"),
    (b"\x93NUMPY", f"is an array of NumPy; {_SAFE}"),
)
"""(first bytes, what such a file is, and what to do). Sources: the GGUF specification (magic), PKWARE's
APPNOTE (4.3.7), RFC 1952, RFC 8878, the xz file format, the HDF5 file format (signature), numpy.lib.format,
Python's pickletools."""

OTHER_ENDINGS = {
    ".gguf": "GGUF files of llama.cpp, whose weights are rounded already",
    ".bin": "PyTorch's .bin files, which are not read because opening one can run code",
    ".pt": "PyTorch's .pt files, which are not read because opening one can run code",
    ".pth": "PyTorch's .pth files, which are not read because opening one can run code",
    ".npz": "NumPy's .npz files",
}
SHOWN_TEXT = 40
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
_WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
BOM = b"\xef\xbb\xbf"


def told(begin: bytes) -> str | None:
    """Return what a file that begins with `begin` (eight bytes tell most) is instead of itself, or None."""
    if begin[: len(LFS_BEGINS)] == LFS_BEGINS[: len(begin)] and len(begin) >= 8:
        return f"is a Git LFS pointer, not the file itself; {FETCH}"
    if begin[: len(ANNEX_BEGINS)] == ANNEX_BEGINS[: len(begin)] and len(begin) >= 8:
        return "is a pointer of git-annex, not the file itself; fetch the file: `git annex get` in that clone"
    if other := next((what for magic, what in FORMATS if begin.startswith(magic)), None):
        return other
    head = begin.removeprefix(BOM).lstrip().lower()[:9]
    if len(head) >= 5 and any(page.startswith(head) or head.startswith(page) for page in _PAGES):
        return f"is a web page (HTML: an error or a login), not the file itself; {FETCH}"
    return None


def told_text(raw: bytes) -> str | None:
    """Return what is wrong with a text file as a whole, or None: the above, empty, only zeros, marked as UTF-16."""
    if not raw:
        return "is empty; download it again"
    if not raw.strip(b"\0"):
        return f"holds {len(raw)} zero bytes and nothing else, as an interrupted download leaves; download it again"
    if raw[:2] in _WIDE:
        return f"is {_WIDE[raw[:2]]} text; save it as UTF-8"
    return told(raw[:200])


def as_text(begin: bytes) -> str | None:
    """Return the beginning of a file as words of a message, if it is text; None for anything else."""
    try:
        text = begin.decode("utf-8")
    except UnicodeDecodeError as e:
        if e.start < len(begin) - 3:  # the last character may be cut off
            return None
        text = begin[: e.start].decode("utf-8")
    shown = text.strip().splitlines()[0][:SHOWN_TEXT] if text.strip() else ""
    is_text = all(c.isprintable() or c in "\t\r\n" for c in text)
    return f"is text that begins with {show(repr(shown))}" if shown and is_text else None


def other_format(names: Iterable[str]) -> str:
    """Return `; it holds ...` about files of another format among `names`, with what to do; "" without any."""
    for name in names:
        for end, what in OTHER_ENDINGS.items():
            if name.lower().endswith(end):
                return f"; it holds {what} (such as {show(name)}): {_SAFE}"
    return ""
