"""Persistent dirty bitmaps: the directory, and QEMU's judgement of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imgloop.formats.columns import Table
from imgloop.formats.errors import FormatError, Where
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.header import INT_MAX, Extension, Header, last_extension, needed_to_open
from imgloop.formats.source import Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_TABLE_ENTRIES = 0x8000000
MAX_BITMAP_BYTES = 0x20000000  # 512 MiB of clusters for one bitmap
MAX_NAME = 1023  # bytes
GRANULARITY_BITS = range(9, 32)


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One entry of the bitmap directory."""

    offset: int  # of the entry in the file
    name: str
    table_offset: int
    table_size: int  # entries
    flags: int
    type: int
    granularity_bits: int
    extra_data_size: int

    @property
    def granularity(self) -> int:
        """Bytes of the guest that one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        """Whether it was not saved properly, and so cannot be trusted."""
        return bool(self.flags & schema.BITMAP_IN_USE)

    def flag_names(self) -> list[str]:
        """The flags that `qemu-img info` names."""
        return [name for bit, name in enumerate(schema.BITMAP_FLAGS[:2]) if self.flags >> bit & 1]


def bitmap_extension(extensions: list[Extension]) -> dict[str, Any] | None:
    """The bitmap extension's fields, None where there is none."""
    found = last_extension(extensions, schema.BITMAP_DIRECTORY)
    return schema.record(schema.BitmapExtension, found.data) if found else None


def read_bitmaps(source: Source, header: Header, extension: dict[str, Any]) -> Iterator[Bitmap]:
    """The entries of the bitmap directory in order; FormatError at the first thing that QEMU refuses there."""
    for bitmap, problem in judged_bitmaps(source, header, extension):
        if problem:
            raise problem
        if bitmap:
            yield bitmap


def judged_bitmaps(
    source: Source, header: Header, extension: dict[str, Any]
) -> Iterator[tuple[Bitmap | None, FormatError | None]]:
    """The entries of the bitmap directory, each with what QEMU refuses in it, as far as they can be told apart.

    A problem without a bitmap is one of the directory itself. The extension's limits are to be checked before.
    """
    base, size = extension["directory_offset"], extension["directory_size"]

    def bad(message: str, at: int, field: str = "bitmap directory") -> FormatError:
        return FormatError(message, Where(source.name, base + at, field))

    if size == 0:
        yield None, bad("Requested bitmap directory size is zero", 0)
    directory = source.pread(size, base)
    head = schema.BitmapDirectoryEntry.sizeof()
    at = count = 0
    while at < size:
        if at + head > size:
            yield None, bad("Broken bitmap directory", at)
            return
        count += 1
        if count == extension["nb_bitmaps"] + 1:
            yield None, bad("More bitmaps found than specified in header extension", at)
        entry = schema.record(schema.BitmapDirectoryEntry, directory[at : at + head])
        length = head + entry["extra_data_size"] + entry["name_size"]
        end = at + length
        if length <= INT_MAX and end + 7 & ~7 > size:  # QEMU counts in an int; beyond, the next test refuses
            yield None, bad("Broken bitmap directory", at)
            return
        name = directory[end - entry["name_size"] : end].decode("utf-8", "surrogateescape")
        bitmap = Bitmap(
            offset=base + at,
            name=name,
            **{key: entry[key] for key in entry if key != "name_size"},
        )
        problem = None
        if entry["extra_data_size"]:
            problem = bad("Bitmap extra data is not supported", at)
        elif not _acceptable(bitmap, header, entry["name_size"]):
            problem = bad(f"Bitmap '{name}' doesn't satisfy the constraints", at, f"bitmap '{name}'")
        yield bitmap, problem
        at = end + 7 & ~7
    if count < extension["nb_bitmaps"]:
        yield None, bad("Less bitmaps found than specified in header extension", size)


def _acceptable(bitmap: Bitmap, header: Header, name_size: int) -> bool:
    """QEMU's constraints on a directory entry (check_dir_entry)."""
    length = bitmap.table_size * header.cluster_size
    sound = (
        0 < bitmap.table_size <= MAX_TABLE_ENTRIES
        and bitmap.table_offset != 0
        and bitmap.table_offset % header.cluster_size == 0
        and bitmap.granularity_bits in GRANULARITY_BITS
        and not bitmap.flags & ~(schema.BITMAP_IN_USE | schema.BITMAP_AUTO)
        and name_size <= MAX_NAME
        and bitmap.type == schema.DIRTY_TRACKING
        and length <= MAX_BITMAP_BYTES
    )
    return sound and (bitmap.in_use or header.virtual_size <= length * 8 << bitmap.granularity_bits)


def check_bitmap_tables(source: Source, header: Header, bitmaps: list[Bitmap]) -> None:
    """FormatError at the first bitmap that QEMU would fail to load when it opens the image.

    Bitmaps that are in use are not looked at, and neither are the bits themselves.
    """
    seen: set[str] = set()
    sound: set[tuple[int, int]] = set()  # tables are read once, however many bitmaps name them
    for bitmap in bitmaps:
        where = Where(source.name, bitmap.offset, f"bitmap '{bitmap.name}'")
        if not bitmap.in_use:
            place = bitmap.table_offset, bitmap.table_size
            _check_table(source, header, bitmap, where, known=place in sound)
            sound.add(place)
        if bitmap.name in seen:
            raise FormatError(f"Bitmap already exists: {bitmap.name}", where)
        seen.add(bitmap.name)


def _check_table(source: Source, header: Header, bitmap: Bitmap, where: Where, *, known: bool) -> None:
    reason = os.strerror(22)
    per_cluster = header.cluster_size * 8 * bitmap.granularity  # guest bytes that a cluster of bits covers
    clusters = -(-header.virtual_size // per_cluster)
    unread = f"Could not read bitmap_table table from image for bitmap '{bitmap.name}'"
    with needed_to_open(unread):
        bad = not known and bad_entries(read_bitmap_table(source, bitmap), header).any()
    if bad:
        raise FormatError(f"{unread}: {reason}", where)
    if bitmap.table_size != clusters:
        raise FormatError(f"Could not read bitmap '{bitmap.name}' from image: {reason}", where)


def read_bitmap_table(source: Source, bitmap: Bitmap) -> Table:
    """The table of a bitmap that keeps QEMU's constraints: then it has eight MiB at most."""
    data = source.pread(bitmap.table_size * schema.BITMAP_TABLE.size, bitmap.table_offset)
    return schema.BITMAP_TABLE.table(data)


def bad_entries(table: Table, header: Header) -> NDArray[np.bool_]:
    """Which entries of a bitmap's table QEMU refuses."""
    offset, ones = table["offset"], table["all_ones"]
    bad: NDArray[np.bool_] = (table["reserved_high"] | table["reserved_low"]) != 0
    bad |= (offset != 0) & (ones != 0)
    bad |= offset % header.cluster_size != 0
    return bad
