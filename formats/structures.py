"""Structures that occur once in a file: construct `Struct`s of fixed-size fields, parsed into plain dicts."""

from __future__ import annotations

from functools import cache
from struct import Struct
from typing import Any


def record(struct: Any, data: bytes) -> dict[str, Any]:
    """`data` parsed by `struct`, zero-filled where it is too short, as a plain dict in the order of fields."""
    names, layout = _compiled(struct)
    return dict(zip(names, layout.unpack(data[: layout.size].ljust(layout.size, b"\0")), strict=True))


@cache
def _compiled(struct: Any) -> tuple[tuple[str, ...], Struct]:
    """The names of a structure's fields, and their layout for `struct`, which is fifty times as fast.

    All of them are big-endian integers or bytes of a fixed length.
    """
    kinds = [getattr(field.subcon, "fmtstr", f"{field.sizeof()}s").lstrip(">") for field in struct.subcons]
    return tuple(field.name for field in struct.subcons), Struct(">" + "".join(kinds))


def offset_of(struct: Any, name: str) -> int:
    """The offset (bytes) of a field in a structure of fixed-size fields."""
    offset = 0
    for field in struct.subcons:
        if field.name == name:
            return offset
        offset += field.sizeof()
    raise KeyError(name)


def c_string(data: bytes) -> str:
    """Bytes up to the first NUL, as a file name (undecodable bytes survive the round trip)."""
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
