"""What `qemu-img measure` says: the bytes that an image would take in another format, before it is written."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Literal

from imgloop.formats.driver import SECTOR
from imgloop.formats.errors import CorruptError, ImageError
from imgloop.image import Image

MAX_L1_BYTES = 32 << 20
L1_ENTRY = REFCOUNT_TABLE_ENTRY = BITMAP_TABLE_ENTRY = 8  # bytes
BITMAP_ENTRY = 24  # bytes of a bitmap directory's entry, without the name


@dataclass(frozen=True, slots=True)
class Layout:
    """The options of a qcow2 target that decide on its size; `cluster_size` in bytes."""

    cluster_size: int = 1 << 16
    version: int = 3
    refcount_bits: int = 16
    extended_l2: bool = False
    backing: bool = False
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes: with zeros left out, with nothing left out, and of persistent bitmaps; None: it cannot have any."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def measure_raw(size: int) -> Measured:
    """A raw file for a disk of `size` bytes."""
    return Measured(_up(size, SECTOR), _up(size, SECTOR))


def measure_qcow2(size: int, layout: Layout, image: Image | None = None) -> Measured:
    """A qcow2 image for a disk of `size` bytes, or for a copy of `image`, which has that size.

    Raises ImageError where no such image can be, CorruptError where it cannot be told what the source maps.
    """
    cluster = layout.cluster_size
    aligned = _up(_up(size, SECTOR), cluster)
    metadata = _metadata(aligned, layout)
    data = 0
    if layout.preallocation in ("falloc", "full") or (image and layout.backing):
        data = aligned
    elif image:
        data = _touched(image, cluster) * cluster
    bitmaps = None
    if image and layout.version >= 3:
        found = image.layers[0].driver.dirty_bitmaps()
        bitmaps = _bitmaps(found, image.size, cluster) if found is not None else None
    return Measured(metadata + data, metadata + aligned, bitmaps)


def _metadata(aligned: int, layout: Layout) -> int:
    """Header, L1 and L2 tables and refcounts of an image all of whose `aligned` bytes are allocated."""
    cluster = layout.cluster_size
    l2_entry = 16 if layout.extended_l2 else 8
    l2_entries = _up(aligned // cluster, cluster // l2_entry)
    l1_entries = l2_entries * l2_entry // cluster
    if l1_entries * L1_ENTRY > MAX_L1_BYTES:
        raise ImageError("The image size is too large (try using a larger cluster size)")
    tables = cluster + l2_entries * l2_entry + _up(l1_entries, cluster // L1_ENTRY) * L1_ENTRY
    clusters = (tables + aligned) // cluster
    per_block = cluster * 8 // layout.refcount_bits
    blocks = table = 0
    while True:  # refcounts count themselves too
        before = blocks, table
        blocks = -(-(clusters + table + blocks) // per_block)
        table = -(-blocks * REFCOUNT_TABLE_ENTRY // cluster)
        if before == (blocks, table):
            return tables + (blocks + table) * cluster


def _touched(image: Image, cluster: int) -> int:
    """The clusters of the guest in which the image maps data that is not known to be zeros."""
    import numpy as np

    from imgloop.formats.extents import Kind

    count, last = 0, -1  # the last cluster that was counted
    for table in image.iter_extents(holes=True):
        if (table["kind"] == Kind.INVALID).any():
            row = table[table["kind"] == Kind.INVALID][0]
            error = image.explain(int(row["start"]), int(row["depth"]))
            raise CorruptError(f"Unable to get block status: {os.strerror(errno.EIO)}", error.where)
        data = table[np.isin(table["kind"], (Kind.DATA, Kind.COMPRESSED, Kind.ENCRYPTED))]
        if not len(data):
            continue
        first, end = data["start"] // cluster, (data["start"] + data["length"] - 1) // cluster
        again = np.concatenate(([last], end[:-1])) == first
        count += int((end - first + 1).sum() - again.sum())
        last = int(end[-1])
    return count


def _bitmaps(bitmaps: list[tuple[bytes, int]], size: int, cluster: int) -> int:
    """Persistent bitmaps (name and granularity in bytes) with all of their bits and their directory."""
    total = directory = 0
    for name, granularity in bitmaps:
        clusters = -(-size // (granularity * 8 * cluster))
        total += clusters * cluster + _up(clusters * BITMAP_TABLE_ENTRY, cluster)
        directory += _up(BITMAP_ENTRY + len(name), 8)
    return total + _up(directory, cluster)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
