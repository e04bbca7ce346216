"""What some drives cannot do, told by errno: SMB, NFS, exFAT, WebDAV and FUSE lack calls that APFS and ext4 have.

A call that a drive does not know is no failure of the drive: there is another way, or the user is told once what is
lost. Numbers are listed for Linux and macOS together, as the same word has another number on each, and none of them
means anything else for a file.
"""

from __future__ import annotations

import errno
import logging
import threading

_LOG = logging.getLogger("ds4convert")

UNSUPPORTED = frozenset({
    errno.EINVAL, errno.ENOTTY, errno.ENODEV, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK,
    45,  # ENOTSUP of macOS: SMB, exFAT
    102,  # EOPNOTSUPP of macOS
    78,  # ENOSYS of macOS
    77,  # ENOLCK of macOS
    95,  # EOPNOTSUPP of Linux
    38,  # ENOSYS of Linux
    37,  # ENOLCK of Linux
})  # fmt: skip
"""What a file system answers to a call that it does not have."""

NO_LINK = UNSUPPORTED | {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK}
"""What `link` answers where a file can have no second name: Linux says EPERM on FAT and exFAT, macOS ENOTSUP."""

NO_FOLDER_SYNC = UNSUPPORTED | {errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOENT}
"""What opening and syncing a folder answer where only files can be synced (SMB, FUSE)."""

NO_KERNEL_COPY = UNSUPPORTED | {errno.EXDEV, errno.EPERM, errno.ETXTBSY, errno.EBADF}
"""What `copy_file_range` answers where a copy through a buffer works."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, 69, 122})
"""A full disk or quota; 69 is EDQUOT of macOS, 122 of Linux."""

STALE = frozenset({errno.ESTALE, 70, 116})
"""A file that a network drive has lost; 70 is ESTALE of macOS, 116 of Linux."""

_said: set[str] = set()
_saying = threading.Lock()


def unsupported(e: OSError) -> bool:
    """Return whether the drive does not know the call that failed."""
    return e.errno in UNSUPPORTED


def note(text: str) -> None:
    """Say on standard error, once in a run, what the user has to know of a drive."""
    with _saying:
        if text in _said:
            return
        _said.add(text)
    _LOG.warning("Warning: %s", text)


def advice(e: OSError) -> str:
    """Return what to do about an error of the disk, to be read after what failed; "" where nothing special is known."""
    if e.errno == errno.EFBIG:
        return (
            "this disk takes no file of that size (FAT32 ends at 4 GB): choose a smaller --max-shard-size, such as "
            "3.9GB, or a disk with another file system"
        )
    if e.errno == errno.EROFS:
        return "this disk is read-only: choose a folder on another disk"
    if e.errno in {errno.EACCES, errno.EPERM}:
        return "this user may not write there: choose another folder, or mend its permissions"
    if e.errno in STALE:
        return "the network drive has lost this file: mount the drive again, then run the same command"
    if e.errno == errno.EIO:
        return "the disk itself failed: check its cable and its health, then run the same command again"
    if e.errno in {errno.EMFILE, errno.ENFILE}:
        return "too many files are open: raise the limit with `ulimit -n 4096`, then run the same command"
    if e.errno == errno.ENAMETOOLONG:
        return "the name is too long for this disk: choose a shorter one"
    return ""
