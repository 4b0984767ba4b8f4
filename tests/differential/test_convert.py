"""300 random images and all fixtures: convert writes qemu-img's bytes, with holes no worse than its own."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.command import call
from tests.differential import judge
from tests.differential.images import make
from tests.differential.test_compare import READABLE
from tests.recorded import Fixture, holes_of, restore

pytestmark = judge.needs_qemu

SEEDS = range(300)


def convert_alike(directory: Path, *words: str, sparse: int = 4096) -> None:
    """Both convert with the same words: the same bytes, and ours has no fewer holes."""
    words = ("-S", str(sparse), *words)
    theirs = judge.run("convert", "-O", "raw", *words, "theirs.raw", cwd=directory)
    ours = call("--trust", "convert", "-O", "raw", *words, "ours.raw", cwd=directory)
    assert (ours.rc, ours.out) == (theirs.rc, theirs.out), ours.err
    one, other = directory / "ours.raw", directory / "theirs.raw"
    if "-l" in words and one.stat().st_size != other.stat().st_size:
        # a snapshot has the size that the disk had then, which QEMU cuts off at, or stretches to, today's
        common = min(one.stat().st_size, other.stat().st_size)
        assert one.read_bytes()[:common] == other.read_bytes()[:common]
    else:
        assert judge.first_difference(one, other) is None
        if sparse <= 4096:  # above, a short run of zeros is a hole for QEMU only where it happens to begin to read
            assert data_bytes(one) <= data_bytes(other)
    one.unlink()
    other.unlink()


def data_bytes(path: Path) -> int:
    """How much of a file is no hole (bytes), once it is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size - sum(length for _, length in holes_of(path))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_image(seed: int, tmp_path: Path) -> None:
    image = make(seed, tmp_path)
    where, format = image.directory, image.format
    chance = random.Random(seed)
    convert_alike(where, "-f", format, image.path)
    sparse = chance.choice((0, 512, 8192, 65536, 1 << 20))
    convert_alike(where, "-f", format, "-m", str(chance.randrange(1, 5)), image.path, sparse=sparse)
    for name in image.snapshots:
        convert_alike(where, "-f", format, "-l", "snapshot.name=" + name.replace(",", ",,"), image.path)
    into_existing(where, format, image.path, chance)


def into_existing(where: Path, format: str, path: str, chance: random.Random) -> None:
    """-n, into a file full of something else: bytes behind the image stay."""
    size = judge.info(path, cwd=where, fmt=format)["virtual-size"]
    filling = chance.randbytes(size + chance.choice((0, 512, 70000)))
    for name in ("ours.raw", "theirs.raw"):
        (where / name).write_bytes(filling)
    sparse = ("-S", chance.choice(("0", "4k", "64k")))
    assert call("--trust", "convert", "-n", *sparse, "-f", format, path, "ours.raw", cwd=where).rc == 0
    assert judge.run("convert", "-n", *sparse, "-O", "raw", "-f", format, path, "theirs.raw", cwd=where).rc == 0
    assert (where / "ours.raw").read_bytes() == (where / "theirs.raw").read_bytes()
    assert (where / "ours.raw").stat().st_size == len(filling)


@pytest.mark.parametrize("fixture", READABLE, ids=[fixture.name for fixture in READABLE])
def test_fixture(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    restore("zlib-4k.qcow2", tmp_path)
    convert_alike(tmp_path, "-f", fixture.format, fixture.name)
    convert_alike(tmp_path, "-f", fixture.format, fixture.name, sparse=0)
    convert_alike(tmp_path, fixture.name, "zlib-4k.qcow2")
    for name in fixture.said["snapshots"]:
        convert_alike(tmp_path, "-f", fixture.format, "-l", f"snapshot.name={name}", fixture.name)
