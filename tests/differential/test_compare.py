"""300 random images against their conversions and damaged copies: compare says what qemu-img says."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.command import Answer, call
from tests.differential import judge
from tests.differential.images import RandomImage, make
from tests.recorded import Fixture, all_fixtures, load, restore

pytestmark = judge.needs_qemu

SEEDS = range(300)
READABLE = [fixture for fixture in all_fixtures() if fixture.said["sha256"]]


def compare_alike(directory: Path, *words: str) -> Answer:
    """Ask both; the same lines and the same exit code."""
    ours = call("--trust", "compare", *words, cwd=directory)
    theirs = judge.run("compare", *words, cwd=directory)
    assert (ours.rc, ours.out) == (theirs.rc, theirs.out), words
    if theirs.rc > 1:
        message = theirs.err.strip().splitlines()[-1].removeprefix("qemu-img: ")
        assert ours.err.splitlines()[-1].startswith(f"imgloop: error: {message}")
    return ours


def pair_up(directory: Path, image: str, format: str, other: str, other_format: str) -> None:
    """Two images both ways round, plain and strict."""
    first, second = (
        ("-f", format, "-F", other_format, image, other),
        ("-f", other_format, "-F", format, other, image),
    )
    for words in (first, second):
        compare_alike(directory, *words)
        compare_alike(directory, "-s", *words)


def mutate(path: Path, seed: int) -> None:
    """Change a byte somewhere, or the length."""
    chance = random.Random(seed)
    size = path.stat().st_size
    if not size or chance.random() < 0.2:
        os.truncate(path, max(0, size + chance.choice((-512, 512, 70000, -70000, 1))))
        return
    with path.open("r+b") as file:
        for _ in range(chance.randrange(1, 4)):
            file.seek(chance.randrange(size))
            file.write(chance.choice((b"\0", b"\1", b"\xff" * 700)))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_image(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make(seed, tmp_path)
    monkeypatch.chdir(image.directory)
    judge.convert(image.path, image.directory / "same.raw", cwd=image.directory, fmt=image.format)
    pair_up(image.directory, image.path, image.format, "same.raw", "raw")
    shutil.copyfile("same.raw", "other.raw")
    mutate(Path("other.raw"), seed)
    pair_up(image.directory, image.path, image.format, "other.raw", "raw")
    pair_up(image.directory, image.path, image.format, *_repacked(image))
    if image.format == "qcow2":
        _damaged(image)


def _repacked(image: RandomImage) -> tuple[str, str]:
    """The mutated copy as a qcow2 image."""
    options = random.Random(image.seed).choice(((), ("-c",), ("-o", "cluster_size=512"), ("-S", "0")))
    said = judge.run(
        "convert", "-f", "raw", "-O", "qcow2", *options, "other.raw", "packed.qcow2", cwd=image.directory
    )
    assert said.rc == 0
    return "packed.qcow2", "qcow2"


def _damaged(image: RandomImage) -> None:
    """Random bytes written over the image: the same exit codes while it can be opened at all."""
    chance = random.Random(image.seed)
    path = image.directory / image.path
    with path.open("r+b") as file:
        for _ in range(10):
            file.seek(chance.randrange(4096, max(4097, path.stat().st_size)))
            file.write(chance.randbytes(3))
    theirs = judge.run("compare", "-f", "qcow2", "-F", "raw", image.path, "same.raw", cwd=image.directory)
    ours = call("--trust", "compare", "-f", "qcow2", "-F", "raw", image.path, "same.raw", cwd=image.directory)
    assert (ours.rc, ours.out) == (theirs.rc, theirs.out)


@pytest.mark.parametrize("fixture", READABLE, ids=[fixture.name for fixture in READABLE])
def test_fixture(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    judge.convert(fixture.name, tmp_path / "same.raw", cwd=tmp_path, fmt=fixture.format)
    pair_up(tmp_path, fixture.name, fixture.format, "same.raw", "raw")
    other = load("disk.qcow2")
    restore(other.name, tmp_path)
    pair_up(tmp_path, fixture.name, fixture.format, other.name, other.format)
