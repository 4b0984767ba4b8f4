"""Decoding every compressed cluster of an image: the only way to know whether they can be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from imgloop.formats.errors import CorruptError, ReadError
from imgloop.formats.findings import Event
from imgloop.formats.qcow2.check import Check
from imgloop.formats.qcow2.claims import Numbers, l2_batches
from imgloop.formats.qcow2.entries import counted_streams, entries_of, streams

CHUNK = 64  # streams that a thread takes at a time

Decode = Callable[[int, int], bytes]  # host offset and length of a stream (bytes) to its cluster
Progress = Callable[[int, int], None]  # clusters decoded, and clusters in all


def decode_all(check: Check, decode: Decode, progress: Progress | None = None) -> list[Event]:
    """Decode all compressed clusters, of snapshots too, in threads; an event for each that cannot be.

    A stream that several entries name is decoded once, and reported for the first of them.
    """
    offset, size, table, index = _all_streams(check)
    events: list[Event] = []
    starts = range(0, len(offset), CHUNK)

    def work(start: int) -> list[tuple[int, str]]:
        part = slice(start, start + CHUNK)
        return list(_failures(decode, offset[part].tolist(), size[part].tolist(), start))

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for start, failed in zip(starts, pool.map(work, starts), strict=True):
            for number, reason in failed:
                events.append(_event(check, int(offset[number]), int(table[number]), int(index[number]), reason))
            if progress:
                progress(min(start + CHUNK, len(offset)), len(offset))
    return events


def _all_streams(check: Check) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Host offset and length of each stream, and the first L2 table and entry that name it; by offset."""
    found = [np.zeros((0, 4), dtype=np.int64)]
    for batch in l2_batches(check.source, check.header, check.tables):
        entries = entries_of(check.layout, batch)
        entries = entries.pick(counted_streams(entries, check.layout))
        offset, size = streams(check.layout, entries)
        found.append(np.stack((offset, size, entries.table, entries.index), axis=1))
    rows = np.concatenate(found)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    distinct = np.ones(len(rows), dtype=bool)
    distinct[1:] = (rows[1:, :2] != rows[:-1, :2]).any(axis=1)
    rows = rows[distinct]
    return rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3]


def _failures(decode: Decode, offsets: list[int], sizes: list[int], start: int) -> Iterator[tuple[int, str]]:
    for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True), start):
        try:
            decode(offset, size)
        except (CorruptError, ReadError) as error:
            yield number, error.message


def _event(check: Check, offset: int, table: int, index: int, reason: str) -> Event:
    from imgloop.formats.qcow2.owners import Owners

    view, l1_index = next(Owners(check).entries_naming(table))
    header = check.header
    guest = (l1_index * header.l2_entries + index) * header.cluster_size
    return Event("COMPRESSED_DAMAGED", (offset, guest, reason), view, l1_index, index)
