"""convert: its words, what it refuses, what it leaves behind when it is stopped, and what it saves."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import call
from tests.differential import judge
from tests.recorded import FIXTURES, holes_of, restore

MIB = 1 << 20


def raw(path: Path, *pieces: bytes) -> bytes:
    """A file of these pieces; its bytes."""
    path.write_bytes(b"".join(pieces))
    return path.read_bytes()


def test_zeros_in_data_become_holes(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(8192)
    whole = raw(tmp_path / "a.raw", data, bytes(64 << 10), data, bytes(5 * MIB), b"x")
    assert call("convert", "-f", "raw", tmp_path / "a.raw", tmp_path / "b.raw").rc == 0
    assert (tmp_path / "b.raw").read_bytes() == whole + bytes(511)
    with (tmp_path / "b.raw").open("rb") as file:
        os.fsync(file.fileno())
    assert [8192, 64 << 10] in holes_of(tmp_path / "b.raw")


def test_large_holes_only(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(8192)
    raw(tmp_path / "a.raw", data, bytes(16 << 10), data, bytes(128 << 10), data)
    assert call("convert", "-S", "64k", "-f", "raw", tmp_path / "a.raw", tmp_path / "b.raw").rc == 0
    with (tmp_path / "b.raw").open("rb") as file:
        os.fsync(file.fileno())
    assert holes_of(tmp_path / "b.raw") == [[32 << 10, 128 << 10]]


def test_several_sources_in_a_row(tmp_path: Path) -> None:
    first, second = raw(tmp_path / "a.raw", b"a" * 700), raw(tmp_path / "b.raw", b"b" * 100_000)
    (tmp_path / "c.raw").write_bytes(b"old")
    words = [tmp_path / name for name in ("a.raw", "b.raw", "a.raw", "c.raw")]
    assert call("convert", "-f", "raw", *words).rc == 0
    pad = bytes(324)
    assert (tmp_path / "c.raw").read_bytes() == first + pad + second + bytes(-len(second) % 512) + first + pad


@pytest.mark.parametrize(
    "words",
    [
        ("disk.qcow2",),
        ("-S", "1000", "disk.qcow2", "x"),
        ("-S", "32M", "disk.qcow2", "x"),
        ("-S", "much", "disk.qcow2", "x"),
        ("-m", "0", "disk.qcow2", "x"),
        ("-m", "17", "disk.qcow2", "x"),
        ("-m", "two", "disk.qcow2", "x"),
        ("-l", "1", "disk.qcow2", "disk.qcow2", "x"),
        ("-O", "nothing", "disk.qcow2", "x"),
        ("--target-is-zero", "disk.qcow2", "x"),
        ("-n", "disk.qcow2", "missing"),
        ("-n", "disk.qcow2", "small"),
        ("missing", "x"),
        ("disk.qcow2", "missing/x"),
    ],
)
@judge.needs_qemu
def test_refusals_are_qemus(words: tuple[str, ...], tmp_path: Path) -> None:
    restore("disk.qcow2", tmp_path)
    (tmp_path / "small").write_bytes(bytes(512))
    theirs = judge.run("convert", *words, cwd=tmp_path)
    ours = call("convert", *words, cwd=tmp_path)
    assert ours.rc == theirs.rc == 1
    said = theirs.err.splitlines()[0].removeprefix("qemu-img: ").partition(" You may use")[0]
    assert said.partition("error while converting raw: ")[2] or said in ours.err
    assert not (tmp_path / "x").exists()


@pytest.mark.datafiles(FIXTURES / "disk.qcow2")
def test_an_image_is_not_converted_onto_itself(fixture_dir: Path) -> None:
    before = (fixture_dir / "disk.qcow2").read_bytes()
    ours = call("convert", "disk.qcow2", "disk.qcow2", cwd=fixture_dir)
    assert ours.rc == 1
    assert "is a file of the source" in ours.err
    assert (fixture_dir / "disk.qcow2").read_bytes() == before


@pytest.mark.datafiles(FIXTURES / "disk.qcow2")
def test_other_targets_are_a_clear_error(fixture_dir: Path) -> None:
    ours = call("convert", "-O", "qcow2", "disk.qcow2", "x", cwd=fixture_dir)
    assert (ours.rc, ours.err) == (1, "imgloop: error: Cannot write format 'qcow2': only raw\n")


@pytest.mark.datafiles(FIXTURES / "disk.qcow2")
def test_progress_as_json(fixture_dir: Path) -> None:
    ours = call("convert", "--progress", "json", "disk.qcow2", "x.raw", cwd=fixture_dir)
    last = json.loads(ours.err.splitlines()[-1])
    assert last["done"] == last["total"] == (fixture_dir / "x.raw").stat().st_size


@judge.needs_qemu
def test_what_cannot_be_read(tmp_path: Path) -> None:
    """A damaged stream and a damaged table: nothing is left without --salvage, all else is saved with it."""
    data = raw(tmp_path / "a.raw", b"".join(b"%07d\n" % number for number in range(64 << 10)))
    judge.run("convert", "-f", "raw", "-O", "qcow2", "-c", "a.raw", "a.qcow2", cwd=tmp_path)
    with (tmp_path / "a.qcow2").open("r+b") as file:
        file.seek(0x50000)  # the first stream is right behind the metadata
        file.write(b"\xff" * 64)
    theirs = judge.run("convert", "-O", "raw", "a.qcow2", "x.raw", cwd=tmp_path)
    ours = call("convert", "a.qcow2", "b.raw", cwd=tmp_path)
    assert ours.rc == theirs.rc == 1
    assert "error while reading at byte 0: Input/output error" in ours.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".b", "b"))) == []
    ours = call("convert", "--salvage", "a.qcow2", "b.raw", cwd=tmp_path)
    assert ours.rc == 3
    assert "lost 65536 bytes at offset 0, zeros instead: Image is corrupt" in ours.err
    assert (tmp_path / "b.raw").read_bytes() == bytes(65536) + data[65536:]


@judge.needs_qemu
def test_a_damaged_table(tmp_path: Path) -> None:
    judge.run("create", "-f", "qcow2", "a.qcow2", "1G", cwd=tmp_path)
    judge.run("-f", "qcow2", "-c", "write -P 7 600M 64k", "a.qcow2", cwd=tmp_path, tool="qemu-io")
    with (tmp_path / "a.qcow2").open("r+b") as file:
        file.seek(0x30000)
        file.write((0x40200).to_bytes(8, "big"))
    theirs = judge.run("convert", "-O", "raw", "a.qcow2", "x.raw", cwd=tmp_path)
    ours = call("convert", "a.qcow2", "b.raw", cwd=tmp_path)
    assert ours.rc == theirs.rc == 1
    assert theirs.err.splitlines()[-1].removeprefix("qemu-img: ") in ours.err
    assert not (tmp_path / "b.raw").exists()
    ours = call("convert", "--salvage", "a.qcow2", "b.raw", cwd=tmp_path)
    assert ours.rc == 3
    assert "lost 536870912 bytes at offset 0" in ours.err
    with (tmp_path / "b.raw").open("rb") as file:
        file.seek(600 * MIB)
        assert file.read(65536) == b"\7" * 65536


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_nothing(number: int, code: int, said: str, tmp_path: Path) -> None:
    with (tmp_path / "a.raw").open("wb") as file:
        for _ in range(64):
            file.write(b"x" * MIB)
    sources = ["a.raw"] * 64
    running = subprocess.Popen(
        [sys.executable, "-m", "imgloop", "convert", "--progress", "json", "-f", "raw", *sources, "b.raw"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".imgloop-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert f"imgloop: error: {said}" in err.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with (tmp_path / "a.raw").open("wb") as file:
        file.write(b"x" * MIB * 3)
    script = "ulimit -f 2048; trap '' XFSZ; exec \"$@\""
    done = subprocess.run(
        ["bash", "-c", script, "sh", sys.executable, "-m", "imgloop", "convert", "-f", "raw", "a.raw", "b.raw"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 1
    assert done.stderr == "imgloop: error: Could not write 'b.raw': File too large [of 'b.raw']\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]


@pytest.mark.skipif(shutil.which("mkfifo") is None, reason="no FIFOs here")
def test_a_pipe_gets_every_byte(tmp_path: Path) -> None:
    data = raw(tmp_path / "a.raw", b"a" * 5000, bytes(70000), b"b" * 1000)
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        assert call("convert", "-f", "raw", tmp_path / "a.raw", tmp_path / "pipe").rc == 0
        assert reader.stdout is not None
        assert reader.stdout.read() == data + bytes(-len(data) % 512)
