"""Opening files that a user, or a visitor, names."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading in binary mode, without waiting.

    Raises OSError if it cannot be opened, or is a pipe or a device: reading one might never end.
    """
    # With O_NONBLOCK, opening a pipe without a writer returns at once. Regular files ignore it.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
