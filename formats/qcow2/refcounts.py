"""The refcount table and its blocks, read as numpy arrays (specification: section "Host cluster management")."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.errors import CorruptError, Where
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.header import Header
from imgloop.formats.source import Source


def refcount_table(source: Source, header: Header) -> NDArray[np.uint64]:
    """The refcount table's entries, as stored: one 64-bit word for each refcount block."""
    size = header.refcount_table_clusters * header.cluster_size
    return schema.REFCOUNT_TABLE.table(source.pread(size, header.refcount_table_offset)).entries[:, 0]


def entries_per_block(header: Header) -> int:
    """Refcounts in one refcount block, which has one cluster."""
    return header.cluster_size * 8 >> header.refcount_order


def decode_refcounts(data: bytes, order: int) -> NDArray[np.uint64]:
    """The refcounts of 2^order bits in `data` (whole bytes), in the order of the clusters they count."""
    columns = schema.refcounts(order)
    table = columns.table(data)
    return np.stack([table[str(n)] for n in range(len(list(columns)))], axis=1).ravel()


def read_refcounts(source: Source, header: Header, first: int, end: int) -> Iterator[NDArray[np.uint64]]:
    """The refcounts of host clusters [first, end) in order, an array for each refcount block.

    Clusters that the table does not reach, or without a block, have refcount 0.
    """
    per_block = entries_per_block(header)
    offsets = schema.REFCOUNT_TABLE["offset"].of(refcount_table(source, header)).tolist()
    while first < end:
        index, start = divmod(first, per_block)
        stop = min(per_block, end - index * per_block)
        offset = offsets[index] if index < len(offsets) else 0
        if offset:
            yield _read_block(source, header, index, offset)[start:stop]
        else:
            yield np.zeros(stop - start, dtype=np.uint64)
        first += stop - start


def _read_block(source: Source, header: Header, index: int, offset: int) -> NDArray[np.uint64]:
    if offset % header.cluster_size:
        raise CorruptError(
            f"Image is corrupt: Refblock offset {offset:#x} unaligned (reftable index: {index:#x})",
            Where(source.name, header.refcount_table_offset + 8 * index, f"refcount table entry {index}"),
        )
    return decode_refcounts(source.pread(header.cluster_size, offset), header.refcount_order)


def preallocated_metadata(source: Source, header: Header) -> bool:
    """Whether the file has far fewer blocks on its file system than its refcounts say (QEMU's own test).

    Then data clusters may well be holes of the host file, which it pays to ask for.
    """
    length, real = source.size, source.allocated // header.cluster_size
    threshold = max(real * 10 // 9, real + 2)
    clusters = -(-length // header.cluster_size)
    if clusters < threshold:
        return False
    per_block = entries_per_block(header)
    offsets = schema.REFCOUNT_TABLE["offset"].of(refcount_table(source, header))
    used = 0
    for index in np.flatnonzero(offsets[: -(-clusters // per_block)]).tolist():
        try:
            block = _read_block(source, header, index, int(offsets[index]))
        except CorruptError:
            return False
        used += int(np.count_nonzero(block[: clusters - index * per_block]))
        if used >= threshold:
            return True
    return False
