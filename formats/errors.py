"""What can go wrong with an image, as one tree of exceptions.

    ImageError                      anything that imgloop says about an image
     ├── OpenError                  the image, or a file that it needs, cannot be opened
     │    ├── FormatError           a field of the image breaks a rule of its format
     │    └── GateError             a file that the image names is not allowed (PermissionError, EACCES)
     ├── CorruptError               a guest range cannot be read truthfully (OSError, EIO)
     ├── ReadError                  the operating system failed to read a file (OSError)
     ├── OutOfRangeError            a request reaches past the end of the image (ValueError)
     ├── ReadOnlyError              the format or the image cannot be written (OSError, EROFS)
     └── UsageError                 options that do not make sense together (ValueError)

Each carries, where they are known, the file, the offset in that file (bytes), the field of the format
and the value found there, and prints all of it in one line. The messages are QEMU's where QEMU has one.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass


def visible(text: str) -> str:
    """Text on one line, its control characters spelled out: names come from strangers, terminals obey them."""
    if text.isprintable():
        return text
    # bytes that are no UTF-8 stay what they are: they name files
    return "".join(
        char if char.isprintable() or "\udc80" <= char <= "\udcff" else char.encode("unicode_escape").decode()
        for char in text
    )


@dataclass(frozen=True, slots=True)
class Where:
    """The place in a file that an error speaks of: each part is None where it is not known."""

    file: str | None = None
    offset: int | None = None
    field: str | None = None
    value: int | str | None = None

    def __str__(self) -> str:
        parts = []
        if self.field is not None:
            parts.append(self.field)
        if self.offset is not None:
            parts.append(f"at offset {self.offset:#x}")
        if self.file is not None:
            parts.append(f"of '{self.file}'")
        if self.value is not None:
            shown = f"{self.value} ({self.value:#x})" if isinstance(self.value, int) else repr(self.value)
            parts.append(f"is {shown}")
        return " ".join(parts)


NOWHERE = Where()


class ImageError(Exception):
    """Anything that imgloop says about an image; `message` is QEMU's text where QEMU has one."""

    def __init__(self, message: str, where: Where = NOWHERE) -> None:
        super().__init__(message)
        self.message = message
        self.where = where

    def __str__(self) -> str:
        place = str(self.where)
        return visible(f"{self.message} [{place}]" if place else self.message)


class OpenError(ImageError):
    """The image, or a file that it needs, cannot be opened."""

    def within(self, prefix: str) -> OpenError:
        """The same error as seen from the layer above: `prefix: message`, the place kept."""
        return type(self)(f"{prefix}: {self.message}", self.where)


class FormatError(OpenError, ValueError):
    """A field of the image breaks a rule of its format."""


class GateError(OpenError, PermissionError):
    """A file that the image names is not one that the gate lets through."""

    errno = errno.EACCES


class CorruptError(ImageError, OSError):
    """A guest range cannot be read truthfully: a table entry on the way to it is damaged."""

    errno = errno.EIO


class ReadError(ImageError, OSError):
    """The operating system failed to read a file."""

    errno = errno.EIO


class OutOfRangeError(ImageError, ValueError):
    """A request reaches past the end of the image."""


class ReadOnlyError(ImageError, OSError):
    """The format or the image cannot be written."""

    errno = errno.EROFS


class UsageError(ImageError, ValueError):
    """Options that do not make sense, alone or together."""
