"""Extents: the one currency between formats and all that people do with images.

A driver answers one question: for this guest range, which extents? A table of them is a numpy array of
dtype `EXTENT`, ordered by `start`, without gaps or overlaps:

    start    guest offset (bytes)
    length   bytes, never 0
    kind     a `Kind`
    offset   host offset (bytes) in the file, or -1; of a COMPRESSED extent, where its stream starts
    stored   bytes of a COMPRESSED extent's stream in the file, otherwise 0
    file     number of the file that holds it, in the list of the driver (or of the image)
    depth    layer of the backing chain that answered; 0 is the top

A COMPRESSED extent is one cluster of its driver, or the part of one that is asked for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from imgloop.formats.kinds import Kind as Kind
from imgloop.formats.source import Source

EXTENT = np.dtype(
    [
        ("start", np.int64),
        ("length", np.int64),
        ("offset", np.int64),
        ("stored", np.int32),
        ("file", np.int16),
        ("depth", np.int16),
        ("kind", np.uint8),
    ],
    align=True,
)
Extents = NDArray[np.void]  # of dtype EXTENT

NO_OFFSET = -1


def extent(start: int, length: int, kind: Kind, offset: int = NO_OFFSET, file: int = 0) -> Extents:
    """A table of one extent."""
    return np.array([(start, length, offset, 0, file, 0, kind)], dtype=EXTENT)


def end_of(extents: Extents) -> int:
    """The guest offset where a table ends."""
    return int(extents["start"][-1] + extents["length"][-1])


def clip(extents: Extents, start: int, end: int) -> Extents:
    """The part of a table within [start, end)."""
    first = int(np.searchsorted(extents["start"], start, side="right")) - 1
    last = int(np.searchsorted(extents["start"], end, side="left"))
    part = extents[max(first, 0) : last]
    if not len(part) or (part["start"][0] >= start and end_of(part) <= end):
        return part
    part = part.copy()
    _trim_front(part[:1], start)
    part["length"][-1] = min(end_of(part), end) - part["start"][-1]
    return part


def _trim_front(extents: Extents, start: int | NDArray[np.int64]) -> None:
    """Let each extent begin no earlier than `start`, in place; a compressed stream stays where it is."""
    cut = np.maximum(start - extents["start"], 0)
    extents["start"] += cut
    extents["length"] -= cut
    extents["offset"] += np.where((extents["offset"] >= 0) & (extents["kind"] != Kind.COMPRESSED), cut, 0)


def cut(extents: Extents, starts: NDArray[np.int64], end: int) -> tuple[Extents, NDArray[np.intp]]:
    """The table in pieces that begin at `starts`, the last ending at `end`; and of which row each is a part.

    All of it lies within the table; its own boundaries in that range are to be among the starts.
    """
    rows = np.searchsorted(extents["start"], starts, side="right") - 1
    result: Extents = extents[rows]
    _trim_front(result, starts)
    result["length"] = np.diff(starts, append=end)
    return result, rows


def overlay(top: Extents, lower: Extents) -> Extents:
    """`top`, with what it does not hold taken from `lower`; both cover the same guest range.

    Where `lower` has nothing to say (it is shorter), `top`'s UNALLOCATED stays.
    """
    end, reach = end_of(top), end_of(lower)
    cuts = np.concatenate((lower["start"], [reach]))
    starts = np.union1d(top["start"], cuts[(cuts > top["start"][0]) & (cuts < end)])
    above = np.searchsorted(top["start"], starts, side="right") - 1
    below = np.searchsorted(lower["start"], starts, side="right") - 1
    answers = (top["kind"][above] == Kind.UNALLOCATED) & (below >= 0) & (starts < reach)
    # where neither side of a cut was taken from below, the cut would only break an extent of top in two
    keep = answers | (starts == top["start"][above])
    keep[1:] |= answers[:-1]
    starts, above, below, answers = starts[keep], above[keep], below[keep], answers[keep]
    result: Extents = np.where(answers, lower[below], top[above])
    _trim_front(result, starts)
    result["length"] = np.diff(starts, append=end)
    return result


def coalesce(extents: Extents, *, streams: bool = False) -> Extents:
    """Neighbours of one kind that continue each other become one extent.

    Compressed ones stay apart, for each has its own stream, unless `streams` says that those do not matter.
    """
    if len(extents) < 2:
        return extents
    a, b = extents[:-1], extents[1:]
    joined = (a["kind"] == b["kind"]) & (a["file"] == b["file"]) & (a["depth"] == b["depth"])
    compressed = a["kind"] == Kind.COMPRESSED
    follows = b["offset"] == np.where(a["offset"] >= 0, a["offset"] + a["length"], NO_OFFSET)
    joined &= np.where(compressed, streams, follows)
    if not joined.any():
        return extents
    firsts = np.flatnonzero(np.concatenate(([True], ~joined)))
    result = extents[firsts]
    result["length"] = np.diff(result["start"], append=end_of(extents))
    return result


def split_holes(extents: Extents, file: Source) -> Extents:
    """DATA that lies in holes of `file`, or past its end, as HOLE with the same offset; in place if may be."""
    data = extents["kind"] == Kind.DATA
    if not data.any():
        return extents
    offset, reach = extents["offset"], extents["offset"] + extents["length"]
    ranges = list(file.data_ranges(int(offset[data].min()), int(reach[data].max())))
    edges = np.array(ranges, dtype=np.int64).ravel()  # data starts, ends, starts, ...
    first = np.searchsorted(edges, offset, side="right")  # of the edges after the extent's start
    cuts = np.where(data, np.searchsorted(edges, reach, side="left") - first, 0)
    if cuts.any():
        pieces = cuts + 1
        number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        result = np.repeat(extents, pieces)
        first = np.repeat(first, pieces) + number
        start = result["start"] + np.where(number > 0, edges[first - 1] - result["offset"], 0)
        _trim_front(result, start)
        result["length"] = np.diff(start, append=end_of(extents))
    else:
        result = extents
    # an even number of edges before a piece: it lies in a hole
    result["kind"][(result["kind"] == Kind.DATA) & (first % 2 == 0)] = Kind.HOLE
    return result
