"""All refcounts of an image at once, as the file stores them, for checks.

Each refcount block is read once, however many entries of the refcount table name it, and blocks in holes of the
file, or past its end, are not read at all: memory goes by what the file really holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.header import Header
from imgloop.formats.qcow2.refcounts import entries_per_block, refcount_table
from imgloop.formats.source import Source

READ_LIMIT = (1 << 63) - (1 << 30)  # bytes; QEMU reads nothing past it
BATCH = 1 << 20  # bytes read at a time

Refcounts = NDArray[np.unsignedinteger]

_NARROWEST = (np.uint8, np.uint16, np.uint32, np.uint64)


def holding_data(source: Source, offsets: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """Which of the ranges [offset, offset + size) hold anything but holes; `offsets` are sorted.

    Where the file is not sparse beyond doubt, all within it are said to.
    """
    length = source.size
    inside = offsets < length
    if not inside.any() or len(offsets) * size <= source.allocated:
        return inside
    low, high = int(offsets[0]), int(offsets[inside][-1]) + size
    ranges = np.array(list(source.data_ranges(low, high)), dtype=np.int64).reshape(-1, 2)
    if not len(ranges):
        return np.zeros(len(offsets), dtype=bool)
    # the first piece of data that ends behind the offset: does it begin before the range's end?
    at = np.searchsorted(ranges[:, 1], offsets, side="right")
    starts = np.append(ranges[:, 0], np.iinfo(np.int64).max)[at]
    return inside & (starts < offsets + size)


class StoredRefcounts:
    """The refcounts that the blocks hold.

    `table` is the refcount table as stored. `unaligned` and `unreadable` say of each of its entries whether
    QEMU fails to look up the refcounts below it: because the offset is not a cluster's start, or for any reason.
    """

    def __init__(self, source: Source, header: Header) -> None:
        self.table = refcount_table(source, header)
        self.per_block = entries_per_block(header)
        self._shift = self.per_block.bit_length() - 1
        offsets = schema.REFCOUNT_TABLE["offset"].of(self.table)
        self.unaligned = offsets % header.cluster_size != 0
        self.unreadable = self.unaligned | (offsets > np.uint64(READ_LIMIT - header.cluster_size))
        readable = (offsets != 0) & ~self.unreadable
        unique = np.unique(offsets[readable]).astype(np.int64)
        unique = unique[holding_data(source, unique, header.cluster_size)]
        # a row for each block that may hold something; row 0 is the block of zeros
        self._blocks = _read_blocks(source, header, unique, self.per_block)
        self._flat = self._blocks.reshape(-1)
        self.rows = np.zeros(len(offsets), dtype=np.int64)
        if len(unique):
            at = np.minimum(np.searchsorted(unique, offsets.astype(np.int64)), len(unique) - 1)
            named = readable & (unique[at] == offsets.astype(np.int64))
            self.rows[named] = at[named] + 1

    @property
    def clusters(self) -> int:
        """How many clusters the refcount table reaches."""
        return len(self.table) * self.per_block

    def at(self, clusters: NDArray[np.int64]) -> Refcounts:
        """The refcounts of some clusters; 0 past the reach of the table, and where they are unreadable."""
        index = clusters >> self._shift
        reached = index < len(self.rows)
        if not reached.all():
            found = np.zeros(len(clusters), dtype=self._flat.dtype)
            found[reached] = self.at(clusters[reached])
            return found
        if not len(clusters):
            return np.zeros(0, dtype=self._flat.dtype)
        place = (self.rows[index] << self._shift) + (clusters & (self.per_block - 1))
        refcounts: Refcounts = self._flat[place]
        return refcounts

    def readable(self, clusters: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the clusters have a refcount that can be looked up."""
        if not self.unreadable.any():
            return np.ones(len(clusters), dtype=bool)
        index = np.minimum(clusters >> self._shift, len(self.rows) - 1)
        lost: NDArray[np.bool_] = self.unreadable[index] & (clusters < self.clusters)
        return ~lost

    def window(self, first: int, end: int) -> Refcounts | None:
        """The refcounts of clusters [first, end); None where all are 0."""
        low, high = first >> self._shift, -(-end // self.per_block)
        rows = self.rows[low:high]
        if not rows.any():
            return None
        if low + 1 == high or (len(rows) == high - low and (np.diff(rows) == 1).all()):
            # blocks that are neighbours in memory too: no copy
            start = (int(rows[0]) << self._shift) + first - (low << self._shift)
            return self._flat[start : start + end - first]
        padded = np.zeros(high - low, dtype=np.int64)
        padded[: len(rows)] = rows
        start = first - (low << self._shift)
        return self._blocks[padded].reshape(-1)[start : start + end - first]

    def used(self) -> NDArray[np.int64]:
        """How many refcounts are not 0, below each entry of the table."""
        used: NDArray[np.int64] = np.count_nonzero(self._blocks, axis=1)[self.rows]
        return used

    def first_used(self, index: int, start: int = 0) -> int | None:
        """The first refcount that is not 0 below table entry `index`, from `start` on; None where all are."""
        found = np.flatnonzero(self._blocks[self.rows[index]][start:])
        return start + int(found[0]) if len(found) else None


def _read_blocks(source: Source, header: Header, offsets: NDArray[np.int64], per_block: int) -> Refcounts:
    """Row n + 1 is the block at offsets[n], in the narrowest integers that hold all of them; row 0 is zeros."""
    size = header.cluster_size
    blocks: Refcounts = np.zeros((len(offsets) + 1, per_block), dtype=np.uint8)
    step = max(1, BATCH // size)
    buffer = memoryview(bytearray(min(step, max(1, len(offsets))) * size))
    for first in range(0, len(offsets), step):
        some = offsets[first : first + step]
        read_all(source, some, size, buffer)
        decoded = decode(buffer[: len(some) * size], header.refcount_order)
        if decoded.itemsize > blocks.itemsize:
            blocks = blocks.astype(decoded.dtype)
        blocks[first + 1 : first + 1 + len(some)] = decoded.reshape(-1, per_block)
    return blocks


def read_all(source: Source, offsets: NDArray[np.int64], size: int, buffer: memoryview) -> None:
    """`size` bytes from each offset, one after the other; neighbours in the file are read at once."""
    breaks = np.flatnonzero(np.diff(offsets) != size) + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(offsets)], strict=True):
        source.readinto(buffer[start * size : end * size], int(offsets[start]))


def decode(data: memoryview, order: int) -> Refcounts:
    """The refcounts of 2^order bits in `data`, in the narrowest integers that hold them."""
    if order >= 3:
        width = 1 << order - 3
        words = np.frombuffer(data, dtype=f">u{width}")
        parts = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
        if not parts[:, :-1].any():
            return parts[:, -1]
        most = int(words.max())
        return words.astype(next(kind for kind in _NARROWEST if most <= np.iinfo(kind).max))
    columns = schema.refcounts(order)
    units = np.frombuffer(data, dtype=np.uint8)
    fields = [(units >> columns[name].shift) & columns[name].mask for name in _in_order(order)]
    return np.stack(fields, axis=1).reshape(-1)


def _in_order(order: int) -> list[str]:
    return [str(number) for number in range(8 >> order)]
