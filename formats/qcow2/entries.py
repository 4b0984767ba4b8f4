"""L2 entries under check: what each claims and what is wrong with it, for whole batches of tables.

The rules and their order are QEMU's (check_refcounts_l2, check_oflag_copied).
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.findings import RULES, Event
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.claims import Batch, Layout, Numbers, Tables, Words, l2_batches
from imgloop.formats.qcow2.counts import Counts
from imgloop.formats.qcow2.stored import StoredRefcounts

# What can be wrong with one entry, in the order in which QEMU says it.
ENTRY_CODES = (
    "L2_ENTRY_RESERVED_BITS",
    "COMPRESSED_COPIED",
    "COMPRESSED_WITH_DATA_FILE",
    "COMPRESSED_WITH_SUBCLUSTERS",
    "SUBCLUSTERS_CONTRADICT",
    "DATA_UNALIGNED",
    "PREALLOCATED_UNALIGNED",
    "SUBCLUSTERS_WITHOUT_CLUSTER",
    "REGION_PAST_END",
    "REFCOUNT_OVERFLOW",  # a candidate: whether it overflows depends on what was counted before
    "DATA_COPIED_FLAG",
    "ZERO_FLAG_IN_V2",
    "DATA_FILE_OFFSET",
    "DATA_TRUNCATED",
)
# Of these, what concerns the active image only; the first belongs to the last step of QEMU's check, the others are
# ours.
LATE = frozenset(ENTRY_CODES[ENTRY_CODES.index("DATA_COPIED_FLAG") :])
COUNTED = frozenset(ENTRY_CODES) - LATE
ROW = np.dtype(
    [("table", np.int64), ("index", np.int32), ("code", np.uint8), ("first", np.uint64), ("second", np.uint64)]
)
Rows = NDArray[np.void]  # of dtype ROW: first and second are the values of the event's fields

LONG_TABLE = 512  # entries; shorter tables are not looked at one by one

_COPIED = schema.L2["copied"].bits
_COMPRESSED = schema.L2["compressed"].bits
_OFFSET = schema.L2["offset"].bits
_ZERO = schema.L2["zero"].bits
_RESERVED = schema.L2["reserved_high"].bits | schema.L2["reserved_low"].bits


@dataclass(frozen=True, slots=True)
class Entries:
    """L2 entries that are not 0: the number of their table, their index in it, their words, and their kind.

    `normal` have a host cluster, or are preallocated zeros. `clusters` counts for all the same.
    """

    table: Numbers
    index: Numbers
    word: Words
    bitmap: Words | None
    compressed: NDArray[np.bool_]
    normal: NDArray[np.bool_]
    zero: NDArray[np.bool_]

    def pick(self, which: NDArray[np.bool_]) -> Entries:
        """Some of them."""
        bitmap = None if self.bitmap is None else self.bitmap[which]
        return Entries(
            self.table[which],
            self.index[which],
            self.word[which],
            bitmap,
            self.compressed[which],
            self.normal[which],
            self.zero[which],
        )

    @property
    def offset(self) -> Numbers:
        """Host offset of each one's cluster (bytes); meaningless for compressed ones."""
        offset: Numbers = (self.word & _OFFSET).astype(np.int64)
        return offset


