"""From guest offsets to extents: L1 and L2 tables, read in batches and classified as whole arrays.

The rules and their order are QEMU's (qcow2_get_cluster_type, qcow2_get_subcluster_type,
qcow2_get_host_offset): reserved bits are not looked at, tables past the end of the file read as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.columns import Table
from imgloop.formats.errors import CorruptError, Where
from imgloop.formats.extents import EXTENT, NO_OFFSET, Extents, Kind, clip, coalesce, extent
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.header import Header
from imgloop.formats.source import Source

BATCH = 1 << 15  # clusters or subclusters that one answer looks at: what a processor's cache holds
L1_BATCH = 1 << 16  # L1 entries that one answer looks at


@dataclass(frozen=True, slots=True)
class Units:
    """What the entries say of each cluster, or of each subcluster with extended L2 entries."""

    kind: NDArray[np.uint8]
    offset: NDArray[np.int64]  # host offset (bytes) or NO_OFFSET
    stored: NDArray[np.int32]  # bytes of a compressed stream


class Mapping:
    """The guest's view through one L1 table: the active one, or that of an internal snapshot."""

    def __init__(self, source: Source, header: Header, l1_table_offset: int, l1_size: int) -> None:
        self.source = source
        self.header = header
        self.l1_table_offset = l1_table_offset
        # entries past the end of the file read as zeros, and a file may promise a table far larger than itself
        reach = max(0, source.size - l1_table_offset)
        self.l1_size = min(l1_size, -(-reach // schema.L1.size))
        self.columns = schema.EXTENDED_L2_COLUMNS if header.extended_l2 else schema.L2
        self.subclusters = schema.SUBCLUSTERS if header.extended_l2 else 1
        self.batch = max(1, BATCH // self.subclusters)  # entries

    @cached_property
    def l2_offsets(self) -> NDArray[np.int64]:
        """Host offset of the L2 table of each L1 entry (bytes); 0: none."""
        data = self.source.pread(self.l1_size * schema.L1.size, self.l1_table_offset)
        return schema.L1.table(data)["offset"].astype(np.int64)

    def extents(self, start: int, length: int) -> Extents:
        """The extents of [start, start + length); may end early, see `Driver.extents`."""
        cluster_size, per_table = self.header.cluster_size, self.header.l2_entries
        end = start + length
        first, stop = start // cluster_size, -(-end // cluster_size)  # clusters
        l1 = np.arange(first // per_table, min(-(-stop // per_table), self.l1_size))[:L1_BATCH]
        if not len(l1):
            return extent(start, length, Kind.UNALLOCATED)
        end = min(end, int(l1[-1] + 1) * per_table * cluster_size) if len(l1) == L1_BATCH else end
        offsets = self.l2_offsets[l1[0] : l1[-1] + 1]
        firsts = np.maximum(l1 * per_table, first)
        stops = np.minimum((l1 + 1) * per_table, stop)
        readable = (offsets != 0) & (offsets % cluster_size == 0)
        # take no more tables than the batch allows, and of the first one no more than the batch
        work = np.cumsum(np.where(readable, stops - firsts, 0))
        kept = max(int(np.searchsorted(work, self.batch, side="right")), 1)
        if kept < len(l1):
            end = min(end, int(stops[kept - 1]) * cluster_size)
        l1, offsets, readable = l1[:kept], offsets[:kept], readable[:kept]
        firsts, stops = firsts[:kept], stops[:kept]
        if work[0] > self.batch:
            stops[0] = firsts[0] + self.batch
            end = min(end, int(stops[0]) * cluster_size)
        if readable.all():
            table = self._from_tables(firsts, stops, offsets)
        else:
            table = self._without_table(firsts[~readable], stops[~readable], offsets[~readable])
            if readable.any():
                mapped = self._from_tables(firsts[readable], stops[readable], offsets[readable])
                table = np.concatenate((table, mapped))
                table = table[np.argsort(table["start"], kind="stable")]
        reach = int(table["start"][-1] + table["length"][-1])
        if reach < end and kept == len(work):  # past the last L1 entry
            table = np.concatenate((table, extent(reach, end - reach, Kind.UNALLOCATED)))
        return clip(coalesce(table), start, end)

    def _without_table(
        self, firsts: NDArray[np.int64], stops: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> Extents:
        """What L1 entries say that name no L2 table, or one at an impossible place."""
        table = np.zeros(len(firsts), dtype=EXTENT)
        table["start"] = firsts * self.header.cluster_size
        table["length"] = (stops - firsts) * self.header.cluster_size
        table["offset"] = NO_OFFSET
        table["kind"] = np.where(offsets == 0, Kind.UNALLOCATED, Kind.INVALID)
        return table

    def _from_tables(
        self, firsts: NDArray[np.int64], stops: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> Extents:
        """What the L2 entries of clusters [firsts[i], stops[i]) of each table say."""
        counts = stops - firsts
        before = np.cumsum(counts) - counts
        clusters = np.repeat(firsts - before, counts) + np.arange(int(counts.sum()))
        entries = self._read_entries(offsets + firsts % self.header.l2_entries * self.columns.size, counts)
        units = self.classify(entries, clusters * self.header.cluster_size)
        step = self.header.cluster_size // self.subclusters
        starts = (clusters[:, None] * self.subclusters + np.arange(self.subclusters)).ravel() * step
        return self._runs(units, starts, step)

    def _runs(self, units: Units, starts: NDArray[np.int64], step: int) -> Extents:
        """One extent for each run of units (of `step` bytes) that continue each other."""
        kind, offset = units.kind, units.offset
        follows = np.where(offset[:-1] >= 0, offset[:-1] + step, NO_OFFSET)
        inside_cluster = starts[1:] % self.header.cluster_size != 0
        joined = (kind[1:] == kind[:-1]) & (starts[1:] == starts[:-1] + step)
        joined &= np.where(kind[1:] == Kind.COMPRESSED, inside_cluster, offset[1:] == follows)
        firsts = np.flatnonzero(np.concatenate(([True], ~joined)))
        table = np.zeros(len(firsts), dtype=EXTENT)
        table["start"] = starts[firsts]
        table["length"] = np.diff(firsts, append=len(starts)) * step
        table["offset"] = offset[firsts]
        table["stored"] = units.stored[firsts]
        table["kind"] = kind[firsts]
        return table

    def _read_entries(self, offsets: NDArray[np.int64], counts: NDArray[np.int64]) -> Table:
        """`counts[i]` L2 entries from each host offset, in one table; neighbours in the file are read at once."""
        sizes = counts * self.columns.size
        data = memoryview(bytearray(int(sizes.sum())))
        run_starts = np.flatnonzero(np.concatenate(([True], offsets[1:] != (offsets + sizes)[:-1])))
        places = (np.cumsum(sizes) - sizes)[run_starts].tolist()
        for place, stop, offset in zip(
            places, [*places[1:], len(data)], offsets[run_starts].tolist(), strict=True
        ):
            self.source.readinto(data[place:stop], offset)
        return self.columns.table(data)

    def classify(self, entries: Table, guest: NDArray[np.int64]) -> Units:
        """What each L2 entry means; `guest` holds the guest offset of each entry's cluster (bytes)."""
        header = self.header
        offset = entries["offset"].astype(np.int64)
        compressed = entries["compressed"] != 0
        zero = (entries["zero"] != 0) & (not header.extended_l2)
        present = offset != 0
        if header.has_data_file:
            present |= (entries["copied"] != 0) & ~zero
        invalid = present & (offset % header.cluster_size != 0)
        if header.has_data_file:
            invalid |= present & (offset != guest)
        if header.extended_l2:
            units = self._classify_subclusters(entries, offset, present, invalid, compressed)
        else:
            if header.version < 3:
                invalid |= zero
            kind = np.where(present, np.uint8(Kind.DATA), np.uint8(Kind.UNALLOCATED))
            kind[zero] = Kind.ZERO
            kind[invalid] = Kind.INVALID
            offset[~present | invalid] = NO_OFFSET
            units = Units(kind, offset, np.zeros(len(kind), dtype=np.int32))
        if compressed.any():
            self._classify_compressed(entries, compressed, units)
        return units

    def _classify_subclusters(
        self,
        entries: Table,
        offset: NDArray[np.int64],
        present: NDArray[np.bool_],
        invalid: NDArray[np.bool_],
        compressed: NDArray[np.bool_],
    ) -> Units:
        """Extended entries: every subcluster has a bit for "allocated" and one for "zero"."""
        zeros, allocated = entries["zero_bitmap"], entries["allocated_bitmap"]
        invalid |= np.where(present, zeros & allocated, allocated) != 0
        number = np.arange(self.subclusters, dtype=np.uint64)
        kind = np.zeros((len(entries), self.subclusters), dtype=np.uint8)  # UNALLOCATED
        kind[(allocated[:, None] >> number & 1) != 0] = Kind.DATA
        kind[(zeros[:, None] >> number & 1) != 0] = Kind.ZERO
        kind[invalid] = Kind.INVALID
        kind[compressed] = Kind.UNALLOCATED
        step = self.header.cluster_size // self.subclusters
        where = offset[:, None] + number.astype(np.int64) * step
        where[~present | invalid] = NO_OFFSET
        return Units(kind.ravel(), where.ravel(), np.zeros(kind.size, dtype=np.int32))

    def _classify_compressed(self, entries: Table, compressed: NDArray[np.bool_], units: Units) -> None:
        """Fill in the compressed clusters: all units of one share its stream."""
        which = np.repeat(compressed, self.subclusters)
        if self.header.has_data_file:
            units.kind[which] = Kind.INVALID
            return
        columns = schema.compressed(self.header.cluster_bits)
        words = np.repeat(entries.entries[compressed, 0], self.subclusters)
        offset = columns["host_offset"].of(words).astype(np.int64)
        sectors = columns["sectors"].of(words).astype(np.int64)
        units.kind[which] = Kind.COMPRESSED
        units.offset[which] = offset
        units.stored[which] = (sectors + 1) * 512 - offset % 512

    def explain_invalid(self, start: int) -> CorruptError:
        """QEMU's words for the entry that makes guest offset `start` (bytes) unreadable."""
        header = self.header
        cluster = start // header.cluster_size
        l1_index, l2_index = divmod(cluster, header.l2_entries)
        table = int(self.l2_offsets[l1_index])
        if table % header.cluster_size:
            message = f"L2 table offset {_hex(table)} unaligned (L1 index: {_hex(l1_index)})"
            where = Where(
                self.source.name, self.l1_table_offset + l1_index * schema.L1.size, f"L1 entry {l1_index}"
            )
            return CorruptError(f"Image is corrupt: {message}", where)
        at = table + l2_index * self.columns.size
        word = int.from_bytes(self.source.pread(8, at), "big")
        place = f"L2 offset: {_hex(table)}, L2 index: {_hex(l2_index)}"
        offset = schema.L2["offset"].of(word)
        guest = cluster * header.cluster_size
        if word & schema.L2["compressed"].bits:
            message = f"Compressed cluster entry found in image with external data file ({place})"
        elif header.version < 3 and word & schema.L2["zero"].bits:
            message = f"Zero cluster entry found in pre-v3 image ({place})"
        elif header.extended_l2 and self._bitmap_is_invalid(word, at):
            message = f"Invalid cluster entry found ({place})"
        elif offset % header.cluster_size:
            message = f"Cluster allocation offset {_hex(offset)} unaligned ({place})"
        else:
            message = (
                f"External data file host cluster offset {_hex(offset)} does not match guest cluster "
                f"offset: {_hex(guest)}, L2 index: {_hex(l2_index)})"
            )
        return CorruptError(
            f"Image is corrupt: {message}", Where(self.source.name, at, f"L2 entry {l2_index}", word)
        )

    def _bitmap_is_invalid(self, word: int, at: int) -> bool:
        """Whether the extended entry at host offset `at` has a bitmap that contradicts it."""
        bitmap = int.from_bytes(self.source.pread(8, at + 8), "big")
        zeros, allocated = (self.columns[name].of(bitmap) for name in ("zero_bitmap", "allocated_bitmap"))
        present = schema.L2["offset"].of(word) or (self.header.has_data_file and word & schema.L2["copied"].bits)
        return bool(zeros & allocated if present else allocated)


def _hex(value: int) -> str:
    """A number as C's %#x prints it."""
    return f"{value:#x}" if value else "0"
