"""Both readers of table entries give the same: construct, one entry at a time, and Columns, all at once.

And both give what stands in entries that QEMU wrote.
"""

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgloop.formats.columns import BitsInteger, BitStruct, Columns, Flag, Scaled
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.refcounts import decode_refcounts

NAMED = {
    "L1": schema.L1,
    "L2": schema.L2,
    "extended L2": schema.EXTENDED_L2_COLUMNS,
    "refcount table": schema.REFCOUNT_TABLE,
    "bitmap table": schema.BITMAP_TABLE,
}
COMPRESSED = {f"compressed, 2^{bits}": schema.compressed(bits) for bits in range(9, 22)}
REFCOUNTS = {f"refcounts of order {order}": schema.refcounts(order) for order in range(7)}
ALL = {**NAMED, **COMPRESSED, **REFCOUNTS}


def test_no_bit_structure_is_forgotten() -> None:
    declared = [value for value in vars(schema).values() if isinstance(value, Columns)]
    assert {id(columns) for columns in declared} == {id(columns) for columns in NAMED.values()}


@pytest.mark.parametrize("columns", [pytest.param(columns, id=name) for name, columns in ALL.items()])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_both_readers_agree(columns: Columns, data: st.DataObject) -> None:
    entries = data.draw(st.lists(st.binary(min_size=columns.size, max_size=columns.size), max_size=9))
    parsed = [columns.schema.parse(entry) for entry in entries]
    table = columns.table(b"".join(entries))
    names = [field.name for field in columns.schema.subcon.subcons]
    assert list(columns) == names
    assert len(table) == len(entries)
    size = columns.word_size
    for name in names:
        want = [int(entry[name]) for entry in parsed]
        assert table[name].tolist() == want
        # and so does a field of one entry by itself
        at = columns[name].word * size
        words = [int.from_bytes(entry[at : at + size], "big") for entry in entries]
        assert [columns[name].of(word) for word in words] == want


@pytest.mark.parametrize("columns", [pytest.param(columns, id=name) for name, columns in ALL.items()])
def test_every_bit_belongs_to_one_field(columns: Columns) -> None:
    for word in range(columns.words):
        fields = [columns[name] for name in columns if columns[name].word == word]
        bits = [field.bits for field in fields]
        assert sum(bits) == (1 << columns.word_size * 8) - 1
        assert all(one & other == 0 for at, one in enumerate(bits) for other in bits[:at])


def test_a_field_may_not_cross_a_word() -> None:
    with pytest.raises(ValueError, match="middle crosses a word"):
        Columns(BitStruct("first" / BitsInteger(60), "middle" / BitsInteger(8), "last" / BitsInteger(60)))


@pytest.mark.parametrize("bits", [1, 7, 23])
@pytest.mark.parametrize("factor", [1, 2, 512, 1 << 30])
def test_scaled_fields(bits: int, factor: int) -> None:
    # wherever the field lies, above or below its own scale
    columns = Columns(BitStruct("above" / BitsInteger(32 - bits - 1), "it" / Scaled(bits, factor), "below" / Flag))
    word = 0xA5C3_96F1
    parsed = columns.schema.parse(struct.pack(">I", word))
    assert columns["it"].of(word) == parsed["it"] == (word >> 1 & (1 << bits) - 1) * factor
    assert columns.schema.build(parsed) == struct.pack(">I", word)


# Entries as the specification and QEMU have them: bytes and fields, all that are not 0.
EXAMPLES: list[tuple[str, Columns, str, dict[str, int]]] = [
    ("L1", schema.L1, "8000000000040000", {"copied": 1, "offset": 0x40000}),
    (
        "L1, all ones",
        schema.L1,
        "ff" * 8,
        {"copied": 1, "reserved_high": 127, "offset": 2**56 - 512, "reserved_low": 511},
    ),
    ("L2, data", schema.L2, "8000000000050000", {"copied": 1, "offset": 0x50000}),
    ("L2, zero", schema.L2, "0000000000000001", {"zero": 1}),
    ("L2, zero, allocated", schema.L2, "8000000000050001", {"copied": 1, "offset": 0x50000, "zero": 1}),
    ("L2, reserved", schema.L2, "3f000000000001fe", {"reserved_high": 63, "reserved_low": 255}),
    ("L2, data file at 0", schema.L2, "8000000000000000", {"copied": 1}),
    ("512", schema.compressed(9), "4000000000001000", {"compressed": 1, "host_offset": 0x1000}),
    ("512, shared", schema.compressed(9), "4000000000001008", {"compressed": 1, "host_offset": 0x1008}),
    ("512, two", schema.compressed(9), "6000000000001008", {"compressed": 1, "sectors": 1, "host_offset": 0x1008}),
    ("4k", schema.compressed(12), "4000000000005015", {"compressed": 1, "host_offset": 0x5015}),
    ("64k", schema.compressed(16), "4c80000000050055", {"compressed": 1, "sectors": 50, "host_offset": 0x50055}),
    ("2M", schema.compressed(21), "4008000000a00802", {"compressed": 1, "sectors": 4, "host_offset": 0xA00802}),
    (
        "extended, 4 KiB at 0",
        schema.EXTENDED_L2_COLUMNS,
        "80000000000500000000000000000003",
        {"copied": 1, "offset": 0x50000, "allocated_bitmap": 3},
    ),
    (
        "extended, 2 KiB of zeros at 200k",
        schema.EXTENDED_L2_COLUMNS,
        "00000000000000000000001000000000",
        {"zero_bitmap": 1 << 4},
    ),
    (
        "extended, all zero",
        schema.EXTENDED_L2_COLUMNS,
        "0000000000000000ffffffff00000000",
        {"zero_bitmap": 0xFFFFFFFF},
    ),
    ("refcount table", schema.REFCOUNT_TABLE, "0000000000020000", {"offset": 0x20000}),
    ("refcount table, all ones", schema.REFCOUNT_TABLE, "ff" * 8, {"offset": 2**64 - 512, "reserved": 511}),
    ("bitmap table", schema.BITMAP_TABLE, "00000000003c0000", {"offset": 0x3C0000}),
    ("bitmap table, ones", schema.BITMAP_TABLE, "0000000000000001", {"all_ones": 1}),
    (
        "bitmap table, reserved",
        schema.BITMAP_TABLE,
        "ff000000000001fe",
        {"reserved_high": 255, "reserved_low": 255},
    ),
]


