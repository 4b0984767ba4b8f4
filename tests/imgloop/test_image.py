"""An open image and its file object, as a library's user meets them."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import imgloop
from imgloop.names import parse
from tests.command import call
from tests.differential import judge
from tests.recorded import restore


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_stream_that_two_entries_give_two_lengths(tmp_path: Path) -> None:
    """Its cluster is not taken from the cache for the entry that cuts it short, whatever was read before."""
    path = restore("zlib-64k.qcow2", tmp_path)
    with imgloop.open(path) as image:
        first = next(row for row in image.extents() if row["stored"] > 1024)
        start = int(first["start"])
        size = image.size
    with path.open("r+b") as file:
        header = file.read(112)
        l1 = int.from_bytes(header[40:48], "big")
        file.seek(l1)
        l2 = int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
        file.seek(l2 + start // 65536 * 8)
        entry = int.from_bytes(file.read(8), "big")
        cut = entry & ~(0xFF << 54)  # no sector after the first
        other = (start // 65536 + 1) * 65536
        assert other < size
        file.seek(l2 + other // 65536 * 8)
        file.write(cut.to_bytes(8, "big"))
    with imgloop.open(path) as image:
        image.pread(512, start)
        with pytest.raises(imgloop.CorruptError):
            image.pread(512, other)


def test_a_closed_image_answers_nothing(tmp_path: Path) -> None:
    image = imgloop.open(restore("zlib-mixed.qcow2", tmp_path))
    image.pread(image.size, 0)
    image.close()
    image.close()
    for call_it in (lambda: image.pread(1, 0), lambda: image.extents(), lambda: image.pread(image.size, 0)):
        with pytest.raises(imgloop.ImageError):
            call_it()


def test_nothing_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the data file of an image that is refused after it was opened."""
    path = restore("data.qcow2", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = open_files()
    with imgloop.open(path):
        assert open_files() == before + 2
    broken = bytearray(path.read_bytes())
    broken[16:20] = (5000).to_bytes(4, "big")  # backing_file_size
    broken[8:16] = (200).to_bytes(8, "big")
    path.write_bytes(broken)
    for _ in range(3):
        with pytest.raises(imgloop.OpenError):
            imgloop.open(path)
    assert open_files() == before


def test_file_object(tmp_path: Path) -> None:
    with imgloop.open(restore("v3.qcow2", tmp_path)) as image:
        file = image.as_file()
        expected = image.pread(image.size, 0)
        assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(expected).digest()
        assert file.seek(image.size + 10) == image.size + 10
        assert file.read(1) == b""
        assert file.seek(-3, os.SEEK_END) == image.size - 3
        assert file.read() == expected[-3:]
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
        assert io.BufferedReader(image.as_file()).peek(4)[:4] == expected[:4]
        file.close()
        for call_it in (file.tell, file.readable, lambda: file.seek(0), lambda: file.read(1)):
            with pytest.raises(ValueError, match="closed"):
                call_it()


def test_a_zip_within_an_image(tmp_path: Path) -> None:
    raw = tmp_path / "zip.raw"
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("name", b"content")
    raw.write_bytes(raw.read_bytes().rjust(4096, b"\0"))  # ends at the end of a sector
    with imgloop.open(raw, "raw") as image, zipfile.ZipFile(image.as_file()) as archive:
        assert archive.read("name") == b"content"


def test_threads_read_at_once(tmp_path: Path) -> None:
    with imgloop.open(restore("chain-top.qcow2", tmp_path)) as image, ThreadPoolExecutor(4) as threads:
        expected = image.pread(image.size, 0)
        offsets = range(0, image.size - 5000, 4999)
        read = threads.map(lambda offset: image.pread(5000, offset), offsets)
        assert all(data == expected[at : at + 5000] for at, data in zip(offsets, read, strict=True))


def test_a_forked_child_reads(tmp_path: Path) -> None:
    """The threads that decode do not come along."""
    code = (
        "import imgloop, os, signal, sys\n"
        "image = imgloop.open(sys.argv[1], limits=imgloop.Limits(cluster_cache=0))\n"
        "image.pread(image.size, 0)\n"
        "child = os.fork()\n"
        "signal.alarm(20)\n"
        "if child == 0:\n"
        "    image.pread(image.size, 0); os._exit(7)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    path = restore("zlib-4k.qcow2", tmp_path)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], check=False)
    assert done.returncode == 7, signal.strsignal(-done.returncode) if done.returncode < 0 else done


@pytest.mark.parametrize("verb", ["read", "dd"])
def test_no_file_of_the_image_is_overwritten(tmp_path: Path, verb: str) -> None:
    restore("chain-top.qcow2", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for target in ("chain-top.qcow2", "chain-base.qcow2", "link"):
        if target == "link":
            (tmp_path / "link").symlink_to("chain-mid.qcow2")
        words = ["-o", target, "chain-top.qcow2"] if verb == "read" else [f"of={target}", "if=chain-top.qcow2"]
        answer = call(verb, *words, cwd=tmp_path)
        assert answer.rc == 1
        assert "needs this file" in answer.err
    (tmp_path / "link").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("verb", ["info", "map", "read", "dump", "--help"])
def test_closed_stdout(tmp_path: Path, verb: str) -> None:
    restore("v3.qcow2", tmp_path)
    command = f'"{sys.executable}" -m imgloop {verb} v3.qcow2 >&-'
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "imgloop: error: stdout is closed\n")


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"raw","file":{"driver":["x"],"filename":"y"}}',
        'json:{"driver":"raw","file":{"driver":{},"filename":"y"}}',
        'json:{"driver":"raw","size":"9999E","file.filename":"x"}',
        'json:{"driver":5,"file.filename":"x"}',
        'json:{"driver":"qcow2","backing":{"driver":[]},"file.filename":"x"}',
    ],
)
def test_hostile_json(name: str) -> None:
    with pytest.raises(imgloop.OpenError):
        parse(name)


def test_options_that_the_probed_format_does_not_have(tmp_path: Path) -> None:
    restore("v3.qcow2", tmp_path)
    answer = call("info", "--image-opts", "file.filename=v3.qcow2,offset=512", cwd=tmp_path)
    assert answer.rc == 1
    assert "Block format 'qcow2' does not support the option 'offset'" in answer.err


def test_holes_of_the_host_file_stay_holes(tmp_path: Path) -> None:
    raw = tmp_path / "sparse.raw"
    with raw.open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(1 << 30)
    assert call("read", "-o", tmp_path / "out", raw).rc == 0
    assert (tmp_path / "out").stat().st_size == 1 << 30
    assert (tmp_path / "out").stat().st_blocks * 512 < 1 << 20


@judge.needs_qemu
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")
def test_the_gate_judges_before_it_opens(tmp_path: Path) -> None:
    judge.run("create", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", "a.qcow2", "1M", cwd=tmp_path)
    words = ["strace", "-f", "-e", "openat", sys.executable, "-m", "imgloop", "read", "-x", "a.qcow2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    about = [line for line in done.stderr.splitlines() if "/etc/passwd" in line or "/proc/self/fd" in line]
    assert any("O_PATH" in line for line in about)
    assert sum("/proc/self/fd" in line for line in about if "openat" in line) == 1  # the image's own
