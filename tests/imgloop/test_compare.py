"""compare: its words and exit codes, what it does not read, and the list of all differences."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

import imgloop
from imgloop.compare import Difference, compare, differences
from imgloop.formats.source import Source
from tests.command import call
from tests.differential import judge

MIB = 1 << 20


def pair(directory: Path, first: bytes, second: bytes) -> tuple[Path, Path]:
    """Two raw files."""
    (directory / "a.raw").write_bytes(first)
    (directory / "b.raw").write_bytes(second)
    return directory / "a.raw", directory / "b.raw"


def all_of(a: Path, b: Path) -> list[Difference]:
    with imgloop.open(a, "raw") as first, imgloop.open(b, "raw") as second:
        return list(differences(first, second))


@pytest.mark.parametrize(
    "words",
    [
        ("a.raw",),
        ("a.raw", "b.raw", "a.raw"),
        ("a.raw", "missing"),
        ("missing", "a.raw"),
        ("-f", "nothing", "a.raw", "b.raw"),
        ("--image-opts", "-f", "raw", "a.raw", "b.raw"),
        ("-q", "a.raw", "b.raw"),
        ("-s", "a.raw", "short.raw"),
        ("a.raw", "short.raw"),
        ("-f", "qcow2", "a.raw", "b.raw"),
    ],
)
@judge.needs_qemu
def test_words_and_exit_codes_are_qemus(words: tuple[str, ...], tmp_path: Path) -> None:
    pair(tmp_path, bytes(4096) + b"a" * 4096, bytes(4096) + b"b" * 4096)
    (tmp_path / "short.raw").write_bytes(bytes(4096))
    ours, theirs = call("compare", *words, cwd=tmp_path), judge.run("compare", *words, cwd=tmp_path)
    assert (ours.rc, ours.out) == (theirs.rc, theirs.out)
    if theirs.err:
        assert theirs.err.splitlines()[0].removeprefix("qemu-img: ") in ours.err


@judge.needs_qemu
def test_a_damaged_stream_is_exit_code_4(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"".join(b"%07d\n" % number for number in range(64 << 10)))
    judge.run("convert", "-f", "raw", "-O", "qcow2", "-c", "a.raw", "a.qcow2", cwd=tmp_path)
    with (tmp_path / "a.qcow2").open("r+b") as file:
        file.seek(0x50000)
        file.write(b"\xff" * 64)
    words = ("compare", "-F", "raw", "a.qcow2", "a.raw")
    ours, theirs = call(*words, cwd=tmp_path), judge.run(*words, cwd=tmp_path)
    assert ours.rc == theirs.rc == 4
    assert "Error while reading offset 0 of a.qcow2: Input/output error" in theirs.err
    assert "Error while reading offset 0 of a.qcow2: Input/output error" in ours.err


@judge.needs_qemu
def test_a_damaged_table_is_exit_code_3(tmp_path: Path) -> None:
    judge.run("create", "-f", "qcow2", "a.qcow2", "1M", cwd=tmp_path)
    (tmp_path / "b.raw").write_bytes(bytes(MIB))
    with (tmp_path / "a.qcow2").open("r+b") as file:
        file.seek(0x30000)
        file.write((0x40200).to_bytes(8, "big"))
    words = ("compare", "-F", "raw", "a.qcow2", "b.raw")
    ours, theirs = call(*words, cwd=tmp_path), judge.run(*words, cwd=tmp_path)
    assert ours.rc == theirs.rc == 3
    assert "Sector allocation test failed for a.qcow2" in theirs.err
    assert "Sector allocation test failed for a.qcow2" in ours.err


def test_every_difference_and_its_cause(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(3 * MIB)
    first = bytearray(noise)
    second = bytearray(noise)
    second[700] ^= 1
    second[MIB - 1 : MIB + 1] = bytes(byte ^ 1 for byte in second[MIB - 1 : MIB + 1])
    a, b = pair(tmp_path, bytes(first), bytes(second) + bytes(8192) + b"x" * 512 + bytes(512))
    assert all_of(a, b) == [
        Difference(512, 512, "data"),
        Difference(MIB - 512, 1024, "data"),
        Difference(3 * MIB, 8192, "length"),
        Difference(3 * MIB + 8192, 512, "data"),
        Difference(3 * MIB + 8704, 512, "length"),
    ]
    ours = call("compare", "--all", "--output", "json", "-f", "raw", "-F", "raw", a, b)
    assert ours.rc == 1
    assert ours.json["totals"] == {"data": 2048, "allocation": 0, "length": 8704}
    assert not ours.json["identical"]


def test_allocation_alone_is_a_difference_only_when_strict(tmp_path: Path) -> None:
    a, b = pair(tmp_path, bytes(64 << 10), b"")
    os.truncate(b, 64 << 10)
    with b.open("rb") as file:
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE):
            pytest.skip("this file system keeps no holes")
    with a.open("rb") as file:
        os.fsync(file.fileno())
    assert all_of(a, b) == [Difference(0, 64 << 10, "allocation")]
    words = ("compare", "--all", "-f", "raw", "-F", "raw", a, b)
    assert (call(*words).rc, call(*words[:2], "-s", *words[2:]).rc) == (0, 1)


@judge.needs_qemu
def test_the_same_bytes_of_the_same_file_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.raw").write_bytes(random.Random(1).randbytes(4 * MIB))
    words = ("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw")
    judge.run(*words, "a.qcow2", cwd=tmp_path)
    shutil.copyfile(tmp_path / "a.qcow2", tmp_path / "b.qcow2")
    read = []
    real = Source.readinto

    def counting(self: Source, buffer: memoryview, offset: int) -> None:
        if self.name.endswith(".raw"):
            read.append((offset, len(buffer)))
        real(self, buffer, offset)

    monkeypatch.setattr(Source, "readinto", counting)
    with imgloop.open(tmp_path / "a.qcow2") as a, imgloop.open(tmp_path / "b.qcow2") as b:
        assert compare(a, b).identical
    assert read == []
