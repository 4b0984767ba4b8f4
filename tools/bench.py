"""Figures: imgloop against qemu-img and dissect.hypervisor, measured in turns in one run.

    python tools/bench.py [--runs N] [--directory DIR] [CASE...]

Absolute times depend on the machine and on what else it does; the ratios are what counts. Each case makes its
own input, runs both sides in turns and prints the medians. Inputs lie in memory (/dev/shm) unless --directory
says otherwise, so that no disk decides. Without names all cases run; `--list` names them.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import imgloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

IMGLOOP = [sys.executable, "-m", "imgloop"]
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: seconds (or seconds per read) of imgloop and of the other one."""

    case: str
    ours: float
    theirs: float
    other: str

    def __str__(self) -> str:
        ratio = self.theirs / self.ours
        return f"{self.case:<34}{_time(self.ours):>12}{_time(self.theirs):>12}  {self.other:<20}{ratio:>8.1f}"


def _time(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.1f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.0f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


Case = Callable[[Path, int], Iterator[Row]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register a case under its function's name."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


def in_turns(runs: int, *works: Callable[[], object]) -> list[float]:
    """The median wall time (seconds) of each piece of work, run in turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(runs):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def command(*args: str | Path) -> Callable[[], object]:
    """A piece of work: a command with its output thrown away."""
    words = [str(arg) for arg in args]
    return lambda: subprocess.run(words, stdout=subprocess.DEVNULL, check=True)


def guest_bytes(path: Path, mebibytes: int) -> None:
    """A raw file: 30 % zeros, half text-like, a fifth random."""
    chance = random.Random(1)
    words = [bytes(chance.choices(b"abcdefghijklmnop    ", k=chance.randrange(2, 9))) for _ in range(4000)]
    with path.open("wb") as file:
        for _ in range(mebibytes):
            kind = chance.random()
            if kind < 0.3:
                file.seek(MIB, 1)
            elif kind < 0.8:
                file.write(b" ".join(chance.choices(words, k=MIB // 3))[:MIB])
            else:
                file.write(chance.randbytes(MIB))
        file.truncate(mebibytes * MIB)


def scattered(path: Path, clusters: int, seed: int = 1) -> None:
    """A qcow2 image of 64 KiB clusters, all of them mapped, to host clusters in random order; holes for data."""
    size = 1 << 16
    per_table, per_block = size // 8, size // 2
    tables = -(-clusters // per_table)
    l1 = -(-tables * 8 // size)
    used = clusters + tables + l1 + 1
    blocks = -(-(used + used // per_block + 8) // per_block)
    # in clusters: header, refcount table, refcount blocks, L1, L2 tables, data
    table_at, block_at = 1, 1 + -(-blocks * 8 // size)
    l1_at = block_at + blocks
    l2_at = l1_at + l1
    data_at = l2_at + tables
    end = data_at + clusters
    header = struct.pack(
        ">IIQIIQIIQQIIQQQQII",
        *(0x514649FB, 3, 0, 0, 16, clusters * size, 0, tables, l1_at * size, table_at * size, table_at),
        *(0, 0, 0, 0, 0, 4, 104),
    )
    copied = np.uint64(1 << 63)
    order = np.random.default_rng(seed).permutation(clusters).astype(np.uint64) + np.uint64(data_at)
    counts = np.zeros(blocks * per_block, dtype=">u2")
    counts[:end] = 1

    def offsets(first: int, count: int) -> np.ndarray:
        return (np.arange(first, first + count, dtype=np.uint64)) * np.uint64(size)

    parts = {
        0: header,
        table_at: offsets(block_at, blocks).astype(">u8").tobytes(),
        block_at: counts.tobytes(),
        l1_at: (offsets(l2_at, tables) | copied).astype(">u8").tobytes(),
        l2_at: (order * np.uint64(size) | copied).astype(">u8").tobytes(),
    }
    with path.open("wb") as file:
        for at, data in parts.items():
            file.seek(at * size)
            file.write(data)
        file.truncate(end * size)


def checked(case: str, image: Path, runs: int, most: int = 1 << 10) -> Iterator[Row]:
    """`check` of an image by both; qemu-img no more than `most` times, where that takes minutes."""
    ours, theirs = in_turns(
        min(runs, most), command(*IMGLOOP, "check", image), command("qemu-img", "check", image)
    )
    if most < runs:
        (ours,) = in_turns(runs, command(*IMGLOOP, "check", image))
    yield Row(case, ours, theirs, "qemu-img check")


def peak_memory(*args: str | Path) -> float:
    """The largest resident size of a command (KiB)."""
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawnp(str(args[0]), [str(arg) for arg in args], os.environ, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{args[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return float(usage.ru_maxrss)


def converted(directory: Path, mebibytes: int, *options: str) -> Path:
    """A qcow2 image made by qemu-img convert from `guest_bytes`."""
    raw = directory / f"guest-{mebibytes}.raw"
    if not raw.exists():
        guest_bytes(raw, mebibytes)
    name = "-".join(["image", str(mebibytes), *(option.strip("-").replace("=", "-") for option in options)])
    image = directory / f"{name}.qcow2"
    if not image.exists():
        words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options]
        subprocess.run([*words, str(raw), str(image)], check=True)
    return image


COMPRESSIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "zlib": ("-c",),
    "zstd": ("-c", "-o", "compression_type=zstd"),
}


@case
def map_scattered(directory: Path, runs: int) -> Iterator[Row]:
    """`map --output json` of 128 GiB in 2 M scattered clusters."""
    image = directory / "scattered.qcow2"
    scattered(image, 1 << 21)
    ours, theirs = in_turns(
        runs,
        command(*IMGLOOP, "map", "--output", "json", image),
        command("qemu-img", "map", "--output", "json", image),
    )
    yield Row("map, 2 M extents", ours, theirs, "qemu-img map")


@case
def check_1t_prealloc(directory: Path, runs: int) -> Iterator[Row]:
    """`check` of 1 TiB with metadata preallocated, 16.8 M clusters: time, and peak memory."""
    image = directory / "preallocated.qcow2"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", str(image), "1T"]
    subprocess.run(words, check=True)
    yield from checked("check, 1 TiB preallocated", image, runs)
    ours = peak_memory(*IMGLOOP, "check", image)
    theirs = peak_memory("qemu-img", "check", image)
    print(f"{'check, peak memory':<34}{ours / 1024:>8.0f} MiB{theirs / 1024:>8.0f} MiB", end="")
    print(f"  {'qemu-img check':<20}{theirs / ours:>8.1f}")


@case
def check_scattered(directory: Path, runs: int) -> Iterator[Row]:
    """`check` of 128 GiB in 2 M scattered clusters; qemu-img runs once, for it takes more than a minute."""
    image = directory / "scattered.qcow2"
    scattered(image, 1 << 21)
    yield from checked("check, 2 M scattered clusters", image, runs, most=1)


@case
def check_20_snapshots(directory: Path, runs: int) -> Iterator[Row]:
    """`check` of 256 GiB with 20 internal snapshots, a little written between them."""
    image = directory / "snapshots.qcow2"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", str(image), "256G"]
    subprocess.run(words, check=True)
    for number in range(20):
        subprocess.run(["qemu-img", "snapshot", "-c", f"s{number}", str(image)], check=True)
        writes = [f"write {number * 7 + more}G 1M" for more in range(4)]
        options = [word for write in writes for word in ("-c", write)]
        subprocess.run(["qemu-io", "-f", "qcow2", *options, str(image)], check=True, stdout=subprocess.DEVNULL)
    yield from checked("check, 20 snapshots of 256 GiB", image, runs)


@case
def check_hostile(directory: Path, runs: int) -> Iterator[Row]:
    """`check` of images made to take for ever; nobody else is waited for (the ratio is to a second)."""
    for name, path in hostile_images(directory):
        words = [*IMGLOOP, "check", str(path)]

        def work(words: list[str] = words) -> None:
            subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

        (ours,) = in_turns(1, work)
        yield Row(f"check, {name}", ours, 1, "one second")


def hostile_images(directory: Path) -> Iterator[tuple[str, Path]]:
    """Four million entries for one table, 65536 snapshots that share one L1 table, and an empty pebibyte."""
    from tools.damage import Builder

    path = directory / "hostile.qcow2"
    builder, entries = Builder(), 1 << 22
    table = builder.take(entries * 8)
    builder.file[table : table + entries * 8] = builder.word(builder.l1).to_bytes(8, "big") * entries
    builder.set_header(l1_size=entries, l1_table_offset=table)
    builder.write(path)
    yield "4 M L1 entries, one table", path
    builder, count = Builder(snapshots=1), 1 << 16
    entry = builder.file[builder.snapshots : builder.snapshots + 72]
    table = builder.take(len(entry) * count)
    builder.file[table : table + len(entry) * count] = entry * count
    builder.set_header(nb_snapshots=count, snapshots_offset=table)
    builder.write(path)
    yield "65536 snapshots, one table", path
    Builder(cluster_bits=21, size=1 << 49).write(path)
    os.truncate(path, 1 << 50)
    yield "sparse file of 1 PiB", path


@case
def sequential(directory: Path, runs: int) -> Iterator[Row]:
    """`dd` of 1 GiB into a file in memory."""
    for name, options in COMPRESSIONS.items():
        image = converted(directory, 1024, *options)
        target = directory / "out.raw"
        words = ("bs=1M", f"if={image}", f"of={target}")
        ours, theirs = in_turns(runs, command(*IMGLOOP, "dd", *words), command("qemu-img", "dd", *words))
        target.unlink()
        image.unlink()
        yield Row(f"dd, 1 GiB {name}", ours, theirs, "qemu-img dd")


def convert_case(name: str) -> Case:
    """The case for one compression: `convert` of 2 GiB into a file in memory."""

    def run(directory: Path, runs: int) -> Iterator[Row]:
        image = converted(directory, 2048, *COMPRESSIONS[name])
        target = directory / "out.raw"
        words = ("convert", "-O", "raw", image, target)

        def fresh(*tool: str) -> Callable[[], object]:
            def work() -> None:
                target.unlink(missing_ok=True)
                command(*tool, *words)()

            return work

        ours, theirs = in_turns(runs, fresh(*IMGLOOP), fresh("qemu-img"))
        target.unlink()
        yield Row(f"convert, 2 GiB {name}", ours, theirs, "qemu-img convert")

    run.__doc__ = f"`convert` of 2 GiB, {name}, into a raw file in memory."
    return run


for _name in COMPRESSIONS:
    CASES[f"convert-{_name}"] = convert_case(_name)


@case
def convert_threads(directory: Path, runs: int) -> Iterator[Row]:
    """`convert` of 1 GiB with one thread, against two (a ratio above 1: what the second one brings)."""
    for name, options in COMPRESSIONS.items():
        image = converted(directory, 1024, *options)
        target = directory / "out.raw"
        words = ("convert", image, target)
        two, one = in_turns(runs, command(*IMGLOOP, *words, "-m", "2"), command(*IMGLOOP, *words, "-m", "1"))
        image.unlink()
        yield Row(f"convert -m 2, 1 GiB {name}", two, one, "imgloop -m 1")


@case
def compare_equal(directory: Path, runs: int) -> Iterator[Row]:
    """`compare` of 2 GiB with its raw copy."""
    yield comparison(directory, runs, "plain")


@case
def compare_compressed(directory: Path, runs: int) -> Iterator[Row]:
    """`compare` of 2 GiB, compressed by zlib, with its raw copy."""
    yield comparison(directory, runs, "zlib")


def comparison(directory: Path, runs: int, name: str) -> Row:
    image = converted(directory, 2048, *COMPRESSIONS[name])
    words = ("compare", image, directory / "guest-2048.raw")
    ours, theirs = in_turns(runs, command(*IMGLOOP, *words), command("qemu-img", *words))
    return Row(f"compare, 2 GiB {name} with raw", ours, theirs, "qemu-img compare")


@case
def random_reads(directory: Path, runs: int) -> Iterator[Row]:
    """Random 4 KiB reads through the library: of an image that fits the cluster cache, and of one 4 times it."""
    from dissect.hypervisor.disk.qcow2 import QCow2

    cache = imgloop.Limits().cluster_cache // MIB
    for name, options in COMPRESSIONS.items():
        for size in (cache, cache * 4):
            path = converted(directory, size, *options)
            chance = random.Random(2)
            count = 20_000 if name == "plain" else 4 * 16 * size
            offsets = [chance.randrange(size * MIB // 4096) * 4096 for _ in range(count)]
            with imgloop.open(path) as image:
                stream = QCow2(path).open()

                def read_ours(image: imgloop.Image = image, offsets: list[int] = offsets) -> None:
                    for offset in offsets:
                        image.pread(4096, offset)

                def read_theirs(stream: object = stream, offsets: list[int] = offsets) -> None:
                    for offset in offsets:
                        stream.seek(offset)  # type: ignore[attr-defined]  # dissect is untyped
                        stream.read(4096)  # type: ignore[attr-defined]

                image.pread(1, 0)  # numpy is imported at the first read
                ours, theirs = in_turns(runs, read_ours, read_theirs)
            yield Row(f"read 4 KiB, {size} MiB {name}", ours / count, theirs / count, "dissect.hypervisor")


@case
def start_up(directory: Path, runs: int) -> Iterator[Row]:
    """`info` and `--help` against an interpreter that does nothing (a ratio below 1: how much slower)."""
    image = converted(directory, 1)
    nothing = command(sys.executable, "-c", "pass")
    for name, words in {"info": ("info", image), "--help": ("--help",)}.items():
        ours, theirs = in_turns(runs * 5, command(*IMGLOOP, *words), nothing)
        yield Row(f"start-up, {name}", ours, theirs, "python3 -c pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--runs", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--directory", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    parser.add_argument("--list", action="store_true", help="name the cases")
    args = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its bytecode
    unknown = set(args.cases) - set(CASES)
    if unknown or args.list:
        print(*(f"{name:<16} {function.__doc__}" for name, function in CASES.items()), sep="\n")
        sys.exit(1 if unknown else 0)
    qemu = shutil.which("qemu-img")
    if qemu is None:
        sys.exit("qemu-img is missing: there is nothing to compare with (Debian: apt-get install qemu-utils)")
    version = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    print(f"imgloop {imgloop.__version__}, Python {sys.version.split()[0]}; {version}")
    print(f"{'case':<34}{'imgloop':>12}{'other':>12}  {'':<20}{'ratio':>8}")
    for name in args.cases or CASES:
        with tempfile.TemporaryDirectory(prefix="imgloop-bench-", dir=args.directory) as directory:
            for row in CASES[name](Path(directory), args.runs):
                print(row, flush=True)


if __name__ == "__main__":
    main()