def entries_of(layout: Layout, batch: Batch, rows: NDArray[np.bool_] | None = None) -> Entries:
    """The entries of a batch (of some of its tables) that are not 0, classified as QEMU does."""
    number = batch.number if rows is None else batch.number[rows]
    words = batch.entry if rows is None else batch.entry[rows]
    bitmaps = batch.bitmap if rows is None or batch.bitmap is None else batch.bitmap[rows]
    used = np.flatnonzero(words if bitmaps is None else words | bitmaps)
    per_table = words.shape[1]
    word = words.reshape(-1)[used]
    compressed = word & _COMPRESSED != 0
    extended = layout.header.extended_l2
    zero = np.zeros(len(word), dtype=bool) if extended else (word & _ZERO != 0) & ~compressed
    normal = (word & _OFFSET != 0) & ~compressed
    if layout.header.has_data_file:
        normal |= ~zero & ~compressed & (word & _COPIED != 0)
    bitmap = None if bitmaps is None else bitmaps.reshape(-1)[used]
    return Entries(number[used // per_table], used % per_table, word, bitmap, compressed, normal, zero)


def streams(layout: Layout, entries: Entries) -> tuple[Numbers, Numbers]:
    """Offset and length (bytes) of compressed clusters' streams."""
    columns = schema.compressed(layout.header.cluster_bits)
    offset = columns["host_offset"].of(entries.word).astype(np.int64)
    sectors = columns["sectors"].of(entries.word).astype(np.int64)
    return offset, (sectors + 1) * 512 - offset % 512


def counted_streams(entries: Entries, layout: Layout) -> NDArray[np.bool_]:
    """Which entries are compressed clusters that QEMU counts."""
    if layout.header.has_data_file:
        return np.zeros(len(entries.word), dtype=bool)
    if entries.bitmap is not None:
        counted: NDArray[np.bool_] = entries.compressed & (entries.bitmap == 0)
        return counted
    return entries.compressed


def claimed(
    layout: Layout, entries: Entries, offset: Numbers, size: Numbers | int
) -> tuple[NDArray[np.bool_], Numbers, Numbers]:
    """Which regions count, and of those the first host cluster and the last."""
    bits = layout.header.cluster_bits
    counts = offset + size - layout.end < layout.header.cluster_size
    end = (offset + size)[counts]
    return counts, offset[counts] >> bits, end - 1 >> bits


@dataclass
class Walk:
    """A walk over all L2 tables: sums the claims, and counts what is wrong with their entries.

    What is wrong is not kept, only how often (`tally`) and with which tables (`noted`, a bit for each of
    ENTRY_CODES); `notes_on` looks at one of those tables again.
    """

    layout: Layout
    tables: Tables
    stored: StoredRefcounts
    total: Counts  # all claims
    data: Counts | None  # claims of the active image's uncompressed clusters, if they are to be told apart
    rows: list[Rows] | None = None  # where notes are kept, if they are to be
    allocated: int = 0
    compressed: int = 0
    fragmented: int = 0
    last: int = -1  # the last host cluster claimed
    data_end: int = 0  # where the last cluster in a data file ends (bytes)
    runs: list[tuple[Numbers, Words]] = field(default_factory=list)  # tables that map one run: number, first entry
    tally: Tally[str] = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.noted = np.zeros(len(self.tables.offset), dtype=np.uint32)
        # QEMU does not look for COPIED flags in a table whose own refcount it cannot find
        clusters = self.tables.offset >> self.layout.header.cluster_bits
        self.flagged = (self.tables.active > 0) & (self.tables.offset != 0) & self.stored.readable(clusters)

    def add(self, batch: Batch) -> None:
        """Look at a batch of tables."""
        full = self._full_runs(batch)
        if not full.all():
            self.sift(entries_of(self.layout, batch, ~full if full.any() else None))

    # --- tables whose entries count up: nothing to look at but both ends ---

    def _full_runs(self, batch: Batch) -> NDArray[np.bool_]:
        """Which tables map one run of host clusters without any blemish; those are counted here."""
        header, entry = self.layout.header, batch.entry
        size, count = header.cluster_size, entry.shape[1]
        none = np.zeros(len(entry), dtype=bool)
        if batch.bitmap is not None or header.has_data_file or count < LONG_TABLE:
            return none
        first, last = entry[:, 0], entry[:, -1]
        plain: NDArray[np.bool_] = first & ~np.uint64(_OFFSET & -size & (1 << 64) - 1 | _COPIED) == 0
        plain &= (last - first == (count - 1) * size) & (first & _OFFSET != 0)
        plain &= (first & _OFFSET) + count * size <= self.layout.source.size
        if not plain.any():
            return none
        some = entry if plain.all() else entry[plain]
        plain[plain] = (some[:, 1:] - some[:, :-1] == size).all(axis=1)
        self._count_runs(batch.number[plain], first[plain])
        self.runs.append((batch.number[plain], first[plain]))
        return plain

    def compare_run_flags(self, all_one: bool) -> None:
        """Look at the COPIED flags of tables that map one run, which was put off until now.

        `all_one` says that every refcount is known to be 0 or 1 and right: then flags that are set are right.
        """
        wrong = [np.zeros(0, dtype=np.int64)]
        for number, word in self.runs:
            active = self.tables.active[number] > 0
            number, word = number[active], word[active]
            if not all_one or not (word & _COPIED != 0).all():
                fits = [self._flag_fits(entry) for entry in word.tolist()]
                wrong.append(number[~np.array(fits, dtype=bool)])
        for batch in l2_batches(self.layout.source, self.layout.header, self.tables, np.concatenate(wrong)):
            entries = entries_of(self.layout, batch)
            self._compare_flags(entries, entries.offset)

    def _flag_fits(self, word: int) -> bool:
        """Whether the COPIED flag of a run of clusters, given by its first entry, is right for all of them."""
        first = (word & _OFFSET) >> self.layout.header.cluster_bits
        if self.stored.unreadable.any():
            return False
        refcounts = self.stored.window(first, first + self.layout.header.l2_entries)
        if refcounts is None:
            return not word & _COPIED
        ones = refcounts == 1
        return bool(ones.all() if word & _COPIED else not ones.any())

    def _count_runs(self, number: Numbers, first: Words) -> None:
        start = (first & _OFFSET).astype(np.int64) >> self.layout.header.cluster_bits
        length = np.full(len(start), self.layout.header.l2_entries)
        active = self.tables.active[number]
        self.total.add_runs(start, length, self.tables.named[number])
        if self.data is not None:
            self.data.add_runs(start[active > 0], length[active > 0], active[active > 0])
        self.allocated += int(active.sum()) * self.layout.header.l2_entries
        if len(start):
            self.last = max(self.last, int(start.max()) + self.layout.header.l2_entries - 1)

    # --- any tables ---

    def _note(self, code: str, entries: Entries, first: NDArray[Any], second: NDArray[Any] | None = None) -> None:
        if not len(entries.word):
            return
        number = ENTRY_CODES.index(code)
        times = self.tables.active if code in LATE else self.tables.named
        self.tally[code] += int(times[entries.table].sum())
        self.noted[np.unique(entries.table)] |= np.uint32(1 << number)
        if self.rows is not None:
            rows = np.zeros(len(entries.word), dtype=ROW)
            rows["table"], rows["index"], rows["code"] = entries.table, entries.index, number
            rows["first"] = first
            rows["second"] = 0 if second is None else second
            self.rows.append(rows)

    def sift(self, entries: Entries) -> None:
        """Look at entries one and all."""
        if not len(entries.word):
            return
        reserved = (entries.word & _RESERVED != 0) & ~entries.compressed
        if reserved.any():
            some = entries.pick(reserved)
            self._note("L2_ENTRY_RESERVED_BITS", some, some.word)
        if entries.compressed.any():
            self._sift_compressed(entries.pick(entries.compressed))
        if entries.bitmap is not None:
            self._sift_bitmaps(entries)
        if self.layout.header.version < 3 and entries.zero.any():
            some = entries.pick(entries.zero)
            self._note("ZERO_FLAG_IN_V2", some, some.word)
        normal = entries if entries.normal.all() else entries.pick(entries.normal)
        if len(normal.word):
            self._sift_normal(normal)

    def _sift_compressed(self, entries: Entries) -> None:
        columns = schema.compressed(self.layout.header.cluster_bits)
        copied = entries.word & _COPIED != 0
        some = entries.pick(copied)
        self._note("COMPRESSED_COPIED", some, columns["host_offset"].of(some.word))
        counted = counted_streams(entries, self.layout)
        wrong = entries.pick(~counted)
        code = "COMPRESSED_WITH_DATA_FILE" if self.layout.header.has_data_file else "COMPRESSED_WITH_SUBCLUSTERS"
        self._note(code, wrong, wrong.index.astype(np.uint64), wrong.word & ~np.uint64(_COPIED))
        entries = entries.pick(counted)
        active = int(self.tables.active[entries.table].sum())
        self.allocated += active
        self.compressed += active
        self.fragmented += active
        offset, size = streams(self.layout, entries)
        self._claim(entries, offset, size)

    def _sift_bitmaps(self, entries: Entries) -> None:
        assert entries.bitmap is not None
        columns = schema.EXTENDED_L2_COLUMNS
        zeros = columns["zero_bitmap"].of(entries.bitmap)
        present = columns["allocated_bitmap"].of(entries.bitmap)
        some = entries.pick(entries.normal & (zeros & present != 0))
        self._note("SUBCLUSTERS_CONTRADICT", some, some.word & _OFFSET)
        some = entries.pick(~entries.normal & ~entries.compressed & (present != 0))
        self._note("SUBCLUSTERS_WITHOUT_CLUSTER", some, some.word & 0)

    def _sift_normal(self, entries: Entries) -> None:
        header = self.layout.header
        offset = entries.offset
        astray = offset % header.cluster_size != 0
        if astray.any():
            self._note_unaligned(entries.pick(astray))
        self._count_fragments(entries, offset)
        if header.has_data_file:
            self._compare_offsets(entries, offset)
        else:
            self._claim(entries, offset, header.cluster_size, plain=True)
            self._note_truncated(entries, offset)
        self._compare_flags(entries, offset)

    def _note_unaligned(self, entries: Entries) -> None:
        if entries.bitmap is None:
            data = ~entries.zero
        else:
            data = schema.EXTENDED_L2_COLUMNS["allocated_bitmap"].of(entries.bitmap) != 0
        for code, which in (("DATA_UNALIGNED", data), ("PREALLOCATED_UNALIGNED", ~data)):
            some = entries.pick(which)
            self._note(code, some, some.word & _OFFSET)

    def _note_truncated(self, entries: Entries, offset: Numbers) -> None:
        """Data that the file's end cuts; the part of a cluster that was never written may be missing."""
        size = self.layout.header.cluster_size
        cut = (offset + size > self.layout.source.size) & (offset < self.layout.end) & ~entries.zero
        if not cut.any():
            return
        some, needed = entries.pick(cut), np.full(int(cut.sum()), size)
        if some.bitmap is not None:
            present = schema.EXTENDED_L2_COLUMNS["allocated_bitmap"].of(some.bitmap)
            written = np.ceil(np.log2(present.astype(np.float64) + 1)).astype(
                np.int64
            )  # the last subcluster's end
            needed = written * (size // schema.SUBCLUSTERS)
        some = some.pick(some.offset + needed > self.layout.source.size)
        self._note("DATA_TRUNCATED", some, some.word & _OFFSET)

    def _count_fragments(self, entries: Entries, offset: Numbers) -> None:
        """Statistics of the active image: a cluster that does not follow the one before it in its table."""
        active = self.tables.active[entries.table]
        if active.any():
            apart = (offset[1:] != offset[:-1] + self.layout.header.cluster_size) & (
                entries.table[1:] == entries.table[:-1]
            )
            self.allocated += int(active.sum())
            self.fragmented += int(active[1:][apart].sum())

    def _claim(self, entries: Entries, offset: Numbers, size: Numbers | int, plain: bool = False) -> None:
        """Count host regions (`plain`: whole clusters of data), or note that they are past the end."""
        counts, first, last = claimed(self.layout, entries, offset, size)
        if not counts.all():
            some = entries.pick(~counts)
            sizes = np.full(len(counts), size)[~counts] if isinstance(size, int) else size[~counts]
            self._note("REGION_PAST_END", some, offset[~counts].astype(np.uint64), sizes.astype(np.uint64))
        if not len(first):
            return
        self.last = max(self.last, int(last.max()))
        table = entries.table[counts]
        named = self.tables.named[table]
        self.total.add(first, named if named.max() > 1 else 1)
        active = self.tables.active[table]
        if plain and self.data is not None and active.any():
            self.data.add(first[active > 0], active[active > 0] if active.max() > 1 else 1)
        more = last > first
        while more.any():  # once where the offset is not aligned, twice for the longest streams
            first, last, named = first[more] + 1, last[more], named[more]
            self.total.add(first, named)
            more = last > first

    def _compare_offsets(self, entries: Entries, offset: Numbers) -> None:
        """Clusters of a data file lie where the guest sees them."""
        header, first = self.layout.header, self.tables.first[entries.table]
        guest = (first * header.l2_entries + entries.index) << header.cluster_bits
        active = first >= 0
        wrong = active & (guest != offset)
        if wrong.any():
            some = entries.pick(wrong)
            self._note("DATA_FILE_OFFSET", some, guest[wrong].astype(np.uint64), some.word & _OFFSET)
        if active.any():
            self.data_end = max(self.data_end, int(offset[active].max()) + header.cluster_size)

    def _compare_flags(self, entries: Entries, offset: Numbers) -> None:
        """The COPIED flag must say whether the stored refcount is exactly one."""
        active = self.flagged[entries.table]
        if not active.any():
            return
        copied = entries.word & _COPIED != 0
        if self.layout.header.has_data_file:
            wrong = active & ~copied
            some = entries.pick(wrong)
            self._note("DATA_COPIED_FLAG", some, some.word, np.ones(len(some.word), dtype=np.uint64))
            return
        clusters = offset >> self.layout.header.cluster_bits
        refcounts = self.stored.at(clusters)
        wrong = active & ((refcounts == 1) != copied)
        if wrong.any():
            wrong &= self.stored.readable(clusters)
            some = entries.pick(wrong)
            self._note("DATA_COPIED_FLAG", some, some.word, refcounts[wrong].astype(np.uint64))


def in_order(parts: list[Rows]) -> Rows:
    """Notes as QEMU makes them: table by table, entry by entry."""
    rows = np.concatenate(parts)
    return rows[np.lexsort((rows["first"], rows["code"], rows["index"], rows["table"]))]


def notes_on(walk: Walk, table: int, suspects: Numbers) -> Rows:
    """What is wrong with the entries of one L2 table, and which of them claim clusters in `suspects`."""
    again = Walk(walk.layout, walk.tables, walk.stored, Counts(), None, rows=[])
    assert again.rows is not None
    for batch in l2_batches(walk.layout.source, walk.layout.header, walk.tables, np.array([table])):
        again.sift(entries_of(walk.layout, batch))
        if len(suspects):
            again.rows.append(claims_on(walk.layout, batch, suspects))
    return in_order([np.zeros(0, dtype=ROW), *again.rows])


def row_events(rows: Rows, codes: frozenset[str], view: int, l1_index: int) -> Iterator[Event]:
    """The events of some codes among the notes on one L2 table, as met by way of an L1 entry."""
    for _, l2_index, number, first, second in rows.tolist():
        code = ENTRY_CODES[number]
        if code in codes:
            yield Event(code, (first, second)[: len(RULES[code].fields)], view, l1_index, l2_index)


def claims_on(layout: Layout, batch: Batch, wanted: Numbers) -> Rows:
    """The entries that claim some of the host clusters in `wanted` (sorted); `first` is the cluster."""
    entries = entries_of(layout, batch)
    found = [np.zeros(0, dtype=ROW)]
    plain = entries.pick(entries.normal & (not layout.header.has_data_file))
    packed = entries.pick(counted_streams(entries, layout))
    for some, (offset, size) in (
        (plain, (plain.offset, layout.header.cluster_size)),
        (packed, streams(layout, packed)),
    ):
        counts, first, last = claimed(layout, some, offset, size)
        some = some.pick(counts)
        for step in range(3):
            cluster = first + step
            at = np.minimum(np.searchsorted(wanted, cluster), len(wanted) - 1)
            hit = (cluster <= last) & (wanted[at] == cluster)
            rows = np.zeros(int(hit.sum()), dtype=ROW)
            rows["table"], rows["index"] = some.table[hit], some.index[hit]
            rows["code"] = ENTRY_CODES.index("REFCOUNT_OVERFLOW")
            rows["first"], rows["second"] = cluster[hit], some.word[hit]
            found.append(rows)
    return np.concatenate(found)
