"""
Random disk images, each determined by its seed.

plan() decides on all commands without running any; build() runs them, and every one has to succeed. What
QEMU refuses is avoided by the plan: compression and snapshots with an external data file, snapshots that
the refcounts cannot count, what compat 0.10 lacks, bitmaps on an image of no bytes.
"""

import os
import posixpath
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from tests.differential.operations import LINES, NOISE, SECTOR, Canvas, Extent, KiB, MiB, operations

TIMEOUT_SECONDS: Final = 60

_CLUSTERS: Final = {
    512: 6, 1 * KiB: 2, 2 * KiB: 2, 4 * KiB: 5, 8 * KiB: 3, 16 * KiB: 5, 32 * KiB: 4, 64 * KiB: 8,
    128 * KiB: 2, 256 * KiB: 2, 512 * KiB: 2, 1 * MiB: 2, 2 * MiB: 2,
}  # fmt: skip
_REFCOUNT_BITS: Final = {1: 2, 2: 2, 4: 2, 8: 2, 16: 6, 32: 2, 64: 2}
_PREALLOCATION: Final = {"off": 20, "metadata": 3, "falloc": 2, "full": 2}
_SHAPES: Final = {"single": 45, "chain": 30, "data-file": 13, "raw": 12}
_SNAPSHOT_NAMES: Final = ("first", "with blank", "naïve", "a,b", "2", "quite-a-long-name-for-a-snapshot")

