"""Claims: every structure of an image that uses host clusters, in the order in which QEMU counts them.

`structures` names them in that order without walking any table: single regions, L1 tables, bitmap tables. What
lies below the L1 tables is found by `below`: each slot that some L1 table covers is read once, and each L2 table
that a slot names once, however often they are named; how often goes with them as a number. A hostile image
can name one table from four million entries of sixty thousand snapshots: it is still one table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.errors import FormatError
from imgloop.formats.findings import Event
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.bitmaps import Bitmap, bitmap_extension
from imgloop.formats.qcow2.header import (
    MAX_L1_ENTRIES,
    MAX_SNAPSHOTS,
    Extension,
    Header,
    last_extension,
)
from imgloop.formats.qcow2.snapshots import Snapshot, read_snapshots
from imgloop.formats.qcow2.stored import READ_LIMIT, holding_data, read_all
from imgloop.formats.source import MAX_OFFSET, Source

BATCH = 1 << 20  # bytes of L2 tables looked at together: as much as fits a processor's cache
PIECE = 1 << 23  # bytes of other tables read at a time
MOST_ASTRAY = 1 << 30  # bytes of L2 tables that are not at a cluster's start; those behind are not followed
MIN_EXTRA_DATA = 16  # bytes that version 3 demands of a snapshot's entry
ENTRY = schema.L1.size

Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Region:
    """One structure's claim: `size` bytes from host `offset` on. `name` is a snapshot's or a bitmap's."""

    kind: str
    offset: int
    size: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class L1Table:
    """An L1 table, and with it all that is below; `view` 0 is the active one, n the n-th snapshot's."""

    offset: int
    entries: int
    view: int
    name: str | None = None

    @property
    def region(self) -> Region:
        """The table itself."""
        return Region("L1 table", self.offset, self.entries * ENTRY, self.name)


@dataclass(frozen=True, slots=True)
class BitmapTable:
    """A bitmap's table of clusters, and with it the clusters."""

    offset: int
    entries: int
    name: str

    @property
    def region(self) -> Region:
        """The table itself."""
        return Region("bitmap table", self.offset, self.entries * schema.BITMAP_TABLE.size, self.name)


@dataclass(frozen=True, slots=True)
class Abort:
    """The end of the check: what QEMU says of it."""

    reason: str


Structure = Region | L1Table | BitmapTable | Event | Abort


