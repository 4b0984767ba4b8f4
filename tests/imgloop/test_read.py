"""`read` and `dd`: guest bytes out, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import imgloop
from tests.command import call
from tests.differential import judge
from tests.recorded import restore


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The small real disk, with the raw file that it stands for beside it."""
    path = restore("disk.qcow2", tmp_path)
    with imgloop.open(path) as image:
        (tmp_path / "disk.raw").write_bytes(image.pread(image.size, 0))
    return path


def imgloop_process(*args: str | Path, cwd: Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-m", "imgloop", *(str(arg) for arg in args)]
    return subprocess.run(words, cwd=cwd, capture_output=True, **options)  # type: ignore[call-overload, no-any-return]  # passed on


@pytest.mark.parametrize(
    ("offset", "length", "start", "size"),
    [
        ("0", "512", 0, 512),
        ("2048s", "8s", 1 << 20, 4096),
        ("1M", "100k", 1 << 20, 102400),
        ("0x100", "0x10", 256, 16),
        ("64M", "0", 1 << 26, 0),
        ("67108863", "1", (1 << 26) - 1, 1),
        ("0.5M", "1.5K", 1 << 19, 1536),
    ],
)
def test_ranges(disk: Path, offset: str, length: str, start: int, size: int) -> None:
    expected = disk.with_suffix(".raw").read_bytes()[start : start + size]
    answer = imgloop_process("read", "--offset", offset, "--length", length, disk, cwd=disk.parent)
    assert (answer.returncode, answer.stderr, answer.stdout) == (0, b"", expected)
    out = disk.parent / "out"
    written = call("read", "--offset", offset, "--length", length, "-o", out, disk)
    assert (written.rc, written.out, written.err, out.read_bytes()) == (0, "", "", expected)


def test_out_is_sparse_and_replaces_what_was_there(disk: Path) -> None:
    out = disk.parent / "out"
    out.write_text("before")
    out.chmod(0o640)
    assert call("read", "-o", out, disk).rc == 0
    assert out.read_bytes() == disk.with_suffix(".raw").read_bytes()
    assert out.stat().st_mode & 0o777 == 0o640
    assert out.stat().st_blocks * 512 < 2 << 20  # of 64 MiB
    assert {path.name for path in disk.parent.iterdir()} == {"disk.qcow2", "disk.raw", "out"}


def test_stdout_may_be_a_pipe_a_file_or_an_appended_file(disk: Path) -> None:
    expected = disk.with_suffix(".raw").read_bytes()
    target = disk.parent / "out"
    for redirection, before in ((">", b""), (">>", b"before"), ("1<>", b"")):
        target.write_bytes(before)
        command = f'"{sys.executable}" -m imgloop read "{disk}" {redirection} "{target}"'
        subprocess.run(command, shell=True, check=True)
        assert target.read_bytes() == before + expected


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--offset", "64M", "--length", "1"), "the image has 67108864 bytes"),
        (("--offset", "65M"), "the image has 67108864 bytes"),
        (("--length", "64M", "--offset", "512"), "the image has 67108864 bytes"),
        (("--offset", "-1"), "Invalid offset specified. Must be between 0 and"),
        (("--offset", "x"), "Invalid offset specified: 'x'"),
        (("--length", "9E"), "Invalid length specified. Must be between 0 and"),
        (("-l", "no such"), "Failed to load snapshot: Can't find snapshot 'no such'"),
        (("-o", "x", "-x"), "-o and -x are mutually exclusive"),
        (("-o", "none/out"), "Could not create 'none/out': No such file or directory"),
        (("-o", "."), "Could not create '.': Is a directory"),
        (("-o", "/dev/full"), "Could not write '/dev/full': No space left on device"),
    ],
    ids=" ".join,
)
def test_refusals(disk: Path, args: tuple[str, ...], says: str) -> None:
    answer = call("read", *args, disk, cwd=disk.parent)
    assert answer.rc == 1
    assert answer.err.startswith("imgloop: error: ")
    assert says in answer.err
    assert len(answer.err.splitlines()) == 1
    assert {path.name for path in disk.parent.iterdir()} == {"disk.qcow2", "disk.raw"}


def test_snapshot_by_id_name_and_both(disk: Path) -> None:
    then = call("read", "-x", "--offset", "2162688", "--length", "48", "-l", "1", disk)
    assert "|inux 12" in then.out or "ux 12|" in then.out
    for wanted in ("before-upgrade", "snapshot.name=before-upgrade", "snapshot.id=1,snapshot.name=before-upgrade"):
        assert call("read", "-x", "--offset", "2162688", "--length", "48", "-l", wanted, disk) == then
    assert call("read", "-l", "snapshot.id=2", disk).rc == 1
    assert call("read", "-l", "snapshot.zork=2", disk).rc == 1


