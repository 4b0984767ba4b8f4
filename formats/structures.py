"""Structures that occur once in a file: construct `Struct`s of fixed-size fields, parsed into plain dicts."""

from __future__ import annotations

from typing import Any


def record(struct: Any, data: bytes) -> dict[str, Any]:
    """`data` parsed by `struct`, zero-filled where it is too short, as a plain dict in the order of fields."""
    parsed = struct.parse(data.ljust(struct.sizeof(), b"\0"))
    return {field.name: parsed[field.name] for field in struct.subcons}


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