class Layout:
    """What the header leads to: the file, and the lists that the structures come from."""

    def __init__(self, source: Source, header: Header, extensions: list[Extension], bitmaps: list[Bitmap]) -> None:
        self.source = source
        self.header = header
        self.extensions = extensions
        self.bitmaps = bitmaps
        self.snapshots: list[Snapshot] = []
        # QEMU counts files in whole sectors
        self.end = -(-source.size // 512) * 512

    def past_end(self, offset: int, size: int) -> bool:
        """Whether a region reaches a cluster or more past the end of the file."""
        return offset + size - self.end >= self.header.cluster_size

    def structures(self) -> Iterator[Structure]:
        """All claims but those of refcount blocks, and what is wrong with their owners, in QEMU's order."""
        header = self.header
        yield from self._snapshot_table()
        if -(-self.end // header.cluster_size) > (1 << 31) - 1:
            yield Abort("File too large")
            return
        yield Region("header", 0, header.cluster_size)
        yield from self._l1_table(header.l1_table_offset, header.l1_size, 0, None)
        if header.has_data_file and self.snapshots:
            yield Event("SNAPSHOTS_WITH_DATA_FILE", (len(self.snapshots),))
        for view, snapshot in enumerate(self.snapshots, 1):
            yield from self._snapshot(snapshot, view)
        if self.snapshots:
            size = self.snapshots[-1].end - header.snapshots_offset
            yield Region("snapshot table", header.snapshots_offset, size)
        size = header.refcount_table_clusters * header.cluster_size
        yield Region("refcount table", header.refcount_table_offset, size)
        pointer = last_extension(self.extensions, schema.FULL_DISK_ENCRYPTION)
        if pointer:
            luks = schema.record(schema.EncryptionPointer, pointer.data)
            yield Region("LUKS header", luks["offset"], luks["length"])
        yield from self._bitmaps()

    def _snapshot_table(self) -> Iterator[Structure]:
        header, count = self.header, self.header.nb_snapshots
        offset = header.snapshots_offset
        if count > MAX_SNAPSHOTS:
            yield Event("SNAPSHOT_TABLE_INVALID", ("snapshot table too large",))
            hint = f"You can force-remove all {count - MAX_SNAPSHOTS} overhanging snapshots with "
            yield Event("HINT", (hint + "qemu-img check -r all",))
            yield Abort("File too large")
            return
        size = count * schema.SnapshotEntry.sizeof()
        if offset % header.cluster_size or offset + size > MAX_OFFSET:
            yield Event("SNAPSHOT_TABLE_INVALID", ("snapshot table offset invalid",))
            yield Abort("Invalid argument")
            return
        try:
            for snapshot in read_snapshots(self.source, header):
                self.snapshots.append(snapshot)
        except FormatError as error:
            yield Event("SNAPSHOT_TABLE_UNREADABLE", (error.message,))
            yield Event("HINT", (self._snapshot_hint(error),))
            self.snapshots.clear()
            yield Abort("File too large")
            return
        if header.version >= 3:
            for number, snapshot in enumerate(self.snapshots):
                if snapshot.extra_data_size < MIN_EXTRA_DATA:
                    yield Event("SNAPSHOT_ENTRY_INCOMPLETE", (number,))

    def _snapshot_hint(self, error: FormatError) -> str:
        if error.message.startswith("Too much extra"):
            return "You can force-remove this extra metadata with qemu-img check -r all"
        rest = self.header.nb_snapshots - len(self.snapshots)
        return f"You can force-remove all {rest} overhanging snapshots with qemu-img check -r all"

    def _snapshot(self, snapshot: Snapshot, view: int) -> Iterator[Structure]:
        offset, entries = snapshot.l1_table_offset, snapshot.l1_size
        if offset % self.header.cluster_size:
            yield Event("SNAPSHOT_L1_UNALIGNED", (snapshot.id, snapshot.name, offset), view)
        elif entries > MAX_L1_ENTRIES:
            yield Event("SNAPSHOT_L1_TOO_LARGE", (snapshot.id, snapshot.name, entries), view)
        else:
            yield from self._l1_table(offset, entries, view, snapshot.name)

    def _l1_table(self, offset: int, entries: int, view: int, name: str | None) -> Iterator[Structure]:
        if not entries:
            return
        table = L1Table(offset, entries, view, name)
        if offset + entries * ENTRY > READ_LIMIT:
            yield table.region
            yield Event("L1_UNREADABLE", (), view)
            yield Abort("Input/output error")
        else:
            yield table

    def _bitmaps(self) -> Iterator[Structure]:
        if not self.bitmaps:
            return
        extension = bitmap_extension(self.extensions)
        assert extension is not None
        yield Region("bitmap directory", extension["directory_offset"], extension["directory_size"])
        sound: dict[tuple[int, int], bool] = {}
        for bitmap in self.bitmaps:
            table = BitmapTable(bitmap.table_offset, bitmap.table_size, bitmap.name)
            key = (table.offset, table.entries)
            if key not in sound:
                sound[key] = self._bitmap_is_sound(table)
            if not sound[key]:
                yield table.region
                yield Event("BITMAP_TABLE_INVALID", (bitmap.name,))
                yield Abort("Invalid argument")
                return
            yield table

    def _bitmap_is_sound(self, table: BitmapTable) -> bool:
        _, words = nonzero_words(self.source, table.offset, table.entries)
        columns = schema.BITMAP_TABLE
        offset = columns["offset"].of(words)
        bad = columns["reserved_high"].of(words) | columns["reserved_low"].of(words) != 0
        bad |= (offset != 0) & (columns["all_ones"].of(words) != 0)
        bad |= offset % self.header.cluster_size != 0
        return not bad.any()

    def bitmap_clusters(self, table: BitmapTable) -> Numbers:
        """Host offsets of a bitmap's clusters, in the table's order (bytes)."""
        _, words = nonzero_words(self.source, table.offset, table.entries)
        offsets = schema.BITMAP_TABLE["offset"].of(words)
        clusters: Numbers = offsets[offsets != 0].astype(np.int64)
        return clusters


def nonzero_words(source: Source, offset: int, count: int) -> tuple[Numbers, Words]:
    """The 64-bit entries of a table that are not 0: their numbers, and their values. Holes are not read."""
    numbers, values = [], []
    end = offset + count * ENTRY
    for start, stop in source.data_ranges(offset, end):
        first = offset + (start - offset) // ENTRY * ENTRY
        for at in range(first, min(-(-(stop - offset) // ENTRY) * ENTRY + offset, end), PIECE):
            size = min(PIECE, end - at, -(-(stop - at) // ENTRY) * ENTRY)
            words = native(bytearray(source.pread(size, at)))
            found = np.flatnonzero(words)
            numbers.append(found + (at - offset) // ENTRY)
            values.append(words[found])
    if not numbers:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
    return np.concatenate(numbers), np.concatenate(values)


def native(data: bytearray | memoryview) -> Words:
    """Big-endian words, in place, as numbers of this machine."""
    words = np.frombuffer(data, dtype=np.uint64)
    if sys.byteorder == "little":
        words.byteswap(inplace=True)
    return words


@dataclass(frozen=True, slots=True)
class Slots:
    """The L1 entries that are not 0, each slot of the file once, in the order of the file.

    `views` is how many L1 tables cover the slot, `active` whether the active one does, and `table` the number
    of the L2 table that it names.
    """

    position: Numbers  # host offset of the entry
    entry: Words
    views: Numbers
    active: NDArray[np.bool_]
    table: Numbers

    def of(self, table: L1Table) -> slice:
        """The slots that an L1 table covers."""
        low, high = np.searchsorted(self.position, (table.offset, table.offset + table.entries * ENTRY))
        return slice(int(low), int(high))


@dataclass(frozen=True, slots=True)
class Tables:
    """The L2 tables, each once, sorted by `offset` (bytes, perhaps not aligned).

    `named` is how often, over all L1 tables; `active` how often by the active one, `first` the active L1 entry
    that names it first (-1: none).

    Tables at impossible places may overlap, and a small file can name very many of those: only so many are
    `followed`, which all sound tables are.
    """

    offset: Numbers
    named: Numbers
    active: Numbers
    first: Numbers
    followed: NDArray[np.bool_]


def below(source: Source, header: Header, tables: list[L1Table]) -> tuple[Slots, Tables]:
    """What lies below some L1 tables."""
    position, entry, views, active = _slots(source, tables)
    offset = schema.L1["offset"].of(entry).astype(np.int64)
    unique, number = np.unique(offset, return_inverse=True)
    named = np.zeros(len(unique), dtype=np.int64)
    np.add.at(named, number, views)
    of_active = np.zeros(len(unique), dtype=np.int64)
    np.add.at(of_active, number[active], 1)
    first = np.full(len(unique), -1, dtype=np.int64)
    if active.any():
        mine = np.flatnonzero(active)[::-1]  # the first one is written last
        first[number[mine]] = (position[mine] - tables[0].offset) // ENTRY
    astray = unique % header.cluster_size != 0
    followed = ~astray | (np.cumsum(astray) * header.cluster_size <= MOST_ASTRAY)
    return Slots(position, entry, views, active, number), Tables(unique, named, of_active, first, followed)


def _slots(source: Source, tables: list[L1Table]) -> tuple[Numbers, Words, Numbers, NDArray[np.bool_]]:
    """The slots that L1 tables cover: position, entry, how many tables cover it, and whether the active one."""
    starts = np.array([table.offset for table in tables], dtype=np.int64)
    ends = starts + np.array([table.entries * ENTRY for table in tables], dtype=np.int64)
    where, inverse = np.unique(np.concatenate((starts, ends)), return_inverse=True)
    change = np.zeros(len(where), dtype=np.int64)
    np.add.at(change, inverse, np.repeat((1, -1), len(tables)))
    level = np.cumsum(change)
    positions, entries = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
    # parts that are covered, without a gap between them
    edges = np.flatnonzero(np.diff(np.concatenate(([0], level > 0, [0]))))
    for low, high in edges.reshape(-1, 2).tolist():
        start = int(where[low])
        numbers, values = nonzero_words(source, start, (int(where[high]) - start) // ENTRY)
        positions.append(numbers * ENTRY + start)
        entries.append(values)
    position, entry = np.concatenate(positions), np.concatenate(entries)
    views = level[np.searchsorted(where, position, side="right") - 1] if len(position) else position
    active = np.zeros(len(position), dtype=bool)
    if tables and tables[0].view == 0:
        active = (position >= starts[0]) & (position < ends[0])
    return position, entry, views, active


@dataclass(frozen=True, slots=True)
class Batch:
    """Some L2 tables: their numbers in `Tables`, and their entries, a row for each table.

    `bitmap` holds the second words of extended entries; None for standard ones.
    """

    number: Numbers
    entry: Words
    bitmap: Words | None


def l2_batches(source: Source, header: Header, tables: Tables, wanted: Numbers | None = None) -> Iterator[Batch]:
    """The entries of L2 tables (`wanted`: their numbers; all by default), some at a time, by host offset.

    Tables that read as zeros, in holes or past the end of the file, are left out. The arrays are valid until
    the next batch is asked for.
    """
    number = np.arange(len(tables.offset)) if wanted is None else wanted
    number = number[tables.followed[number]]
    number = number[holding_data(source, tables.offset[number], header.cluster_size)]
    size, words = header.cluster_size, header.l2_entry_size // 8
    step = max(1, BATCH // size)
    buffer = memoryview(bytearray(min(step, max(1, len(number))) * size))
    for first in range(0, len(number), step):
        some = number[first : first + step]
        part = buffer[: len(some) * size]
        read_all(source, tables.offset[some], size, part)
        entries = native(part).reshape(len(some), -1, words)
        yield Batch(some, entries[:, :, 0], entries[:, :, 1] if words > 1 else None)
