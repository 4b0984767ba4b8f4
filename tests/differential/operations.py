"""
The random things done to the guest's view of one layer: commands for qemu-io, planned without running it.

A Canvas knows enough of the layer to avoid what QEMU refuses, above all a compressed write to a cluster
that is allocated. All offsets and lengths are bytes.
"""

from dataclasses import dataclass, field
from random import Random
from typing import Final

KiB: Final = 1024
MiB: Final = 1024 * KiB
SECTOR: Final = 512

# Files that a write repeats over its length: one that hardly compresses, one that does as text does.
NOISE: Final = "noise.bin"
LINES: Final = "lines.txt"

# One write allocates host space for whole clusters, so its length is limited, to keep images small.
_LONGEST_WRITE: Final = 192 * KiB

Extent = tuple[int, int]


@dataclass(slots=True)
class Canvas:
    """The guest's view of one layer while its commands are planned."""

    size: int
    cluster: int
    # The guest bytes that one L2 table maps; 0 for raw.
    l2_span: int
    # The bytes of a sub-cluster; 0 without extended L2 entries.
    subcluster: int = 0
    # How compressed clusters are named in the features; "" where QEMU refuses to write them.
    compression: str = ""
    # Whether a cluster can say that it reads as zeros (compat 1.1).
    has_zero_clusters: bool = True
    # Where a name for a feature depends on what the layer is: "data-file-discard", "zeroed-overlay".
    has_backing: bool = False
    has_data_file: bool = False
    # Extents that a layer below has written: what is done there is seen.
    below: list[Extent] = field(default_factory=list)
    written: list[Extent] = field(default_factory=list)
    allocated: set[int] = field(default_factory=set)
    compressed: set[int] = field(default_factory=set)
    # QEMU remembers where the last compressed cluster ended, and writes the next one there even if that host
    # cluster was freed and used again since; the image is corrupt then. So nothing is compressed any more in
    # a process that has touched compressed clusters in another way.
    has_touched_compressed: bool = False
    features: set[str] = field(default_factory=set)

    @property
    def is_raw(self) -> bool:
        """Whether the layer has no clusters; `cluster` is then only a size to choose extents by."""
        return self.l2_span == 0

    def clusters(self, offset: int, length: int) -> range:
        """The indices of the clusters that these bytes are in."""
        return range(offset // self.cluster, -(-(offset + length) // self.cluster))

    def touch(self, offset: int, length: int) -> None:
        """Remember that these bytes were changed otherwise than by a compressed write."""
        if not self.compressed.isdisjoint(self.clusters(offset, length)):
            self.has_touched_compressed = True
            self.features.add("compressed-overwritten")

    def allocate(self, offset: int, length: int) -> None:
        """Remember that these bytes have host clusters from now on."""
        self.allocated.update(self.clusters(offset, length))


def operations(rng: Random, canvas: Canvas, number: int) -> tuple[str, ...]:
    """Plan `number` commands for one process of qemu-io; none where there is no byte to write."""
    if canvas.size == 0:
        return ()
    canvas.has_touched_compressed = False
    planned = []
    for _ in range(number):
        kinds = _kinds(canvas)
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        planned.append(_operation(rng, canvas, kind))
    return tuple(planned)


def _kinds(canvas: Canvas) -> dict[str, int]:
    """The kinds of command that the layer allows, with weights."""
    kinds = {"write": 6, "zero": 2, "zero-unmap": 2, "discard": 2}
    if canvas.size > canvas.cluster:
        kinds["cross-cluster"] = 3
    if 0 < canvas.l2_span < canvas.size:
        kinds["cross-l2"] = 3
    if canvas.compression and not canvas.has_touched_compressed:
        kinds["compressed"] = 6
    if canvas.subcluster:
        kinds |= {"subcluster-write": 4, "subcluster-zero": 3, "subcluster-discard": 2}
    return kinds


def _operation(rng: Random, canvas: Canvas, kind: str) -> str:
    match kind:
        case "write":
            return _write(rng, canvas, _extent(rng, canvas))
        case "cross-cluster":
            canvas.features.add(kind)
            return _write(rng, canvas, _around(rng, canvas, canvas.cluster))
        case "cross-l2":
            canvas.features.add(kind)
            return _write(rng, canvas, _around(rng, canvas, canvas.l2_span))
        case "compressed":
            return _compressed(rng, canvas)
        case "subcluster-write":
            canvas.features.add(kind)
            return _write(rng, canvas, _subclusters(rng, canvas))
        case "subcluster-zero":
            canvas.features.add(kind)
            return _zero(rng, canvas, _subclusters(rng, canvas), unmap=rng.random() < 0.5)
        case "subcluster-discard":
            canvas.features.add(kind)
            return _discard(canvas, _subclusters(rng, canvas))
        case "discard":
            return _discard(canvas, _extent(rng, canvas))
    return _zero(rng, canvas, _extent(rng, canvas), unmap=kind == "zero-unmap")


def _clip(canvas: Canvas, offset: int, length: int) -> Extent:
    """The part inside of the image; at least one byte of it."""
    offset = max(0, min(offset, canvas.size - 1))
    return offset, max(1, min(length, canvas.size - offset, _LONGEST_WRITE))


def _extent(rng: Random, canvas: Canvas) -> Extent:
    """Any extent, often one that something was written to before, here or below."""
    before = canvas.written + canvas.below
    if before and rng.random() < 0.5:
        offset, length = rng.choice(before)
        if rng.random() < 0.4:
            # Whole clusters: only those can be discarded, or be zeroed without a write.
            start = offset // canvas.cluster * canvas.cluster
            return _clip(canvas, start, canvas.cluster * rng.randint(1, 3))
        return _clip(canvas, offset + rng.randint(-1, 1) * SECTOR, length)
    unit = rng.choice((1, SECTOR, SECTOR, canvas.cluster, canvas.cluster))
    offset = rng.randrange(canvas.size) // unit * unit
    longest = max(1, min(4 * canvas.cluster, _LONGEST_WRITE) // unit)
    return _clip(canvas, offset, unit * rng.randint(1, longest))


def _around(rng: Random, canvas: Canvas, step: int) -> Extent:
    """An extent with a multiple of `step` inside of it, which the image must be longer than."""
    middle = step * rng.randint(1, (canvas.size - 1) // step)
    reach = min(2 * canvas.cluster, _LONGEST_WRITE // 2)
    before, after = (rng.randint(1, reach) for _ in range(2))
    before = min(before, middle)
    return _clip(canvas, middle - before, before + after)


def _subclusters(rng: Random, canvas: Canvas) -> Extent:
    offset = rng.randrange(canvas.size) // canvas.subcluster * canvas.subcluster
    return _clip(canvas, offset, canvas.subcluster * rng.randint(1, 12))


def _pattern(rng: Random, canvas: Canvas) -> str:
    """What to write: mostly one byte value, now and then zeros stored as data, or a file."""
    dice = rng.random()
    if dice < 0.25:
        canvas.features.add("pattern-file")
        return f"-s {rng.choice((NOISE, LINES))}"
    if dice < 0.32:
        canvas.features.add("zeros-as-data")
        return "-P 0"
    return f"-P {rng.randint(1, 255)}"


def _write(rng: Random, canvas: Canvas, extent: Extent) -> str:
    offset, length = extent
    if offset % SECTOR or length % SECTOR:
        canvas.features.add("unaligned-write")
    canvas.touch(offset, length)
    canvas.allocate(offset, length)
    canvas.written.append(extent)
    return f"write -q {_pattern(rng, canvas)} {offset} {length}"


def _compressed(rng: Random, canvas: Canvas) -> str:
    """A compressed write of whole clusters, or an ordinary write if the clusters found are allocated."""
    clusters = -(-canvas.size // canvas.cluster)
    first = rng.randrange(clusters)
    last = min(first + rng.randint(1, max(1, min(4, _LONGEST_WRITE // canvas.cluster))), clusters)
    if not canvas.allocated.isdisjoint(range(first, last)):
        return _write(rng, canvas, _extent(rng, canvas))
    offset = first * canvas.cluster
    length = min(last * canvas.cluster, canvas.size) - offset
    canvas.features.add(canvas.compression)
    canvas.allocate(offset, length)
    canvas.compressed.update(range(first, last))
    canvas.written.append((offset, length))
    return f"write -q -c {_pattern(rng, canvas)} {offset} {length}"


def _zero(rng: Random, canvas: Canvas, extent: Extent, *, unmap: bool) -> str:
    offset, length = extent
    if length < canvas.cluster and rng.random() < 0.5:
        # Whole clusters become zero clusters; less than that is often only a write of zeros.
        offset, length = _clip(canvas, offset // canvas.cluster * canvas.cluster, canvas.cluster)
    canvas.features.add("zero-unmap" if unmap else "zero")
    if canvas.has_backing:
        canvas.features.add("zeroed-overlay")
    if canvas.has_data_file:
        canvas.features.add("data-file-zero")
    canvas.touch(offset, length)
    if not canvas.has_zero_clusters:
        canvas.allocate(offset, length)
    else:
        # The parts of clusters at both ends are written.
        canvas.allocate(offset, 1)
        canvas.allocate(offset + length - 1, 1)
    return f"write -q -z {'-u ' if unmap else ''}{offset} {length}"


def _discard(canvas: Canvas, extent: Extent) -> str:
    canvas.touch(*extent)
    canvas.features.add("discard")
    if canvas.has_data_file:
        canvas.features.add("data-file-discard")
    return f"discard -q {extent[0]} {extent[1]}"