@pytest.mark.parametrize(("columns", "data", "fields"), [pytest.param(*row[1:], id=row[0]) for row in EXAMPLES])
def test_examples(columns: Columns, data: str, fields: dict[str, int]) -> None:
    table = columns.table(bytes.fromhex(data))
    assert {name: int(table[name][0]) for name in columns if table[name][0]} == fields


# Blocks of refcounts as they lie in the file: those narrower than a byte start at its lowest bits.
BLOCKS: list[tuple[int, str, list[int]]] = [
    (0, "ff07", [1] * 11 + [0] * 5),
    (0, "0180", [1] + [0] * 14 + [1]),
    (1, "555515", [1] * 11 + [0]),
    (1, "55aa16", [1] * 4 + [2] * 4 + [2, 1, 1, 0]),
    (2, "21f0", [1, 2, 0, 15]),
    (3, "0102ff", [1, 2, 255]),
    (4, "00010100ffff", [1, 256, 65535]),
    (5, "0000000180000000", [1, 1 << 31]),
    (6, "00000000000000018000000000000000", [1, 1 << 63]),
]


@pytest.mark.parametrize(("order", "data", "counts"), BLOCKS)
def test_refcount_packing(order: int, data: str, counts: list[int]) -> None:
    assert decode_refcounts(bytes.fromhex(data), order).tolist() == counts


# --- structures that occur once ---------------------------------------------------------------------------

V3 = (
    "514649fb 00000003 0000000000000000 00000000 00000010 0000000000800000 00000000 00000001"
    "0000000000030000 0000000000010000 00000001 00000000 0000000000000000"
    "0000000000000000 0000000000000000 0000000000000000 00000004 00000070 00 00000000000000"
)
STRUCTURES: list[tuple[str, Any, str, dict[str, int | bytes]]] = [
    (
        "header",
        schema.Header,
        V3,
        {
            "magic": 0x514649FB,
            "version": 3,
            "cluster_bits": 16,
            "size": 8 << 20,
            "l1_size": 1,
            "l1_table_offset": 0x30000,
            "refcount_table_offset": 0x10000,
            "refcount_table_clusters": 1,
            "refcount_order": 4,
            "header_length": 112,
        },
    ),
    ("extension", schema.ExtensionHeader, "6803f857 00000180", {"type": 0x6803F857, "length": 384}),
    (
        "encryption",
        schema.EncryptionPointer,
        "0000000000040000 00000000001f9000",
        {"offset": 0x40000, "length": 2068480},
    ),
    (
        "bitmaps",
        schema.BitmapExtension,
        "00000002 00000000 0000000000000040 00000000003d0000",
        {"nb_bitmaps": 2, "directory_size": 64, "directory_offset": 0x3D0000},
    ),
    (
        "bitmap",
        schema.BitmapDirectoryEntry,
        "00000000003b0000 00000001 00000002 01 10 0002 00000000",
        {"table_offset": 0x3B0000, "table_size": 1, "flags": 2, "type": 1, "granularity_bits": 16, "name_size": 2},
    ),
    (
        "snapshot",
        schema.SnapshotEntry,
        "0000000000060000 00000001 0001 0005 6b02e9df 270987c0 0000000000000000 00000000 00000018",
        {
            "l1_table_offset": 0x60000,
            "l1_size": 1,
            "id_size": 1,
            "name_size": 5,
            "date_sec": 0x6B02E9DF,
            "date_nsec": 0x270987C0,
            "extra_data_size": 24,
        },
    ),
    (
        "snapshot's extra data",
        schema.SnapshotExtra,
        "0000000000000000 0000000000400000 0000000000000000",
        {"disk_size": 4 << 20},
    ),
    (
        "feature name",
        schema.FeatureName,
        "00 04" + b"extended L2 entries".ljust(46, b"\0").hex(),
        {"bit": 4, "name": b"extended L2 entries".ljust(46, b"\0")},
    ),
]


@pytest.mark.parametrize(
    ("structure", "data", "fields"), [pytest.param(*row[1:], id=row[0]) for row in STRUCTURES]
)
def test_structures(structure: Any, data: str, fields: dict[str, int | bytes]) -> None:
    raw = bytes.fromhex(data)
    assert structure.sizeof() == len(raw)
    found = schema.record(structure, raw)
    assert {name: value for name, value in found.items() if value not in (0, bytes(7))} == fields
    assert schema.record(structure, b"") == {
        name: type(value)(*([len(value)] if isinstance(value, bytes) else [])) for name, value in found.items()
    }


def test_offsets_of_header_fields() -> None:
    offsets = {field.name: schema.offset_of(schema.Header, field.name) for field in schema.Header.subcons}
    assert offsets["crypt_method"] == 32
    assert offsets["snapshots_offset"] == 64
    assert offsets["incompatible_features"] == schema.V2_LENGTH == 72
    assert offsets["compression_type"] == schema.V3_LENGTH == 104
    with pytest.raises(KeyError):
        schema.offset_of(schema.Header, "colour")
