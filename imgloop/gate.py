"""The gate: the only place that opens files, whether a person named them or an image did.

An image is a stranger's claim. The file that a person names is opened; a file that an *image* names (a
backing file, a data file) is opened only where the gate lets it through.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path

from imgloop.formats.errors import GateError, OpenError, UsageError, Where
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
        allow = [os.fspath(path) for path in allow]
        if "" in allow:
            raise UsageError("--allow needs a path: an empty one would allow the current directory")
        self.allow = tuple(os.path.realpath(path) for path in allow)

    def open_top(self, path: str) -> Source:
        """The file that a person named; OpenError where it cannot be opened, or is no file or block device."""
        return Source(_open(path, lambda _mode, _real: None), path)

    def open_named(self, path: str, *, top: str, by: str, role: str) -> Source:
        """A file that the image `by` names as its `role` ("backing file"); `top` is the image at the top.

        Raises GateError where the gate is shut for it, OpenError as `open_top`.
        """
        where = Where(by, field=role, value=path)
        home = os.path.realpath(Path(top).parent)

        def judge(mode: int, real: str) -> None:
            if self.trust is Trust.FULL:
                return
            if not stat.S_ISREG(mode):
                raise _not_a_file(path)
            if not any(Path(real).is_relative_to(base) for base in (home, *self.allow)):
                raise GateError(
                    f"The {role} '{path}' is outside of the image's directory '{home}'; "
                    f"--allow '{real}' or --trust lets it through",
                    where,
                )

        if self.trust is Trust.NONE:
            raise GateError(f"Untrusted image: its {role} '{path}' is not opened", where)
        return Source(_open(path, judge), path)


def _not_a_file(path: str) -> OpenError:
    return OpenError(f"'file' driver requires '{path}' to be a regular file")


def _open(path: str, judge: Callable[[int, str], None]) -> int:
    """A descriptor for reading a regular file (or a block device) that `judge` does not refuse.

    The file is found first, without being opened, and judged by its mode and its real path: a FIFO would hang,
    a device would act, and links and renames cannot make a difference afterwards.
    """
    if not path:
        raise OpenError("The 'file' block driver requires a file name")
    if "\0" in path:
        raise OpenError(f"Could not open {path!r}: embedded null byte")
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(found).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise _not_a_file(path)
            judge(mode, str(Path(f"/proc/self/fd/{found}").readlink()))
            return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(found)
    except OpenError:
        raise  # a GateError is an OSError too
    except OSError as error:
        raise OpenError(f"Could not open '{path}': {os.strerror(error.errno or 0)}") from error
    except ValueError as error:  # a name that the file system's encoding does not have
        raise OpenError(f"Could not open {path!r}: {error}") from error
