"""The `dump` verb: its words, its two forms of output, its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imgloop.cli import run
from imgloop.formats.qcow2.dump import PARTS
from tests.recorded import FIXTURES

pytestmark = pytest.mark.datafiles(FIXTURES / "disk.qcow2", FIXTURES / "bitmaps.qcow2", FIXTURES / "extl2.qcow2")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def inside(fixture_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(fixture_dir)
    return fixture_dir


def patch(name: str, offset: int, data: bytes) -> None:
    with Path(name).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def lines(capsys: Capture) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_sound_image(capsys: Capture) -> None:
    assert run(["dump", "disk.qcow2"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for row in (
        "image: disk.qcow2",
        "  0x28      8  l1_table_offset          0xc000                            49152",
        "  0x14      4  cluster_bits             0xe                                  14  "
        "cluster size: 16 KiB (16384 bytes)",
        "  0x70     0x6803f857     384  feature names",
        "         1  0xc008         0x0000000000038000  0x38000          -       0x2000000",
        "         0  0x4000         0x0000000000008000  0x8000             0..8191",
        "  5..5                    refcount 12         at 0x14000..0x17fff",
        "      name                   'before-upgrade'",
        "bitmaps: none",
    ):
        assert row in shown.out.splitlines()
    assert "problems" not in shown.out
    assert not [row for row in shown.out.splitlines() if row != row.rstrip()]


@pytest.mark.parametrize("part", PARTS)
def test_one_part(part: str, capsys: Capture) -> None:
    assert run(["dump", "--output", "json", "disk.qcow2", part]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["filename", "format", "file-size", part, "problems"]


def test_json_holds_all_parts_and_survives_many_rows(capsys: Capture) -> None:
    assert run(["dump", "--output", "json", "bitmaps.qcow2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [key for key in found if key in PARTS] == list(PARTS)
    assert found["problems"] == []
    assert [row["name"] for row in found["bitmaps"]["rows"]] == ["nightly", "weekly"]
    assert found["snapshots"]["rows"] == []


def test_l2(capsys: Capture) -> None:
    assert run(["dump", "extl2.qcow2", "l2", "0x0"]) == 0
    row = next(row for row in lines(capsys) if row.startswith("         0  0x10000"))
    assert row.split() == [
        *("0", "0x10000", "0x8000000000014000", "mixed", "0x14000", "copied", "0x0"),
        "DD0D......D.....00..............",
    ]


def test_a_damaged_image(capsys: Capture) -> None:
    patch("disk.qcow2", 96, b"\0\0\0\7")  # refcount_order
    patch("disk.qcow2", 0xC000, b"\1")  # a reserved bit of the first L1 entry
    assert run(["dump", "disk.qcow2"]) == 1
    shown = capsys.readouterr()
    message = "Reference count entry width too large; may not exceed 64 bits"
    place = "[refcount_order at offset 0x60 of 'disk.qcow2' is 7 (0x7)]"
    assert shown.err == f"imgloop: error: {message} {place}\n"
    row = next(row for row in shown.out.splitlines() if " refcount_order " in row)
    assert row.endswith(f"  ! {message}")
    assert shown.out.splitlines()[-3:] == [
        "problems: 2",
        f"  {message} {place}",
        "  found L1 entry with reserved bits set: 100000000044000 "
        "[L1 entry 0 at offset 0xc000 of 'disk.qcow2' is 72057594038206464 (0x100000000044000)]",
    ]


def test_problems_in_json(capsys: Capture) -> None:
    patch("disk.qcow2", 36, b"\0\0\0\0")  # l1_size
    assert run(["dump", "--output", "json", "disk.qcow2"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [
        {"message": "L1 table is too small", "field": "l1_size", "offset": 36, "value": 0}
    ]


def test_names_from_the_image_do_not_reach_the_terminal(capsys: Capture) -> None:
    patch("bitmaps.qcow2", 0x40000 + 24, b"\x1b[2J\n\xff")
    patch("disk.qcow2", 0x7A, b"\x1b]0;owned\7\0")  # in the feature name table
    assert run(["dump", "bitmaps.qcow2", "bitmaps"]) == 0
    assert run(["dump", "disk.qcow2", "extensions"]) == 0
    shown = capsys.readouterr().out
    assert r"'\x1b[2J\n\udcff" in shown
    assert r"\x1b]0;owned\x07" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("magic", [b"QFI\xfb\0\0\0\0", b"QFI\xfb\0\0\0\1", b"QFI\xfb\xff\xff\xff\xff"])
def test_the_magic_is_enough(magic: bytes, capsys: Capture) -> None:
    patch("disk.qcow2", 0, magic)
    assert run(["dump", "disk.qcow2", "header"]) == 1
    assert capsys.readouterr().err.startswith("imgloop: error: Unsupported qcow2 version")


def test_what_is_no_qcow2_image(capsys: Capture) -> None:
    Path("empty").touch()
    Path("text").write_text("hello")
    expected = {
        "empty": "Could not dump 'empty': Image is not in qcow2 format, it looks like raw "
        "[magic at offset 0x0 of 'empty' is 0 (0x0)]",
        "text": "Could not dump 'text': Image is not in qcow2 format, it looks like raw "
        "[magic at offset 0x0 of 'text' is 1751477356 (0x68656c6c)]",
        ".": "Could not open '.': 'file' driver requires '.' to be a regular file",
        "missing": "Could not open 'missing': Could not open 'missing': No such file or directory",
    }
    for name, message in expected.items():
        assert run(["dump", name]) == 1
        assert capsys.readouterr() == ("", f"imgloop: error: {message}\n")
    assert run(["dump", "-f", "raw", "disk.qcow2"]) == 1
    assert "only qcow2 images" in capsys.readouterr().err


def test_forced_on_garbage(capsys: Capture) -> None:
    Path("garbage").write_bytes(bytes(range(256)) * 4)
    assert run(["dump", "-f", "qcow2", "garbage"]) == 1
    shown = capsys.readouterr()
    row = next(row for row in shown.out.splitlines() if " magic " in row)
    assert row.split("  ")[-1] == "! Image is not in qcow2 format"
    assert shown.err == (
        "imgloop: error: Image is not in qcow2 format [magic at offset 0x0 of 'garbage' is 66051 (0x10203)]\n"
    )


def test_neither_backing_nor_data_file_is_needed(capsys: Capture) -> None:
    patch("disk.qcow2", 8, (0x2000).to_bytes(8) + (4).to_bytes(4))
    patch("disk.qcow2", 0x2000, b"gone")
    assert run(["dump", "disk.qcow2", "header"]) == 0
    assert "backing file 'gone'" in capsys.readouterr().out


def test_image_opts(capsys: Capture) -> None:
    assert run(["dump", "-U", "--image-opts", "driver=qcow2,file.filename=disk.qcow2", "l1"]) == 0
    assert "active L1 table: 2 entries at 0xc000, 2 needed" in lines(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Expecting one image file name"),
        (["disk.qcow2", "l3"], "Unknown part 'l3': expecting header, extensions, l1, "),
        (["disk.qcow2", "l2"], "'l2' expects the index of one L1 entry"),
        (["disk.qcow2", "l2", "0", "1"], "'l2' expects the index of one L1 entry"),
        (["disk.qcow2", "l2", "x"], "'x' is not the index of an L1 entry"),
        (["disk.qcow2", "l1", "0"], "Unexpected argument '0'"),
        (["disk.qcow2", "l2", "2"], "There is no L1 entry 2: the L1 table has 2 entries"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: Capture) -> None:
    assert run(["dump", *words]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"imgloop: error: {message}")


def test_a_header_needs_no_numpy(inside: Path) -> None:
    program = "import sys, imgloop.cli;imgloop.cli.run(['dump', *sys.argv[1:]]);sys.exit('numpy' in sys.modules)"
    for part, needed in (("header", 0), ("extensions", 0), ("l1", 1)):
        command = [sys.executable, "-c", program, str(inside / "disk.qcow2"), part]
        done = subprocess.run(command, cwd=FIXTURES.parent, capture_output=True, check=False)
        assert done.returncode == needed
