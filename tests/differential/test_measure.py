"""300 random images, all fixtures and many options: measure says what qemu-img says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.command import call
from tests.differential import judge
from tests.differential.images import make
from tests.differential.test_compare import READABLE
from tests.recorded import Fixture, restore

pytestmark = judge.needs_qemu

SEEDS = range(300)
LAYOUTS = (
    *("", "cluster_size=512", "cluster_size=4k", "cluster_size=2M", "compat=0.10", "refcount_bits=1"),
    *("refcount_bits=64,cluster_size=1k", "extended_l2=on,cluster_size=16k", "preallocation=metadata"),
    *("preallocation=full", "preallocation=falloc,cluster_size=32k", "backing_file=x,backing_fmt=raw"),
    *("data_file=a,,b.raw", "lazy_refcounts=on,compression_type=zstd", "compat=0.10,extended_l2=on"),
)
REFUSED = (
    *("cluster_size=1000", "cluster_size=256", "cluster_size=4M", "compat=2", "foo=1", "preallocation=foo"),
    *("refcount_bits=3", "refcount_bits=128", "refcount_bits=0", "compat=0.10,refcount_bits=1"),
    *("extended_l2=on,cluster_size=8k", "extended_l2=perhaps"),
)


def measure_alike(directory: Path, *words: str) -> None:
    """Ask both: JSON, the human form, the exit code, and the first line of an error."""
    ours = call("--trust", "measure", "--output", "json", *words, cwd=directory)
    theirs = judge.run("measure", "--output", "json", *words, cwd=directory)
    assert ours.rc == theirs.rc, (words, ours.err, theirs.err)
    if ours.rc:
        message = theirs.err.splitlines()[0].removeprefix("qemu-img: ")
        assert message in ours.err
        return
    assert ours.out == theirs.out, words
    assert call("--trust", "measure", *words, cwd=directory).out == judge.run("measure", *words, cwd=directory).out


@pytest.mark.parametrize("seed", SEEDS)
def test_random_image(seed: int, tmp_path: Path) -> None:
    image = make(seed, tmp_path)
    chance = random.Random(seed)
    measure_alike(image.directory, "-f", image.format, image.path)
    measure_alike(image.directory, "-O", "qcow2", "-f", image.format, image.path)
    options = chance.choice(LAYOUTS[1:])
    measure_alike(image.directory, "-O", "qcow2", "-o", options, "-f", image.format, image.path)


@pytest.mark.parametrize("fixture", READABLE, ids=[fixture.name for fixture in READABLE])
def test_fixture(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    for options in LAYOUTS:
        chosen = ("-o", options) if options else ()
        measure_alike(tmp_path, "-O", "qcow2", *chosen, "-f", fixture.format, fixture.name)


@pytest.mark.parametrize("size", ["0", "1", "1000", "64k", "1G", "1T", "100T", "1E", "7E"])
def test_empty_disk(size: str, tmp_path: Path) -> None:
    measure_alike(tmp_path, "--size", size)
    for options in LAYOUTS:
        measure_alike(tmp_path, "-O", "qcow2", *(("-o", options) if options else ()), "--size", size)


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_cannot_be(options: str, tmp_path: Path) -> None:
    measure_alike(tmp_path, "-O", "qcow2", "-o", options, "--size", "1G")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--size", "1G", "disk.qcow2"),
        ("disk.qcow2", "disk.qcow2"),
        ("-f", "raw"),
        ("-l", "x", "--size", "1G"),
        ("-O", "vmdk", "disk.qcow2"),
        ("-O", "nothing", "disk.qcow2"),
        ("--size", "-1"),
        ("missing.qcow2",),
    ],
)
def test_words_that_do_not_go_together(words: tuple[str, ...], tmp_path: Path) -> None:
    restore("disk.qcow2", tmp_path)
    theirs = judge.run("measure", *words, cwd=tmp_path)
    ours = call("measure", *words, cwd=tmp_path)
    assert ours.rc == theirs.rc == 1
    if words != ("--size", "-1"):  # QEMU takes the sign for a bad suffix here, and for a range elsewhere
        assert theirs.err.splitlines()[0].removeprefix("qemu-img: ") in ours.err
