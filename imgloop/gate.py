"""The gate: the only place that opens files, whether a person named them or an image did.

An image is a stranger's claim. The file that a person names is opened; a file that an *image* names (a
backing file, a data file) is opened only where the gate lets it through.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from imgloop.formats.errors import GateError, OpenError, Where
from imgloop.formats.source import Source


class Trust(Enum):
    """How far the names in an image are followed."""

    DIRECTORY = "directory"  # regular files in the top image's directory and below, and allowed paths
    FULL = "full"  # every regular file and block device
    NONE = "none"  # nothing at all, not even allowed paths


class Gate:
    """Opens files for one image.

    `allow` names files and directories (with all below them) that images may refer to, besides the
    directory of the top image itself.
    """

    def __init__(self, *, trust: Trust = Trust.DIRECTORY, allow: Iterable[str | os.PathLike[str]] = ()) -> None:
        self.trust = trust
        self.allow = tuple(os.path.realpath(path) for path in allow)

    def open_top(self, path: str) -> Source:
        """The file that a person named; OpenError where it cannot be opened, or is no file or block device."""
        return Source(_open(path, regular_only=False), path)

    def open_named(self, path: str, *, top: str, by: str, role: str) -> Source:
        """A file that the image `by` names as its `role` ("backing file"); `top` is the image at the top.

        Raises GateError where the gate is shut for it, OpenError as `open_top`.
        """
        where = Where(by, field=role, value=path)
        if self.trust is Trust.NONE:
            raise GateError(f"Untrusted image: its {role} '{path}' is not opened", where)
        fd = _open(path, regular_only=self.trust is not Trust.FULL)
        if self.trust is Trust.FULL:
            return Source(fd, path)
        # What was opened is judged, not its name: links and renames cannot make a difference afterwards.
        real = Path(_real_path(fd, path))
        home = os.path.realpath(Path(top).parent)
        if any(real.is_relative_to(base) for base in (home, *self.allow)):
            return Source(fd, path)
        os.close(fd)
        raise GateError(
            f"The {role} '{path}' is outside of the image's directory '{home}'; "
            f"--allow '{real}' or --trust lets it through",
            where,
        )


def _real_path(fd: int, path: str) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return os.path.realpath(path)


def _open(path: str, *, regular_only: bool) -> int:
    """A descriptor for reading a regular file (or a block device), looked at before it is opened.

    Nothing but files and block devices is ever opened for reading: a FIFO would hang, a device would act.
    """
    if not path:
        raise OpenError("The 'file' block driver requires a file name")
    try:
        looking = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(looking).st_mode
            if not (stat.S_ISREG(mode) or (stat.S_ISBLK(mode) and not regular_only)):
                raise OpenError(f"'file' driver requires '{path}' to be a regular file")
            return os.open(f"/proc/self/fd/{looking}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(looking)
    except OSError as error:
        raise OpenError(f"Could not open '{path}': {os.strerror(error.errno or 0)}") from error
    except ValueError as error:  # a NUL in the name
        raise OpenError(f"Could not open {path!r}: {error}") from error
