"""How this process asks the system for memory."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""
_LARGEST_BLOCK = 32 * 2**20
"""The most that glibc takes: larger ones go back to the system when they are freed."""
_KEPT_BYTES = 512 * 2**20


def keep_freed_memory() -> bool:
    """Let the hidden states of one batch lie where those of the last one lay; says whether that can be set.

    By default glibc gives large blocks back when they are freed, and each batch takes them anew, page by
    page, which takes up to a seventh of its time. At most 512 MB stay with the process this way.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {_MMAP_THRESHOLD: _LARGEST_BLOCK, _TRIM_THRESHOLD: _KEPT_BYTES}
    return bool(min(libc.mallopt(parameter, value) for parameter, value in settings.items()))