# Preallocation writes an entry for each cluster and may reserve all host space.
_LARGEST_PREALLOCATED: Final = 2 * MiB
# Layers of a chain are read once for each depth; they need not be large.
_LARGEST_IN_CHAIN: Final = 4 * MiB


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a shell, or what is done in its place without starting a process."""

    words: tuple[str, ...]
    # Where the output goes: only for the commands that make pattern files.
    output: str = ""

    def __str__(self) -> str:
        return shlex.join(self.words) + (f" > {self.output}" if self.output else "")


@dataclass(frozen=True, slots=True)
class Plan:
    """All that makes an image: the steps, and what they will have made. Names are relative."""

    seed: int
    path: str
    format: str
    files: tuple[str, ...]
    steps: tuple[Step, ...]
    snapshots: tuple[str, ...]
    features: frozenset[str]


@dataclass(frozen=True, slots=True)
class RandomImage:
    """
    An image that exists. `path` is the top image, `files` are all files that it consists of (backing and
    data files too), relative to `directory`, which has to be the working directory where one is used: the
    name of a data file is resolved against it. `commands` make the image by hand in an empty directory.
    """

    seed: int
    directory: Path
    path: str
    format: str
    files: tuple[str, ...]
    commands: tuple[str, ...]
    snapshots: tuple[str, ...]
    features: frozenset[str]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a qcow2 layer is laid out; sizes are bytes. `data_file` is "" without an external one."""

    compat: str
    cluster: int
    refcount_bits: int
    zstd: bool
    extended_l2: bool
    lazy_refcounts: bool
    preallocation: str = "off"
    data_file: str = ""
    data_file_raw: bool = False

    def options(self, *, preallocation: bool = True) -> str:
        """The value of -o, without the defaults that compat 0.10 does not take."""
        options = [f"compat={self.compat}", f"cluster_size={self.cluster}"]
        if self.compat == "1.1":
            options.append(f"refcount_bits={self.refcount_bits}")
            options.append(f"compression_type={'zstd' if self.zstd else 'zlib'}")
            options.append(f"extended_l2={'on' if self.extended_l2 else 'off'}")
            options.append(f"lazy_refcounts={'on' if self.lazy_refcounts else 'off'}")
        if preallocation and self.preallocation != "off":
            options.append(f"preallocation={self.preallocation}")
        if self.data_file:
            options.append(f"data_file={self.data_file}")
            options.append(f"data_file_raw={'on' if self.data_file_raw else 'off'}")
        return ",".join(options)

    def canvas(self, size: int, backing: "Layer | None") -> Canvas:
        """The view to plan writes on, of a virtual size in bytes."""
        may_compress = not self.data_file and self.preallocation == "off"
        return Canvas(
            size=size,
            cluster=self.cluster,
            l2_span=self.cluster * (self.cluster // (16 if self.extended_l2 else 8)),
            subcluster=self.cluster // 32 if self.extended_l2 else 0,
            compression=f"compressed-{'zstd' if self.zstd else 'zlib'}" if may_compress else "",
            has_zero_clusters=self.compat == "1.1",
            has_backing=backing is not None,
            has_data_file=bool(self.data_file),
            below=[] if backing is None else [extent for extent in backing.written if extent[0] < size],
        )

    def features(self) -> set[str]:
        """The features that the layout alone makes."""
        size = f"{self.cluster // MiB}M" if self.cluster >= MiB else f"{self.cluster // KiB}k"
        features = {
            f"compat-{self.compat}",
            f"cluster-{size if self.cluster >= KiB else self.cluster}",
            f"refcount-{self.refcount_bits}",
            f"preallocation-{self.preallocation}",
        }
        flags = {
            "extended-l2": self.extended_l2,
            "lazy-refcounts": self.lazy_refcounts,
            "data-file": bool(self.data_file),
            "data-file-raw": self.data_file_raw,
        }
        return features | {name for name, is_set in flags.items() if is_set}


@dataclass(frozen=True, slots=True)
class Layer:
    """One planned image file of a chain, as the layer above has to know it."""

    path: str
    format: str
    size: int
    cluster: int
    written: tuple[Extent, ...]


@dataclass(slots=True)
class Draft:
    """A plan while it grows."""

    rng: Random
    steps: list[Step] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    directories: set[str] = field(default_factory=set)

    def add(self, *words: str) -> None:
        """Add a command."""
        self.steps.append(Step(words))

    def new_file(self, path: str) -> None:
        """Count the file in, and make its directory first."""
        self.files.append(path)
        directory = posixpath.dirname(path)
        if directory and directory not in self.directories:
            self.directories.add(directory)
            self.add("mkdir", directory)

    def guest_io(self, path: str, image_format: str, canvas: Canvas, number: int) -> None:
        """Add one qemu-io with up to that many commands."""
        commands = operations(self.rng, canvas, number)
        if commands:
            words = [word for command in commands for word in ("-c", command)]
            self.add("qemu-io", "-t", "unsafe", "-f", image_format, *words, path)
        self.features |= canvas.features


def make(seed: int, directory: Path) -> RandomImage:
    """Create the random image of that seed in a new subdirectory of `directory`."""
    return build(plan(seed), directory / f"seed-{seed}")


def plan(seed: int) -> Plan:
    """Decide on the image of that seed; nothing is run."""
    draft = Draft(Random(seed))
    rng = draft.rng
    (shape,) = rng.choices(list(_SHAPES), list(_SHAPES.values()))
    draft.features.add(shape)
    snapshots: tuple[str, ...] = ()
    match shape:
        case "chain":
            top, snapshots = _chain(draft)
        case "raw":
            top = _raw(draft, _name(rng, "disk.raw"))
        case _:
            layout = _layout(rng, "data.raw" if shape == "data-file" else "")
            top, snapshots = _qcow2(draft, _name(rng, "disk.qcow2"), layout, _size(rng, layout), None)
    if " " in top.path:
        draft.features.add("blank-in-name")
    return Plan(
        seed, top.path, top.format, tuple(draft.files), _with_patterns(draft.steps), snapshots,
        frozenset(draft.features),
    )  # fmt: skip


def _with_patterns(steps: list[Step]) -> tuple[Step, ...]:
    """The steps, after those that make the pattern files which they use."""
    used = {word.split()[3] for step in steps for word in step.words if word.startswith("write -q -s ")}
    used |= {word.split()[4] for step in steps for word in step.words if word.startswith("write -q -c -s ")}
    return tuple(_PATTERNS[name] for name in (NOISE, LINES) if name in used) + tuple(steps)


def _name(rng: Random, name: str) -> str:
    return f"a {name}" if rng.random() < 0.1 else name


def _layout(rng: Random, data_file: str, *, has_backing: bool = False) -> Layout:
    """Any layout that QEMU accepts with or without a data file and a backing file."""
    is_new = bool(data_file) or rng.random() >= 0.15
    (cluster,) = rng.choices(list(_CLUSTERS), list(_CLUSTERS.values()))
    (refcount_bits,) = rng.choices(list(_REFCOUNT_BITS), list(_REFCOUNT_BITS.values()))
    extended_l2 = is_new and cluster >= 16 * KiB and rng.random() < 0.4
    (preallocation,) = rng.choices(list(_PREALLOCATION), list(_PREALLOCATION.values()))
    zstd, lazy, raw = rng.random() < 0.45, rng.random() < 0.15, rng.random() < 0.5
    return Layout(
        compat="1.1" if is_new else "0.10",
        cluster=cluster,
        refcount_bits=refcount_bits if is_new else 16,
        zstd=is_new and zstd,
        extended_l2=extended_l2,
        lazy_refcounts=is_new and lazy,
        # A preallocated cluster would hide the backing file, unless its sub-clusters do not.
        preallocation=preallocation if extended_l2 or not has_backing else "off",
        data_file=data_file,
        data_file_raw=bool(data_file) and raw and not has_backing,
    )


def _size(rng: Random, layout: Layout) -> int:
    """A virtual size in bytes: nothing, a few sectors, or any number of sectors up to 64 MiB."""
    dice = rng.random()
    if dice < 0.04:
        return 0
    if dice < 0.14:
        return SECTOR * rng.randint(1, 8)
    largest = 64 * MiB
    if layout.preallocation != "off" or layout.data_file_raw:
        largest = max(_LARGEST_PREALLOCATED, layout.cluster)
    elif layout.cluster < 4 * KiB:
        largest = 8 * MiB
    size = int(64 * KiB * (largest / (64 * KiB)) ** rng.random())
    unit = layout.cluster if rng.random() < 0.35 else SECTOR
    return max(unit, size // unit * unit)


def _size_features(size: int, cluster: int) -> set[str]:
    name = "size-zero" if size == 0 else "size-tiny" if size < 64 * KiB else "size-medium"
    return {name, "size-odd"} if size % cluster else {name}


def _qcow2(
    draft: Draft, path: str, layout: Layout, size: int, backing: Layer | None
) -> tuple[Layer, tuple[str, ...]]:
    """Plan one qcow2 layer; returns it and the names of its snapshots."""
    rng = draft.rng
    draft.features |= layout.features() | _size_features(size, layout.cluster)
    draft.new_file(path)
    if layout.data_file:
        draft.new_file(layout.data_file)
    where = _backing_options(path, backing)
    draft.add("qemu-img", "create", "-q", "-f", "qcow2", "-o", layout.options(), *where, path, str(size))
    canvas = layout.canvas(size, backing)
    snapshots_wanted = _snapshots_wanted(rng, layout)
    if snapshots_wanted and layout.refcount_bits < 8:
        # Compressed clusters share host clusters, and every snapshot multiplies the references.
        canvas.compression = ""
    draft.guest_io(path, "qcow2", canvas, _number(rng, layout))
    if canvas.compression and size and rng.random() < 0.15:
        _convert(draft, path, layout, backing)
        canvas.allocate(0, size)
        canvas.compressed.update(canvas.allocated)
        draft.features |= {"converted", canvas.compression}
    snapshots = _snapshots(draft, path, layout, canvas, snapshots_wanted)
    if layout.compat == "1.1" and canvas.size and rng.random() < 0.2:
        _bitmaps(draft, path, canvas, layout)
    return Layer(path, "qcow2", canvas.size, layout.cluster, tuple(canvas.written)), snapshots


def _backing_options(path: str, backing: Layer | None) -> tuple[str, ...]:
    """-b and -F; the name is relative to the directory of the overlay."""
    if backing is None:
        return ()
    name = posixpath.relpath(backing.path, posixpath.dirname(path) or ".")
    return "-b", name, "-F", backing.format


def _number(rng: Random, layout: Layout) -> int:
    """How many commands: few where each allocates a large cluster."""
    return rng.randint(1, 4) if layout.cluster >= 512 * KiB else rng.randint(3, 12)


def _convert(draft: Draft, path: str, layout: Layout, backing: Layer | None) -> None:
    """Replace the layer by a compressed copy of itself."""
    source = posixpath.join(posixpath.dirname(path), "source.qcow2")
    where = _backing_options(path, backing)
    # convert calls the backing file's name -B, where create calls it -b.
    where = ("-B", *where[1:]) if where else ()
    draft.add("mv", path, source)
    options = layout.options(preallocation=False)
    formats = ("-f", "qcow2", "-O", "qcow2")
    draft.add("qemu-img", "convert", "-q", "-c", "-t", "unsafe", *formats, "-o", options, *where, source, path)
    draft.add("rm", source)


def _snapshots_wanted(rng: Random, layout: Layout) -> int:
    if layout.data_file or layout.refcount_bits == 1 or rng.random() >= 0.35:
        return 0
    # A cluster shared by the active state and n snapshots has n + 1 references; two bits count to three.
    return rng.randint(1, 2 if layout.refcount_bits == 2 else 3)


def _snapshots(draft: Draft, path: str, layout: Layout, canvas: Canvas, number: int) -> tuple[str, ...]:
    """Take snapshots, and go on writing after each; sometimes resize, and delete or apply one."""
    rng = draft.rng
    sizes: dict[str, int] = {}
    for name in rng.sample(_SNAPSHOT_NAMES, number):
        draft.add("qemu-img", "snapshot", "-c", name, path)
        sizes[name] = canvas.size
        if layout.compat == "1.1" and rng.random() < 0.3:
            _resize(draft, path, canvas)
        draft.guest_io(path, "qcow2", canvas, _number(rng, layout) // 2 + 1)
    if not sizes:
        return ()
    draft.features |= {"snapshots", f"snapshots-{number}"}
    # To apply one QEMU looks for an id first, so a name that may be the id of another is left out.
    # For a moment the state to come and the state to go are both counted: one reference more.
    may_apply = 2**layout.refcount_bits > number + 2
    applicable = [name for name in sizes if may_apply and not name.isdigit()]
    if applicable and rng.random() < 0.2:
        name = rng.choice(applicable)
        draft.add("qemu-img", "snapshot", "-a", name, path)
        draft.features.add("snapshot-applied")
        # The image takes on the size that it had.
        canvas.size = sizes[name]
        draft.guest_io(path, "qcow2", canvas, 2)
    if len(sizes) > 1 and rng.random() < 0.25:
        name = rng.choice(list(sizes))
        draft.add("qemu-img", "snapshot", "-d", name, path)
        draft.features.add("snapshot-deleted")
        del sizes[name]
    return tuple(sizes)


def _resize(draft: Draft, path: str, canvas: Canvas) -> None:
    """Change the virtual size; extents past the new end are forgotten."""
    rng = draft.rng
    largest = max(canvas.size + canvas.cluster, SECTOR * 8)
    size = max(SECTOR, rng.randint(canvas.size // 2, largest + canvas.size // 2) // SECTOR * SECTOR)
    shrink = ("--shrink",) if size < canvas.size else ()
    draft.add("qemu-img", "resize", "-q", "-f", "qcow2", *shrink, path, str(size))
    draft.features |= {"snapshot-resize", "resize-shrink" if shrink else "resize-grow"}
    canvas.size = size
    canvas.below = [extent for extent in canvas.below if extent[0] < size]
    canvas.written = [extent for extent in canvas.written if extent[0] < size]


def _bitmaps(draft: Draft, path: str, canvas: Canvas, layout: Layout) -> None:
    """Add one or two persistent bitmaps, and let writes set bits of those that are enabled."""
    rng = draft.rng
    for name in ("b0", "dirty bitmap")[: rng.randint(1, 2)]:
        words = ["qemu-img", "bitmap", "--add", "-g", str(rng.choice((512, 4 * KiB, 64 * KiB, 1 * MiB)))]
        if rng.random() < 0.3:
            words.append("--disable")
        draft.add(*words, "-f", "qcow2", path, name)
    draft.features.add("bitmaps")
    if rng.random() < 0.5:
        draft.guest_io(path, "qcow2", canvas, _number(rng, layout) // 2 + 1)


def _raw(draft: Draft, path: str, largest: int = 16 * MiB) -> Layer:
    """Plan a raw image: with holes, all holes, or empty; its length may be any number of bytes."""
    rng = draft.rng
    draft.new_file(path)
    size = 0 if rng.random() < 0.13 else SECTOR * int((largest // SECTOR) ** rng.random())
    draft.add("qemu-img", "create", "-q", "-f", "raw", path, str(size))
    # Extents are chosen by the size of a block of the host file system.
    canvas = Canvas(size=size, cluster=4 * KiB, l2_span=0)
    all_holes = rng.random() < 0.15
    if not all_holes:
        draft.guest_io(path, "raw", canvas, rng.randint(1, 10))
    length = size
    if rng.random() < 0.45:
        length = max(0, size + rng.choice((-1, 1)) * rng.randint(1, 3 * SECTOR))
        draft.add("truncate", "-s", str(length), path)
    kind = "empty" if length == 0 else "all-holes" if not canvas.written else "holes"
    draft.features.add(f"raw-{kind}")
    if length % SECTOR:
        draft.features.add("raw-odd")
    return Layer(path, "raw", -(-length // SECTOR) * SECTOR, canvas.cluster, tuple(canvas.written))


def _chain(draft: Draft) -> tuple[Layer, tuple[str, ...]]:
    """Plan one to four backing files, and the overlay on top of them."""
    rng = draft.rng
    depth = rng.choices((1, 2, 3, 4), (6, 5, 4, 4))[0]
    draft.features.add(f"depth-{depth}")
    # This layer and all below it live in a subdirectory.
    in_subdirectory = rng.randint(0, depth) if rng.random() < 0.4 else -1
    places = ["sub/" if index <= in_subdirectory else "" for index in range(depth + 1)]
    if "sub/" in places:
        draft.features.add("subdirectory")
    layer = _base(draft, places[0])
    snapshots: tuple[str, ...] = ()
    for index in range(1, depth + 1):
        name = places[index] + _name(rng, "disk.qcow2" if index == depth else f"layer{index}.qcow2")
        data_file = f"data{index}.raw" if rng.random() < 0.08 else ""
        layout = _layout(rng, data_file, has_backing=True)
        size = _overlay_size(draft, layer.size, layout)
        below = layer
        layer, snapshots = _qcow2(draft, name, layout, size, below)
        _chain_features(draft, below, layer)
        if index < depth and draft.features & {"converted", "compressed-zlib", "compressed-zstd"}:
            draft.features.add("compressed-backing")
    return layer, snapshots


def _base(draft: Draft, place: str) -> Layer:
    """The lowest layer of a chain: raw or qcow2."""
    rng = draft.rng
    if rng.random() < 0.45:
        draft.features.add("raw-base")
        layer = _raw(draft, place + _name(rng, "base.raw"), _LARGEST_IN_CHAIN)
        if "raw-odd" in draft.features:
            draft.features.add("raw-base-odd")
        return layer
    layout = _layout(rng, "data0.raw" if rng.random() < 0.08 else "")
    size = min(_size(rng, layout), _LARGEST_IN_CHAIN)
    layer, _ = _qcow2(draft, place + _name(rng, "base.qcow2"), layout, size, None)
    if draft.features & {"converted", "compressed-zlib", "compressed-zstd"}:
        draft.features.add("compressed-backing")
    return layer


def _overlay_size(draft: Draft, below: int, layout: Layout) -> int:
    """A virtual size in bytes: that of the layer below, shorter, or longer."""
    rng = draft.rng
    relation = rng.choices(("same", "shorter", "longer"), (3, 3, 4))[0]
    if relation == "shorter" and below > SECTOR:
        return SECTOR * rng.randint(below // SECTOR // 3, below // SECTOR - 1)
    if relation == "longer" or below == 0:
        return below + SECTOR * rng.randint(1, max(2 * layout.cluster, below) // SECTOR)
    return below


def _chain_features(draft: Draft, below: Layer, layer: Layer) -> None:
    if layer.size != below.size:
        draft.features.add("overlay-longer" if layer.size > below.size else "overlay-shorter")
    if below.format == "qcow2" and layer.cluster != below.cluster:
        draft.features.add("mixed-clusters")


_NOISE_BYTES: Final = 8192
_PATTERNS: Final = {
    NOISE: Step(
        (
            "python3",
            "-c",
            f"import random, sys; sys.stdout.buffer.write(random.Random(7).randbytes({_NOISE_BYTES}))",
        ),
        NOISE,
    ),
    LINES: Step(("seq", "10000", "19999"), LINES),
}


def build(planned: Plan, directory: Path) -> RandomImage:
    """Run the steps of the plan in `directory`, which must not exist yet."""
    directory.mkdir(parents=True)
    for step in planned.steps:
        _run(step, directory)
    return RandomImage(
        seed=planned.seed,
        directory=directory,
        path=planned.path,
        format=planned.format,
        files=planned.files,
        commands=tuple(str(step) for step in planned.steps),
        snapshots=planned.snapshots,
        features=planned.features,
    )


class StepFailedError(Exception):
    """A step of a plan failed, or complained: the message has the command and what it said."""


def _run(step: Step, directory: Path) -> None:
    """Run one step; what is no business of QEMU is done here, which saves the time of a process."""
    match step.words:
        case ("mkdir", name):
            (directory / name).mkdir()
        case ("mv", source, target):
            (directory / source).rename(directory / target)
        case ("rm", name):
            (directory / name).unlink()
        case ("truncate", "-s", length, name):
            os.truncate(directory / name, int(length))
        case ("python3", *_):
            (directory / step.output).write_bytes(Random(7).randbytes(_NOISE_BYTES))
        case ("seq", first, last):
            lines = "".join(f"{number}\n" for number in range(int(first), int(last) + 1))
            (directory / step.output).write_text(lines)
        case words:
            _run_tool(step, words, directory)


def _run_tool(step: Step, words: tuple[str, ...], directory: Path) -> None:
    """Run qemu-img or qemu-io, which must stay silent too: there are failures with an exit code of 0."""
    done = subprocess.run(
        words,
        cwd=directory,
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0 or done.stderr or done.stdout:
        said = (done.stderr + done.stdout).decode("utf-8", "replace").strip()
        raise StepFailedError(f"{step}: exit code {done.returncode}: {said}")
