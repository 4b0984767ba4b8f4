r"""imgloop: inspect, map, read and verify disk images.

>>> import imgloop
>>> with imgloop.open("disk.qcow2") as image:  # doctest: +SKIP
...     image.size, image.pread(512, 0)[-2:]
(67108864, b'U\xaa')

The public surface: `open`, `Image`, `check` and its `CheckReport`, `Gate` and `Trust` (which files an image may
refer to), `Limits` (what may be spent on it), `Kind` (of an extent), and the tree of errors below
`ImageError` (see
`imgloop.formats.errors`).
"""

from __future__ import annotations

from imgloop.formats.errors import (
    CorruptError,
    FormatError,
    GateError,
    ImageError,
    OpenError,
    OutOfRangeError,
    ReadError,
    ReadOnlyError,
    UsageError,
)
from imgloop.formats.kinds import Kind
from imgloop.gate import Gate, Trust
from imgloop.image import Image, ImageFile, open
from imgloop.limits import Limits
from imgloop.report import CheckReport
from imgloop.verify import check

__version__ = "0.1.0"
__all__ = [
    "CheckReport",
    "CorruptError",
    "FormatError",
    "Gate",
    "GateError",
    "Image",
    "ImageError",
    "ImageFile",
    "Kind",
    "Limits",
    "OpenError",
    "OutOfRangeError",
    "ReadError",
    "ReadOnlyError",
    "Trust",
    "UsageError",
    "check",
    "open",
]
