"""The compiled structures are read as construct itself reads them."""

from __future__ import annotations

from typing import Any

import pytest
from construct import Struct
from hypothesis import given
from hypothesis import strategies as st

from imgloop.formats.luks import schema as luks
from imgloop.formats.qcow2 import schema as qcow2
from imgloop.formats.structures import offset_of, record

STRUCTURES = {
    f"{module.__name__.split('.')[-2]}.{name}": value
    for module in (qcow2, luks)
    for name, value in vars(module).items()
    if isinstance(value, Struct)
}


@pytest.mark.parametrize("name", STRUCTURES)
@given(data=st.data())
def test_both_readers_agree(name: str, data: st.DataObject) -> None:
    structure: Any = STRUCTURES[name]
    size = structure.sizeof()
    image = data.draw(st.binary(max_size=size + 8))
    parsed = structure.parse(image.ljust(size, b"\0"))
    assert record(structure, image) == {field.name: parsed[field.name] for field in structure.subcons}


def test_structures_are_found() -> None:
    assert {"qcow2.Header", "qcow2.SnapshotEntry", "qcow2.BitmapDirectoryEntry", "luks.KeySlot"} <= set(STRUCTURES)


def test_offset_of() -> None:
    assert offset_of(qcow2.Header, "compression_type") == 104
    with pytest.raises(KeyError):
        offset_of(qcow2.Header, "no such field")