def test_hex_dump(disk: Path) -> None:
    """As hexdump -C prints it, but that the offsets are the guest's."""
    answer = call("read", "-x", "--offset", "1000", "--length", "4000", disk)
    raw = disk.with_suffix(".raw").read_bytes()
    lines = []
    previous = b""
    for at in range(1000, 5000, 16):
        row = raw[at : min(at + 16, 5000)]
        if row != previous:
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
            lines.append(f"{at:08x}  {row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}  |{text}|")
        elif lines[-1] != "*":
            lines.append("*")
        previous = row
    assert answer.out.splitlines() == [*lines, f"{5000:08x}"]


def test_unreadable_data_leaves_nothing(disk: Path) -> None:
    """A compressed stream is damaged: the target keeps what it had, and the error says where."""
    with imgloop.open(disk) as image:
        stream = next(row for row in image.extents() if row["stored"])
    with disk.open("r+b") as file:
        file.seek(int(stream["offset"]) + 2)
        file.write(b"\xff" * 100)
    out = disk.parent / "out"
    out.write_text("before")
    answer = call("read", "-o", out, disk)
    assert answer.rc == 1
    assert "compressed cluster at offset" in answer.err
    assert out.read_text() == "before"
    assert {path.name for path in disk.parent.iterdir()} == {"disk.qcow2", "disk.raw", "out"}


@pytest.mark.parametrize(("number", "rc"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing(tmp_path: Path, number: signal.Signals, rc: int) -> None:
    """Stopped while it writes: no temporary file stays, and the exit code names the signal."""
    image = tmp_path / "big.raw"
    with image.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
        file.truncate(1 << 40)
        file.seek((1 << 40) - 4096)
        file.write(b"x" * 4096)
    words = [sys.executable, "-m", "imgloop", "read", "-x", "big.raw"]
    out = [sys.executable, "-m", "imgloop", "read", "-o", "out", "big.raw"]
    for command in (out, words):
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            time.sleep(0.6)
            process.send_signal(number)
            _, err = process.communicate()
        if process.returncode != 0:  # it may have been done already
            assert process.returncode == rc
        assert b"Traceback" not in err
        assert {path.name for path in tmp_path.iterdir()} <= {"big.raw", "out"}


def test_progress(disk: Path) -> None:
    out = disk.parent / "out"
    assert call("read", "-o", out, disk).err == ""  # not a terminal
    lines = call("read", "--progress", "json", "-o", out, disk).err.splitlines()
    assert lines[-1] == '{"done": 67108864, "total": 67108864}'


@judge.needs_qemu
@pytest.mark.parametrize(
    "operands",
    [
        ("bs=1M",),
        ("bs=64k", "skip=16", "count=17"),
        ("bs=1M", "count=2", "skip=2"),
        ("bs=100", "count=7", "skip=1"),
        ("skip=200000",),
        ("count=0",),
        ("bs=3k", "count=5000", "skip=700"),
        ("bs=0",),
        ("bs=x",),
        ("bs=3G",),
        ("bs=",),
        ("count=-1",),
        ("skip=x",),
        ("extra",),
        ("zork=1",),
    ],
    ids=" ".join,
)
def test_dd_is_qemu_imgs(disk: Path, operands: tuple[str, ...]) -> None:
    for name in ("disk.qcow2", "disk.raw"):
        ours = call("dd", *operands, f"if={name}", "of=ours", cwd=disk.parent)
        theirs = judge.run("dd", *operands, f"if={name}", "of=theirs", cwd=disk.parent)
        assert ours.rc == theirs.rc
        if ours.rc == 0:
            assert (disk.parent / "ours").read_bytes() == (disk.parent / "theirs").read_bytes()
            skipped = "cannot skip to specified offset"
            assert (skipped in ours.err) == (skipped in theirs.err)
        else:
            first = ours.err.splitlines()[0].removeprefix("imgloop: error: ")
            assert (
                first.split(" specified")[0]
                == theirs.err.removeprefix("qemu-img: ").split(" specified")[0].strip()
            )


def test_dd_operands() -> None:
    for operands in ((), ("if=x",), ("of=x",)):
        answer = call("dd", *operands)
        assert (answer.rc, answer.err) == (1, "imgloop: error: Must specify both input and output files\n")
    assert "only raw" in call("dd", "-O", "qcow2", "if=x", "of=y").err
