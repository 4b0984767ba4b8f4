"""The check of a qcow2 image: claims summed, compared with the stored refcounts, and what QEMU says of it.

Two passes. The first goes over every table once, counts, and is done: the totals are known. The second is
lazy: `Check.events` goes through the structures again in QEMU's order, but stops only where the first one noted
something, so that a million messages cost nothing until somebody reads them.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.findings import RULES, Event, total
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.bitmaps import Bitmap
from imgloop.formats.qcow2.claims import (
    Abort,
    BitmapTable,
    L1Table,
    Layout,
    Numbers,
    Region,
    Structure,
    below,
    l2_batches,
)
from imgloop.formats.qcow2.counts import PAGE, Counts
from imgloop.formats.qcow2.entries import (
    COUNTED,
    ENTRY_CODES,
    ROW,
    Rows,
    Walk,
    claims_on,
    entries_of,
    notes_on,
    row_events,
)
from imgloop.formats.qcow2.header import Extension, Header
from imgloop.formats.qcow2.stored import StoredRefcounts
from imgloop.formats.source import Source

_COPIED = schema.L1["copied"].bits
_L1_RESERVED = schema.L1["reserved_high"].bits | schema.L1["reserved_low"].bits
_FLAGS = frozenset(("DATA_COPIED_FLAG",))


class Check:
    """One check of an image, which must stay open while it is read from.

    `failure` is why the check was aborted (None: it was not; then the totals count), `counts` how many events
    of each code there are.
    """

    def __init__(self, source: Source, header: Header, extensions: list[Extension], bitmaps: list[Bitmap]) -> None:
        self.source, self.header = source, header
        self.layout = Layout(source, header, extensions, bitmaps)
        self.structures = list(self.layout.structures())
        self.failure = next((one.reason for one in self.structures if isinstance(one, Abort)), None)
        self.counts: Tally[str] = Tally(one.code for one in self.structures if isinstance(one, Event))
        self.total = Counts()  # all claims
        self.metadata = Counts()  # of all but guest data
        self.structural = Counts()  # the same, but an L2 table that snapshots share counts once
        # of the active image's uncompressed clusters; without snapshots, what is not metadata is nearly that
        self.data = Counts() if len(self.l1_tables) > 1 else None
        self.clusters = 0  # host clusters that are compared
        self.highest = 0  # the last one that is used
        self._signalled = False
        self._last_notes: tuple[int, Rows] = (-1, np.zeros(0, dtype=ROW))
        self.suspects = np.zeros(0, dtype=np.int64)  # clusters with more claims than a refcount holds
        self._walk_tables()
        self._count_structures()
        if self.failure is None:
            self._count_blocks()
        self._find_overflow()
        if self.failure is None:
            self._compare()
            self._check_flags()

    # --- the totals of qemu-img ---

    @property
    def corruptions(self) -> int:
        """qemu-img's count of corruptions."""
        return total(self.counts, "corruptions")

    @property
    def leaks(self) -> int:
        """qemu-img's count of leaked clusters."""
        return total(self.counts, "leaks")

    @property
    def errors(self) -> int:
        """qemu-img's count of things that it could not check."""
        return total(self.counts, "check-errors")

    def totals(self) -> dict[str, int]:
        """The numbers of qemu-img's JSON, under its keys; those that it leaves out are 0."""
        return {
            "image-end-offset": (self.highest + 1) * self.header.cluster_size,
            "total-clusters": -(-self.header.virtual_size // self.header.cluster_size),
            "allocated-clusters": self.walk.allocated,
            "fragmented-clusters": self.walk.fragmented,
            "compressed-clusters": self.walk.compressed,
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "check-errors": self.errors,
        }

    # --- the first pass ---

    @cached_property
    def maximum(self) -> int:
        """The largest refcount that the image's refcounts hold."""
        return min((1 << (1 << self.header.refcount_order)) - 1, (1 << 63) - 1)

    @cached_property
    def stored(self) -> StoredRefcounts:
        """The refcounts in the file."""
        return StoredRefcounts(self.source, self.header)

    @property
    def l1_tables(self) -> list[L1Table]:
        """The L1 tables that are walked; the active one, if it has entries, is the first."""
        return [one for one in self.structures if isinstance(one, L1Table)]

    def _walk_tables(self) -> None:
        self.slots, self.tables = below(self.source, self.header, self.l1_tables)
        self.walk = Walk(self.layout, self.tables, self.stored, self.total, self.data)
        for batch in l2_batches(self.source, self.header, self.tables):
            self.walk.add(batch)
        self.counts.update({code: times for code, times in self.walk.tally.items() if code in COUNTED})
        reserved = self.slots.entry & _L1_RESERVED != 0
        self._tell("L1_ENTRY_RESERVED_BITS", int(self.slots.views[reserved].sum()))
        self.unaligned = self.tables.offset % self.header.cluster_size != 0
        self._tell("L2_TABLE_UNALIGNED", int(self.tables.named[self.unaligned].sum()))
        # a table starts within the last cluster at the latest
        self.outside = self.tables.offset >= self.layout.end
        self._tell("REGION_PAST_END", int(self.tables.named[self.outside].sum()))
        inside = ~self.outside
        first, last = self._clusters_of(self.tables.offset[inside], self.header.cluster_size)
        self.total.add_runs(first, last - first + 1, self.tables.named[inside])
        self.metadata.add_runs(first, last - first + 1, self.tables.named[inside])
        self.structural.add_runs(first, last - first + 1)
        self.clusters = max(-(-self.layout.end // self.header.cluster_size), self.walk.last + 1, _end_of(last))

    def _clusters_of(self, offset: Numbers, size: Numbers | int) -> tuple[Numbers, Numbers]:
        return offset >> self.header.cluster_bits, offset + size - 1 >> self.header.cluster_bits

    def _tell(self, code: str, times: int) -> None:
        if times:
            self.counts[code] += times

    def _count_structures(self) -> None:
        offsets, sizes = [], []
        bitmaps: Tally[tuple[int, int, str]] = Tally()
        for one in self.structures:
            region = one.region if isinstance(one, L1Table | BitmapTable) else one
            if isinstance(region, Region):
                if self.is_counted(region):
                    offsets.append(region.offset)
                    sizes.append(region.size)
                elif region.size > 0:
                    self.counts["REGION_PAST_END"] += 1
            if isinstance(one, BitmapTable):
                bitmaps[one.offset, one.entries, ""] += 1
        first, last = self._clusters_of(np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64))
        for counts in (self.total, self.metadata, self.structural):
            counts.add_runs(first, last - first + 1)
        self.clusters = max(self.clusters, _end_of(last))
        for key, times in bitmaps.items():
            offset = self.layout.bitmap_clusters(BitmapTable(*key))
            inside = offset < self.layout.end
            self._tell("REGION_PAST_END", times * int(np.count_nonzero(~inside)))
            clusters = offset[inside] >> self.header.cluster_bits
            for counts in (self.total, self.metadata, self.structural):
                counts.add_runs(clusters, np.ones_like(clusters), times)

    def is_counted(self, region: Region) -> bool:
        """Whether a region is counted: QEMU takes sizes for signed, and nothing far past the end."""
        return 0 < region.size < 1 << 63 and not self.layout.past_end(region.offset, region.size)

    # --- refcount blocks ---

    def _count_blocks(self) -> None:
        """The blocks claim their own clusters, in the order of the table; each must be the only user."""
        stored, header = self.stored, self.header
        offset = schema.REFCOUNT_TABLE["offset"].of(stored.table)
        reserved = schema.REFCOUNT_TABLE["reserved"].of(stored.table) != 0
        astray = (offset % header.cluster_size != 0) & ~reserved
        outside = (offset >> header.cluster_bits >= self.clusters) & ~reserved & ~astray
        number = np.flatnonzero((offset != 0) & ~reserved & ~astray & ~outside)
        cluster = (offset[number] >> header.cluster_bits).astype(np.int64)
        counts = offset[number].astype(np.int64) < self.layout.end
        before = self.total.at(cluster)
        order = np.argsort(cluster, kind="stable")
        firsts = np.flatnonzero(np.concatenate(([True], np.diff(cluster[order]) != 0))) if len(order) else order
        rank = np.zeros(len(order), dtype=np.int64)  # which of the blocks at this cluster it is
        rank[order] = np.arange(len(order)) - np.repeat(firsts, np.diff(firsts, append=len(order)))
        refcount = np.minimum(before + np.where(counts, rank + 1, 0), self.maximum)
        self.blocks = {
            "REFTABLE_ENTRY_RESERVED_BITS": (np.flatnonzero(reserved), None),
            "REFBLOCK_UNALIGNED": (np.flatnonzero(astray), None),
            "REFBLOCK_OUTSIDE": (np.flatnonzero(outside), None),
            "REGION_PAST_END": (number[~counts], None),
            "REFBLOCK_SHARED": (number[refcount != 1], refcount[refcount != 1]),
        }
        for code, (found, _) in self.blocks.items():
            self._tell(code, len(found))
        self.block_claims = (number[counts], cluster[counts])
        for tally in (self.total, self.metadata, self.structural):
            tally.add_runs(cluster[counts], np.ones_like(cluster[counts]))

    def _block_events(self) -> Iterator[Event]:
        notes: dict[int, list[tuple[str, int]]] = {}
        for code, (found, refcounts) in self.blocks.items():
            values = [0] * len(found) if refcounts is None else refcounts.tolist()
            for index, value in zip(found.tolist(), values, strict=True):
                notes.setdefault(index, []).append((code, value))
        claimed = dict(zip(*(column.tolist() for column in self.block_claims), strict=True))
        suspicious = set(self.suspects.tolist())
        visited = set(notes) | {index for index, cluster in claimed.items() if cluster in suspicious}
        for index in sorted(visited):
            if index in claimed:
                yield from self._overflowing(claimed[index], claimed[index])
            for code, value in notes.get(index, ()):
                if code == "REGION_PAST_END":
                    offset = schema.REFCOUNT_TABLE["offset"].of(int(self.stored.table[index]))
                    yield Event(code, (offset, self.header.cluster_size))
                else:
                    yield Event(code, (index, value)[: len(RULES[code].fields)])

    # --- overflow: which claim was one too many depends on the order of all ---

    def _find_overflow(self) -> None:
        """Clusters that are claimed more often than a refcount can say."""
        found = []
        for page in self.total.pages(self.clusters) if self.maximum < 1 << 32 else ():
            pieces = self.total.flat(page)
            if pieces is not None and max(level for _, _, level in pieces) <= self.maximum:
                continue
            counts = self.total.window(page)
            over = np.flatnonzero(counts > self.maximum)
            if len(over):
                found.append(over + page * PAGE)
                self.counts["REFCOUNT_OVERFLOW"] += int((counts[over] - self.maximum).sum())
        if found:
            self.suspects = np.concatenate(found)
            self._seen: Tally[int] = Tally()
            bit = np.uint32(1 << ENTRY_CODES.index("REFCOUNT_OVERFLOW"))
            for batch in l2_batches(self.source, self.header, self.tables):
                claims = claims_on(self.layout, batch, self.suspects)
                self.walk.noted[np.unique(claims["table"])] |= bit

    def notes(self, table: int) -> Rows:
        """What is wrong with the entries of an L2 table, and which of them claim a cluster too many."""
        if self._last_notes[0] != table:
            self._last_notes = (table, notes_on(self.walk, table, self.suspects))
        return self._last_notes[1]

    def tables_with(self, codes: frozenset[str]) -> NDArray[np.bool_]:
        """The L2 tables with notes of some codes."""
        bits = sum(1 << number for number, code in enumerate(ENTRY_CODES) if code in codes)
        found: NDArray[np.bool_] = self.walk.noted & np.uint32(bits) != 0
        return found

    def _overflowing(self, first: int, last: int) -> Iterator[Event]:
        """The events of a claim on clusters first to last, if any of them has had too many."""
        if not len(self.suspects):
            return
        low, high = np.searchsorted(self.suspects, (first, last + 1))
        for cluster in self.suspects[low:high].tolist():
            self._seen[cluster] += 1
            if self._seen[cluster] > self.maximum:
                yield Event("REFCOUNT_OVERFLOW", (cluster << self.header.cluster_bits,))

    # --- the comparison with the stored refcounts ---

    def _pages(self) -> list[int]:
        """The pages of clusters in which anything is claimed, stored, or unreadable."""
        stored = self.stored
        index = np.flatnonzero((stored.rows != 0) | stored.unreadable)
        index = index[index * stored.per_block < self.clusters]
        first = index * stored.per_block // PAGE
        last = np.minimum((index + 1) * stored.per_block, self.clusters) - 1
        pages = set(self.total.pages(self.clusters))
        for start, stop in set(zip(first.tolist(), (last // PAGE).tolist(), strict=True)):
            pages.update(range(start, stop + 1))
        return sorted(pages)

    def _columns(self, page: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.bool_]]:
        """Of each cluster of a page: the stored refcount, the claims, and whether the refcount is readable."""
        first, end = page * PAGE, min((page + 1) * PAGE, self.clusters)
        window = self.stored.window(first, end)
        stored = np.zeros(end - first, dtype=np.uint64) if window is None else window.astype(np.uint64)
        claims = np.minimum(self.total.window(page)[: end - first], self.maximum)
        return stored, claims.astype(np.uint64), self.stored.readable(np.arange(first, end))

    def _agrees(self, page: int) -> bool:
        """Whether a page is simple, and all is well in it, by a short look."""
        pieces = self.total.flat(page)
        if pieces is None or self.stored.unreadable.any():
            return False
        first, end = page * PAGE, min((page + 1) * PAGE, self.clusters)
        window = self.stored.window(first, end)
        for start, stop, level in pieces:
            if start >= end - first:
                break
            refcount = min(level, self.maximum)
            self.at_most_one &= level <= 1
            if window is None:
                if refcount:
                    return False
            elif not (window[start:stop] == refcount).all():
                return False
        return True

    def _compare(self) -> None:
        self.differing: list[int] = []  # pages
        self.at_most_one = (
            not self.stored.unreadable.any()
        )  # whether no cluster has two claims, as far as is known
        pages = self._pages()
        for page in pages:
            if self._agrees(page):
                continue
            self.at_most_one = False
            stored, claims, readable = self._columns(page)
            low, leaked = (stored < claims) & readable, (stored > claims) & readable
            self._tell("REFCOUNT_TOO_LOW", int(np.count_nonzero(low)))
            self._tell("CLUSTER_LEAKED", int(np.count_nonzero(leaked)))
            self._tell("REFCOUNT_UNREADABLE", int(np.count_nonzero(~readable)))
            if low.any() or leaked.any() or not readable.all():
                self.differing.append(page)
        for page in reversed(pages):
            stored, claims, readable = self._columns(page)
            used = np.flatnonzero(((stored != 0) | (claims != 0)) & readable)
            if len(used):
                self.highest = page * PAGE + int(used[-1])
                break

    def _comparison_events(self) -> Iterator[Event]:
        for page in self.differing:
            stored, claims, readable = self._columns(page)
            where = np.flatnonzero((stored != claims) | ~readable)
            rows = (where + page * PAGE, stored[where], claims[where], readable[where])
            for cluster, refcount, reference, known in zip(*(row.tolist() for row in rows), strict=True):
                if not known:
                    yield from self._signal(cluster)
                    yield Event("REFCOUNT_UNREADABLE", (cluster,))
                else:
                    code = "REFCOUNT_TOO_LOW" if refcount < reference else "CLUSTER_LEAKED"
                    yield Event(code, (cluster, refcount, reference))

    def _signal(self, cluster: int) -> Iterator[Event]:
        """QEMU's words when it first looks for a refcount below a table entry that is not aligned."""
        index = cluster // self.stored.per_block
        if not self._signalled and index < len(self.stored.table) and self.stored.unaligned[index]:
            self._signalled = True
            offset = schema.REFCOUNT_TABLE["offset"].of(int(self.stored.table[index]))
            yield Event("REFBLOCK_SIGNAL", (offset, f"{index:#x}" if index else "0"))

    # --- COPIED flags ---

    def _check_flags(self) -> None:
        """The active L1 table's own flags; those of L2 entries were looked at in the walk."""
        cluster = self.tables.offset >> self.header.cluster_bits
        readable = self.stored.readable(cluster)
        self.table_refcounts = self.stored.at(cluster).astype(np.uint64)
        slots = np.flatnonzero(self.slots.active)
        table = self.slots.table[slots]
        looked_at = (self.tables.offset[table] != 0) & readable[table]
        copied = self.slots.entry[slots] & _COPIED != 0
        wrong = looked_at & ((self.table_refcounts[table] == 1) != copied)
        self._tell("L2_COPIED_FLAG", int(np.count_nonzero(wrong)))
        self.flagged = slots[wrong]  # slots with a wrong flag of their own
        self.walk.compare_run_flags(not self.differing and self.at_most_one)
        self._tell("DATA_COPIED_FLAG", self.walk.tally["DATA_COPIED_FLAG"])

    def _flag_events(self) -> Iterator[Event]:
        if not self.slots.active.any():
            return
        visited = np.zeros(len(self.slots.entry), dtype=bool)
        visited[self.flagged] = True
        own = visited.copy()
        noted = self.tables_with(_FLAGS)
        visited |= noted[self.slots.table]
        if not self._signalled and self.stored.unaligned[self.clusters // self.stored.per_block :].any():
            visited[:] = True  # any look-up past the end of the file may be the one that QEMU complains of
        base = self.l1_tables[0].offset
        for slot in np.flatnonzero(visited & self.slots.active).tolist():
            l1_index, table = (int(self.slots.position[slot]) - base) // 8, int(self.slots.table[slot])
            if not self._signalled and visited.all():
                yield from self._look_ups(table)
            if own[slot]:
                values = (l1_index, int(self.slots.entry[slot]), int(self.table_refcounts[table]))
                yield Event("L2_COPIED_FLAG", values, 0, l1_index)
            if noted[table]:
                yield from row_events(self.notes(table), _FLAGS, 0, l1_index)

    def _look_ups(self, table: int) -> Iterator[Event]:
        """The complaint of QEMU's look-ups for a table and what it names, if they are the first to meet one."""
        if not self.tables.offset[table]:
            return
        yield from self._signal(int(self.tables.offset[table]) >> self.header.cluster_bits)
        if not self.walk.flagged[table] or self.header.has_data_file:
            return
        for batch in l2_batches(self.source, self.header, self.tables, np.array([table])):
            entries = entries_of(self.layout, batch)
            clusters = entries.offset[entries.normal] >> self.header.cluster_bits
            for cluster in clusters[~self.stored.readable(clusters)][:1].tolist():
                yield from self._signal(cluster)

    # --- the second pass ---

    def events(self) -> Iterator[Event]:
        """All that QEMU says, in its order."""
        self._signalled = False
        if len(self.suspects):
            self._seen.clear()
        for one in self.structures:
            if isinstance(one, Abort):
                return
            yield from self._structure_events(one)
        yield from self._block_events()
        yield from self._comparison_events()
        yield from self._flag_events()

    def _structure_events(self, one: Structure) -> Iterator[Event]:
        if isinstance(one, Event):
            yield one
        elif isinstance(one, Region):
            yield from self._region_events(one)
        elif isinstance(one, BitmapTable):
            yield from self._region_events(one.region)
            for offset in self.layout.bitmap_clusters(one).tolist():
                yield from self._region_events(Region("bitmap", offset, self.header.cluster_size))
        elif isinstance(one, L1Table):
            yield from self._region_events(one.region)
            yield from self._below(one)

    def _region_events(self, region: Region, view: int = -1, l1_index: int = -1) -> Iterator[Event]:
        if self.is_counted(region):
            bits = self.header.cluster_bits
            yield from self._overflowing(region.offset >> bits, region.offset + region.size - 1 >> bits)
        elif region.size > 0:
            yield Event("REGION_PAST_END", (region.offset, region.size), view, l1_index)

    @cached_property
    def _noted(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which L2 tables QEMU has something to say of, and which slots lead to such."""
        tables = self.unaligned | self.outside | self.tables_with(COUNTED)
        if len(self.suspects):
            first, last = self._clusters_of(self.tables.offset, self.header.cluster_size)
            tables |= np.searchsorted(self.suspects, first) < np.searchsorted(self.suspects, last, side="right")
        return tables, tables[self.slots.table] | (self.slots.entry & _L1_RESERVED != 0)

    def _below(self, l1: L1Table) -> Iterator[Event]:
        tables, slots = self._noted
        entries = self.tables_with(COUNTED)
        part = self.slots.of(l1)
        for slot in (np.flatnonzero(slots[part]) + part.start).tolist():
            index = (int(self.slots.position[slot]) - l1.offset) // 8
            entry, table = int(self.slots.entry[slot]), int(self.slots.table[slot])
            if entry & _L1_RESERVED:
                yield Event("L1_ENTRY_RESERVED_BITS", (entry,), l1.view, index)
            if not tables[table]:
                continue
            offset = int(self.tables.offset[table])
            yield from self._region_events(Region("L2 table", offset, self.header.cluster_size), l1.view, index)
            if self.unaligned[table]:
                yield Event("L2_TABLE_UNALIGNED", (offset,), l1.view, index)
            if not entries[table]:
                continue
            for event in row_events(self.notes(table), COUNTED, l1.view, index):
                if event.code == "REFCOUNT_OVERFLOW":
                    (cluster,) = event.values
                    for overflow in self._overflowing(int(cluster), int(cluster)):
                        yield event._replace(values=overflow.values)
                else:
                    yield event


def _end_of(last: Numbers) -> int:
    return int(last.max()) + 1 if len(last) else 0
