"""500 random images: bytes, info, map and snapshot list are qemu-img's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import imgloop
from tests.command import call
from tests.differential import judge
from tests.differential.images import RandomImage, make

pytestmark = judge.needs_qemu

SEEDS = range(500)
CHUNK = 1 << 20


@pytest.mark.parametrize("seed", SEEDS)
def test_random_image(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make(seed, tmp_path)
    monkeypatch.chdir(image.directory)
    compare_bytes(image, None, seed)
    for name in image.snapshots:
        compare_snapshot(image, name)
    compare_info(image)
    compare_map(image)
    ours = call("--allow", ".", "snapshot", "-l", image.path).out
    theirs = judge.snapshot_list(image.path, cwd=image.directory)
    assert judge.comparable_snapshots(ours) == judge.comparable_snapshots(theirs)


def compare_bytes(image: RandomImage, snapshot: str | None, seed: int) -> None:
    """All bytes in order, then some ranges anywhere, one file object read, and the range check at the end."""
    raw = image.directory / "judge.raw"
    judge.convert(image.path, raw, cwd=image.directory, fmt=image.format)
    expected = raw.read_bytes()
    raw.unlink()
    with imgloop.open(image.path, image.format, gate=_gate(image)) as ours:
        assert ours.size == len(expected)
        for start in range(0, ours.size, CHUNK):
            assert ours.pread(min(CHUNK, ours.size - start), start) == expected[start : start + CHUNK]
        chance = random.Random(seed)
        for _ in range(40 if ours.size else 0):
            start = chance.randrange(ours.size)
            length = min(chance.choice((1, 100, 512, 4096, 70000, 3 << 20)), ours.size - start)
            assert ours.pread(length, start) == expected[start : start + length]
        file = ours.as_file()
        file.seek(-min(1000, ours.size), 2)
        assert file.read() == expected[-1000:]
        with pytest.raises(imgloop.OutOfRangeError):
            ours.pread(1, ours.size)
        extents = ours.extents()
        assert int(extents["length"].sum()) == ours.size


def compare_snapshot(image: RandomImage, name: str) -> None:
    """A snapshot's bytes. qemu-img convert cuts it off at, or stretches it to, the size that the disk has now."""
    raw = image.directory / "judge.raw"
    judge.convert(image.path, raw, cwd=image.directory, fmt=image.format, snapshot=name)
    expected = raw.read_bytes()
    raw.unlink()
    with imgloop.open(
        image.path, image.format, snapshot=f"snapshot.name={name.replace(',', ',,')}", gate=_gate(image)
    ) as ours:
        common = min(ours.size, len(expected))
        for start in range(0, common, CHUNK):
            length = min(CHUNK, common - start)
            assert ours.pread(length, start) == expected[start : start + length]


def compare_info(image: RandomImage) -> None:
    """JSON and human, the whole chain."""
    version, where = judge.version(), image.directory
    ours = call("--allow", ".", "info", "--output", "json", "--backing-chain", "-f", image.format, image.path)
    theirs = judge.info(image.path, cwd=where, backing_chain=True, fmt=image.format)
    assert ours.err == ""
    assert judge.comparable_info(ours.json, version) == judge.comparable_info(theirs, version)
    ours = call("--allow", ".", "info", "--backing-chain", "-f", image.format, image.path)
    text = judge.info_text(image.path, cwd=where, backing_chain=True, fmt=image.format)
    assert judge.comparable_info_text(ours.out, version) == judge.comparable_info_text(text, version)


def compare_map(image: RandomImage) -> None:
    """JSON and human, all of it and a part."""
    version, where = judge.version(), image.directory
    for start, length in ((0, 1 << 50), (70000, 300000)):
        part = ("--start-offset", str(start), "--max-length", str(length))
        ours = call("--allow", ".", "map", "--output", "json", *part, "-f", image.format, image.path)
        theirs = judge.map(image.path, cwd=where, fmt=image.format, start_offset=start, max_length=length)
        assert judge.comparable_map(ours.json, version) == judge.comparable_map(theirs, version)
    ours = call("--allow", ".", "map", "-f", image.format, image.path)
    said = judge.map_text(image.path, cwd=where, fmt=image.format)
    assert (ours.rc, ours.out) == (said.rc, said.out)


def _gate(image: RandomImage) -> imgloop.Gate:
    """Data files lie in the current directory, which the image itself may be below of."""
    return imgloop.Gate(allow=[image.directory])
