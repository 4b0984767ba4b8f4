"""Structures that occur once, or some thousands of times: construct `Struct`s of fixed-size fields.

The declaration stays the only place where the layout is written down; `record` compiles it once for the
standard library's `struct`, which parses fifty times as fast as construct: an image may have 65536 snapshots.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any


def record(schema: Any, data: bytes) -> dict[str, Any]:
    """`data` parsed by `schema`, zero-filled where it is too short, as a plain dict in the order of fields."""
    names, layout = _compiled(schema)
    return dict(zip(names, layout.unpack_from(data.ljust(layout.size, b"\0")), strict=True))


@cache
def _compiled(schema: Any) -> tuple[tuple[str, ...], struct.Struct]:
    """The names of a structure's fields, and its layout: big-endian integers and strings of bytes."""
    codes = []
    for field in schema.subcons:
        kind = field.subcon
        codes.append(kind.fmtstr.lstrip(">") if hasattr(kind, "fmtstr") else f"{kind.length}s")
    return tuple(field.name for field in schema.subcons), struct.Struct(">" + "".join(codes))


def offset_of(schema: Any, name: str) -> int:
    """The offset (bytes) of a field in a structure of fixed-size fields."""
    offset = 0
    for field in schema.subcons:
        if field.name == name:
            return offset
        offset += field.sizeof()
    raise KeyError(name)


def c_string(data: bytes) -> str:
    """Bytes up to the first NUL, as a file name (undecodable bytes survive the round trip)."""
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
