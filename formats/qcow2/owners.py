"""Who claims a host cluster: every structure, table and entry of an image that leads to it.

The claims are not kept while they are counted, for there may be hundreds of millions of them; for the few
clusters that somebody asks about, the tables are walked once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.findings import RULES, Event, Finding, Owner
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.check import Check
from imgloop.formats.qcow2.claims import BitmapTable, L1Table, Numbers, Region, l2_batches
from imgloop.formats.qcow2.entries import claims_on

MOST = 64  # owners that are named of one cluster

_OFFSET = schema.L2["offset"].bits


class Owners:
    """The owners of the host clusters of a checked image."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.size = check.header.cluster_size
        self.names = ["active"] + [snapshot.name or snapshot.id for snapshot in check.layout.snapshots]
        tables = check.l1_tables
        self.views = np.array([table.view for table in tables], dtype=np.int64)
        self.starts = np.array([table.offset for table in tables], dtype=np.int64)
        self.ends = self.starts + np.array([table.entries for table in tables], dtype=np.int64) * schema.L1.size

    def of(self, clusters: NDArray[np.int64]) -> dict[int, list[Owner]]:
        """The owners of each cluster (by its number), structures first; at most `MOST` each."""
        wanted = np.unique(clusters)
        found: dict[int, list[Owner]] = {int(cluster): [] for cluster in wanted}
        if len(wanted):
            for source in (self._structures, self._blocks, self._l2_tables, self._entries):
                for cluster, owner in source(wanted):
                    if len(found[cluster]) < MOST:
                        found[cluster].append(owner)
        return found

    def _structures(self, wanted: Numbers) -> Iterator[tuple[int, Owner]]:
        for one in self.check.structures:
            region = one.region if isinstance(one, L1Table | BitmapTable) else one
            if isinstance(region, Region) and self.check.is_counted(region):
                view = self.names[one.view] if isinstance(one, L1Table) else None
                owner = Owner(region.kind, (region.offset, region.size), view, name=region.name)
                for cluster in self._within(wanted, region.offset, region.size):
                    yield cluster, owner
            if isinstance(one, BitmapTable):
                for offset in self.check.layout.bitmap_clusters(one).tolist():
                    for cluster in self._within(wanted, offset, self.size):
                        yield cluster, Owner("bitmap", (offset, self.size), name=one.name)

    def _within(self, wanted: Numbers, offset: int, size: int) -> list[int]:
        """Those of the wanted clusters that a region touches."""
        low = np.searchsorted(wanted, offset // self.size)
        high = np.searchsorted(wanted, (offset + size - 1) // self.size, side="right")
        found: list[int] = wanted[low:high].tolist()
        return found

    def _blocks(self, wanted: Numbers) -> Iterator[tuple[int, Owner]]:
        if self.check.failure is not None:
            return
        numbers, clusters = self.check.block_claims
        hit = np.isin(clusters, wanted)
        for number, cluster in zip(numbers[hit].tolist(), clusters[hit].tolist(), strict=True):
            yield cluster, Owner("refcount block", (cluster * self.size, self.size), name=f"{number}")

    def _l2_tables(self, wanted: Numbers) -> Iterator[tuple[int, Owner]]:
        offset = self.check.tables.offset
        first, last = offset // self.size, (offset + self.size - 1) // self.size
        inside = np.searchsorted(wanted, first) < np.searchsorted(wanted, last, side="right")
        for table in np.flatnonzero(inside & ~self.check.outside).tolist():
            at = int(offset[table])
            span = self.size * self.check.header.l2_entries
            for view, l1_index in self.entries_naming(table):
                guest = (l1_index * span, span)
                owner = Owner("L2 table", (at, self.size), self.names[view], l1_index, guest=guest)
                for cluster in self._within(wanted, at, self.size):
                    yield cluster, owner

    def entries_naming(self, table: int) -> Iterator[tuple[int, int]]:
        """View and L1 index of the entries that name an L2 table (its number); at most `MOST`."""
        count = 0
        for slot in np.flatnonzero(self.check.slots.table == table).tolist():
            position = int(self.check.slots.position[slot])
            for l1 in np.flatnonzero((self.starts <= position) & (position < self.ends)).tolist():
                yield int(self.views[l1]), (position - int(self.starts[l1])) // schema.L1.size
                count += 1
                if count == MOST:
                    return

    def _entries(self, wanted: Numbers) -> Iterator[tuple[int, Owner]]:
        check = self.check
        per_table = check.header.l2_entries
        packed = schema.compressed(check.header.cluster_bits)
        left = dict.fromkeys(wanted.tolist(), MOST)
        for batch in l2_batches(check.source, check.header, check.tables):
            for table, index, _, cluster, word in claims_on(check.layout, batch, wanted).tolist():
                if not left[cluster]:
                    continue
                left[cluster] -= 1
                if word & schema.L2["compressed"].bits:
                    offset = packed["host_offset"].of(word)
                    kind = "compressed cluster"
                    host = (offset, (packed["sectors"].of(word) + 1) * 512 - offset % 512)
                else:
                    kind, host = "data cluster", (word & _OFFSET, self.size)
                l2_table = int(check.tables.offset[table])
                for view, l1_index in self.entries_naming(table):
                    guest = ((l1_index * per_table + index) * self.size, self.size)
                    yield (
                        cluster,
                        Owner(kind, host, self.names[view], l1_index, l2_table, index, guest=guest),
                    )

    # --- findings ---

    def findings(self, events: list[Event]) -> list[Finding]:
        """Events with their host range, guest ranges and owners looked up."""
        ranges = [self._host_range(event) for event in events]
        last = self.check.clusters
        clusters = {span[0] // self.size for span in ranges if span and span[0] // self.size <= last}
        owners = self.of(np.array(sorted(clusters), dtype=np.int64))
        found = []
        for event, span in zip(events, ranges, strict=True):
            rule = RULES[event.code]
            mine = tuple(owners.get(span[0] // self.size, ()) if span else ())
            guest = self._guest_ranges(event, mine)
            values: dict[str, Any] = dict(zip(rule.fields, event.values, strict=False))
            values |= {
                name: value
                for name, value in (("l1_index", event.l1_index), ("l2_index", event.l2_index))
                if value >= 0
            }
            if event.view >= 0:
                values["view"] = self.names[event.view]
            found.append(Finding(rule, event.text or rule.title, values, span, guest, mine))
        return found

    def _host_range(self, event: Event) -> tuple[int, int] | None:
        """The host bytes that an event speaks of; None where it speaks of none."""
        values = dict(zip(RULES[event.code].fields, event.values, strict=False))
        if "cluster" in values:
            return int(values["cluster"]) * self.size, self.size
        if "offset" in values:
            return int(values["offset"]), int(values.get("size", self.size))
        if "entry" in values and event.code != "SNAPSHOT_ENTRY_INCOMPLETE":
            offset = int(values["entry"]) & _OFFSET
            return (offset, self.size) if offset else None
        if event.code.startswith("REFBLOCK") and "index" in values:
            word = int(self.check.stored.table[int(values["index"])])
            return schema.REFCOUNT_TABLE["offset"].of(word), self.size
        return None

    def _guest_ranges(self, event: Event, owners: tuple[Owner, ...]) -> tuple[tuple[int, int], ...]:
        """The ranges of the active image that an event concerns, no longer than the disk."""
        per_table = self.check.header.l2_entries
        if event.view == 0 and event.l2_index >= 0:
            ranges = [((event.l1_index * per_table + event.l2_index) * self.size, self.size)]
        elif event.view == 0 and event.l1_index >= 0:
            ranges = [(event.l1_index * per_table * self.size, per_table * self.size)]
        else:
            mine = [owner for owner in owners if owner.guest and owner.view == "active"]
            data = [owner for owner in mine if owner.l2_index is not None]  # without them, tables stand for theirs
            ranges = [owner.guest for owner in data or mine if owner.guest]
        end = self.check.header.virtual_size
        return tuple((start, min(length, end - start)) for start, length in dict.fromkeys(ranges) if start < end)
