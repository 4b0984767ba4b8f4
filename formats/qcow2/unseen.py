"""What qemu-img passes as clean: damages that its counts cannot show, found from the same claims."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.findings import Event
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.bitmaps import bitmap_extension
from imgloop.formats.qcow2.check import Check
from imgloop.formats.qcow2.claims import BitmapTable, L1Table, Numbers, Region, l2_batches
from imgloop.formats.qcow2.counts import PAGE
from imgloop.formats.qcow2.entries import claims_on, row_events

ROW_CODES = frozenset(("ZERO_FLAG_IN_V2", "DATA_FILE_OFFSET", "DATA_TRUNCATED"))


class Unseen:
    """What is wrong with a checked image beyond what qemu-img says.

    `counts` is how many events of each code there are; `events` yields them, those of one code together.
    `data_size` is the length of the data file (bytes), None where the image has none.
    """

    def __init__(self, check: Check, data_size: int | None = None) -> None:
        self.check = check
        self.few = [
            *self._header(),
            *self._not_followed(),
            *self._bitmaps(),
            *self._truncated(),
            *self._data_file(data_size),
        ]
        if check.failure is None:
            self.few += self._past_end()
            self._find_overlaps()
        else:
            empty = np.zeros(0, dtype=np.int64)
            self.shared, self.overlaps, self.tables = (empty, empty), (empty, empty), (empty, empty)
            self.intruders = empty
        self.counts: Tally[str] = Tally(event.code for event in self.few)
        for code, found in (
            ("CLUSTER_SHARED", self.shared[0]),
            ("DATA_IN_METADATA", self.intruders),
            ("METADATA_OVERLAP", self.overlaps[0]),
            ("L2_TABLE_SHARED", self.tables[0]),
        ):
            if len(found):
                self.counts[code] = len(found)
        for code in ROW_CODES:
            if check.walk.tally[code]:
                self.counts[code] = check.walk.tally[code]

    def events(self) -> Iterator[Event]:
        """All findings of our own."""
        yield from self.few
        size = self.check.header.cluster_size
        for cluster, claims in zip(*(column.tolist() for column in self.shared), strict=True):
            yield Event("CLUSTER_SHARED", (cluster * size, claims))
        for cluster in self.intruders.tolist():
            yield Event("DATA_IN_METADATA", (cluster * size,))
        for cluster, claims in zip(*(column.tolist() for column in self.overlaps), strict=True):
            yield Event("METADATA_OVERLAP", (cluster * size, claims))
        for offset, entries in zip(*(column.tolist() for column in self.tables), strict=True):
            yield Event("L2_TABLE_SHARED", (offset, entries))
        yield from self._row_events()

    def _row_events(self) -> Iterator[Event]:
        check = self.check
        noted = check.tables_with(ROW_CODES)
        for slot in np.flatnonzero(noted[check.slots.table] & check.slots.active).tolist():
            l1_index = (int(check.slots.position[slot]) - check.l1_tables[0].offset) // 8
            yield from row_events(check.notes(int(check.slots.table[slot])), ROW_CODES, 0, l1_index)

    # --- the header and what it leads to ---

    def _header(self) -> Iterator[Event]:
        header = self.check.header
        if header.incompatible_features & schema.CORRUPT:
            yield Event("CORRUPT")
        if header.incompatible_features & schema.DIRTY:
            yield Event("DIRTY")

    def _not_followed(self) -> Iterator[Event]:
        tables = int(np.count_nonzero(~self.check.tables.followed))
        if tables:
            yield Event("L2_TABLES_NOT_FOLLOWED", (tables,))

    def _bitmaps(self) -> Iterator[Event]:
        layout = self.check.layout
        extension = bitmap_extension(layout.extensions)
        trusted = layout.header.autoclear_features & schema.BITMAPS
        if trusted and extension is None:
            yield Event("AUTOCLEAR_WITHOUT_EXTENSION")
        if extension is not None and not trusted:
            yield Event("BITMAPS_STALE")
        for bitmap in layout.bitmaps:
            if bitmap.in_use:
                yield Event("BITMAP_IN_USE", (bitmap.name,))

    def _truncated(self) -> Iterator[Event]:
        """Tables that the file's end cuts: less than a cluster is missing, or QEMU would say so."""
        check = self.check
        size, length = check.header.cluster_size, check.source.size
        for one in check.structures:
            region = one.region if isinstance(one, L1Table | BitmapTable) else one
            if isinstance(region, Region) and region.kind != "header" and 0 < region.size < 1 << 63:
                end = region.offset + region.size
                if end > length and not check.layout.past_end(region.offset, region.size):
                    yield Event("METADATA_TRUNCATED", (region.kind, region.offset, region.size))
        offset = check.tables.offset
        for table in offset[(offset < check.layout.end) & (offset + size > length)].tolist():
            yield Event("METADATA_TRUNCATED", ("L2 table", table, size))

    def _data_file(self, data_size: int | None) -> Iterator[Event]:
        if data_size is not None:
            needed = min(self.check.walk.data_end, self.check.header.virtual_size)
            if data_size < needed:
                yield Event("DATA_FILE_SHORT", (data_size, needed))

    def _past_end(self) -> Iterator[Event]:
        check, stored = self.check, self.check.stored
        first = check.clusters // stored.per_block
        used = stored.used()[first:]
        if not used.any():
            return
        start = check.clusters - first * stored.per_block  # within the block that the file ends in
        before = stored.window(first * stored.per_block, check.clusters) if start else None
        total = int(used.sum()) - (0 if before is None else int(np.count_nonzero(before)))
        for index in (np.flatnonzero(used) + first).tolist():
            found = stored.first_used(index, start if index == first else 0)
            if found is not None:
                yield Event("REFCOUNT_PAST_END", (total, index * stored.per_block + found))
                return

    # --- clusters with users that cannot go together ---

    def _find_overlaps(self) -> None:
        check = self.check
        shared, intruders, overlaps, claims = [], [], [], []
        for page in check.total.pages(check.clusters):
            pieces = check.total.flat(page)
            if pieces is not None and max(level for _, _, level in pieces) <= 1:
                continue
            total = check.total.window(page)
            if total.max() <= 1:
                continue
            metadata, structural = check.metadata.window(page), check.structural.window(page)
            base = page * PAGE
            intruders.append(np.flatnonzero((metadata > 0) & (total > metadata)) + base)
            over = np.flatnonzero(structural > 1)
            overlaps.append(over + base)
            claims.append(structural[over])
            mine = total - metadata if check.data is None else check.data.window(page)
            shared.append(np.flatnonzero(mine > 1) + base)
        self.intruders = _joined(intruders)
        self.overlaps = (_joined(overlaps), _joined(claims))
        self.shared = self._really_shared(_joined(shared))
        several = check.tables.active > 1
        self.tables = (check.tables.offset[several], check.tables.active[several])

    def _really_shared(self, clusters: Numbers) -> tuple[Numbers, Numbers]:
        """Of these clusters, those that the active image uses more than once, not only for compressed data."""
        check = self.check
        if not len(clusters):
            return clusters, clusters
        plain, packed = np.zeros_like(clusters), np.zeros_like(clusters)
        tables = np.flatnonzero(check.tables.active > 0)
        for batch in l2_batches(check.source, check.header, check.tables, tables):
            rows = claims_on(check.layout, batch, clusters)
            at = np.searchsorted(clusters, rows["first"].astype(np.int64))
            compressed = schema.L2["compressed"].of(rows["second"]) != 0
            times = check.tables.active[rows["table"]]
            np.add.at(packed, at[compressed], times[compressed])
            np.add.at(plain, at[~compressed], times[~compressed])
        several = (plain > 1) | ((plain > 0) & (packed > 0))
        return clusters[several], (plain + packed)[several]


def _joined(parts: list[NDArray[np.int64]]) -> Numbers:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
