"""The formats: what the bytes of an image file mean.

One room per format; each knows bytes, and nothing of people, chains or devices. This is their registry:
which format is it, and which driver opens it.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from imgloop.formats.driver import Driver, OpenFile, Purpose
from imgloop.formats.errors import OpenError
from imgloop.formats.source import Source

SUPPORTED = ("qcow2", "raw")
PROBE_LENGTH = 512  # bytes that QEMU looks at

# Formats that QEMU recognises too: they are named, never read as raw.
_SIGNATURES: tuple[tuple[str, int, bytes], ...] = (
    ("luks", 0, b"LUKS\xba\xbe\x00\x01"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("qed", 0, b"QED\x00"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
)
_VMDK_TEXT = re.compile(rb"(?:#[^\n]*\n| +\r?\n)*version=[123]\r?\n")
KNOWN = frozenset(SUPPORTED) | {"qcow", "dmg"} | {name for name, _, _ in _SIGNATURES}


def probe(head: bytes, name: str = "") -> str:
    """The format of an image by its first bytes (zero-filled to PROBE_LENGTH), as QEMU guesses it.

    Only a `.dmg` is known by its name.
    """
    magic, version = struct.unpack_from(">4sI", head.ljust(8, b"\0"))
    if magic == b"QFI\xfb" and version:
        return "qcow2" if version >= 2 else "qcow"
    for format_name, offset, signature in _SIGNATURES:
        if head.startswith(signature, offset):
            return format_name
    if _VMDK_TEXT.match(head):
        return "vmdk"
    return "dmg" if name.endswith(".dmg") else "raw"


def open_driver(
    source: Source,
    format: str | None,
    *,
    open_data_file: OpenFile | None = None,
    purpose: Purpose = "read",
    options: dict[str, Any] | None = None,
) -> Driver:
    """The driver for `source`: of the named format, or of the one that it looks like (None).

    `options` are the driver's own. Raises OpenError for formats that cannot be read, and what the driver
    raises.
    """
    if format is None:
        format = probe(source.pread(PROBE_LENGTH, 0), source.name)
    if format == "qcow2" and options:
        raise OpenError(f"Block format 'qcow2' does not support the option '{next(iter(options))}'")
    if format == "qcow2":
        from imgloop.formats.qcow2.driver import Qcow2

        return Qcow2(source, open_data_file=open_data_file, purpose=purpose)
    if format == "raw":
        from imgloop.formats.raw.driver import Raw

        return Raw(source, **(options or {}))
    if format in KNOWN:
        raise OpenError(f"The {format} format is not supported; supported are {' and '.join(SUPPORTED)}")
    raise OpenError(f"Unknown driver '{format}'")
