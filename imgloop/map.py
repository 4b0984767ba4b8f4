"""What `qemu-img map` says: the guest's extents, holes of the host files included, neighbours merged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from imgloop.formats.errors import ImageError
from imgloop.formats.extents import NO_OFFSET, Extents, Kind, coalesce
from imgloop.image import Image


def guest_map(image: Image, start: int = 0, length: int | None = None) -> Iterator[Extents]:
    """The map of guest range [start, start + length) (bytes; to the end by default), in tables of bounded size.

    Compressed extents have no offset here and are merged. At a damaged entry the tables end with the CorruptError
    that says why.
    """
    end = image.size if length is None else min(start + length, image.size)
    if start >= end:
        return
    pending: Extents | None = None
    for table in image.iter_extents(start, end - start, holes=True):
        table["offset"][table["kind"] == Kind.COMPRESSED] = NO_OFFSET
        table["stored"] = 0
        table = coalesce(table, streams=True)
        if pending is not None:
            seam = coalesce(np.concatenate((pending, table[:1])), streams=True)
            if len(seam) == 1:
                table[:1] = seam
            else:
                yield pending
        unreadable = np.flatnonzero(table["kind"] == Kind.INVALID)
        if len(unreadable):
            row = table[unreadable[0]]
            yield table[: unreadable[0]]
            raise _unmapped(image, int(row["start"]), int(row["depth"]))
        yield table[:-1]
        pending = table[-1:]
    if pending is not None:
        yield pending


def _unmapped(image: Image, start: int, depth: int) -> ImageError:
    error = image.explain(start, depth)
    return type(error)(f"Could not read file metadata: {error.message}", error.where)
