"""What an image is called, and which format it is taken for: QEMU's rules, and its words where it refuses."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import imgloop
from imgloop.cli import run
from imgloop.formats import probe
from tests.live import LIVE, complaint, qemu
from tests.patching import BACKING_FORMAT, DATA, build, extension

OVERLAY_FIELDS = {"backing_file_offset": 2048}


def overlay(name: bytes, format: bytes | None = b"qcow2") -> bytes:
    """An empty image on a backing file."""
    fields = OVERLAY_FIELDS | {"backing_file_size": len(name)}
    extensions = [extension(BACKING_FORMAT, format)] if format else []
    return build(fields, {2048: name}, l2={}, extensions=extensions)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with images in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.qcow2").write_bytes(build())
    for name in ("r.raw", "we:ird.raw", "a,b"):
        (tmp_path / name).write_bytes(DATA(4096))
    (tmp_path / "over.qcow2").write_bytes(overlay(b"t.qcow2"))
    (tmp_path / "lost.qcow2").write_bytes(overlay(b"missing"))
    (tmp_path / "file:over.qcow2").write_bytes(overlay(b"t.qcow2"))
    sub = tmp_path / "sub"
    sub.mkdir()
    (sub / "up.qcow2").write_bytes(overlay(b"../sub/./t.qcow2"))
    (sub / "t.qcow2").write_bytes(build())
    (sub / "by-file.qcow2").write_bytes(overlay(b"file:t.qcow2"))
    (sub / "by-json.qcow2").write_bytes(overlay(b'json:{"driver":"qcow2","file.filename":"t.qcow2"}'))
    (sub / "weird.qcow2").write_bytes(overlay(b"we:ird.raw", b"raw"))
    return tmp_path


OPTS = "--image-opts"
NOT_FOUND = "No such file or directory"
# the words of the command, and what QEMU says ("" where it opens the image)
NAMES: list[tuple[tuple[str, ...], str]] = [
    (("t.qcow2",), ""),
    (("./we:ird.raw",), ""),
    (("file:we:ird.raw",), ""),
    (("file:t.qcow2",), ""),
    (("sub/up.qcow2",), ""),
    (("we:ird.raw",), "Could not open 'we:ird.raw': Unknown protocol 'we'"),
    ((":x",), "Could not open ':x': Unknown protocol ''"),
    (("sub",), "Could not open 'sub': 'file' driver requires 'sub' to be a regular file"),
    (("-f", "qcow2", "sub"), "Could not open 'sub': 'file' driver requires 'sub' to be a regular file"),
    (("missing",), f"Could not open 'missing': Could not open 'missing': {NOT_FOUND}"),
    (("t.qcow2/x",), "Could not open 't.qcow2/x': Could not open 't.qcow2/x': Not a directory"),
    (("file://t.qcow2",), f"Could not open 'file://t.qcow2': Could not open '//t.qcow2': {NOT_FOUND}"),
    (("",), "Could not open '': The 'file' block driver requires a file name"),
    (("file:",), "Could not open 'file:': The 'file' block driver requires a file name"),
    (("-f", "nosuch", "t.qcow2"), "Could not open 't.qcow2': Unknown driver 'nosuch'"),
    (("-f", "qcow2", "r.raw"), "Could not open 'r.raw': Image is not in qcow2 format"),
    (
        ("lost.qcow2",),
        f"Could not open 'lost.qcow2': Could not open backing file: Could not open 'missing': {NOT_FOUND}",
    ),
    # a name with a protocol, or json:, counts from the current directory and not from the overlay's
    (("sub/by-file.qcow2",), ""),
    (("sub/by-json.qcow2",), ""),
    (
        ("sub/weird.qcow2",),
        "Could not open 'sub/weird.qcow2': Could not open backing file: Unknown protocol 'we'",
    ),
    # json:
    (('json:{"driver":"qcow2","file":{"driver":"file","filename":"t.qcow2"}}',), ""),
    (('json:{"file":{"filename":"t.qcow2"}}',), ""),
    (('json:{"driver":"qcow2","file.filename":"t.qcow2"}',), ""),
    (('json:{"driver":"qcow2","file.driver":"file","file":{"filename":"t.qcow2"}}',), ""),
    (('json:{"driver":"file","filename":"t.qcow2"}',), ""),
    (('json:{"driver":"raw","offset":512,"size":1024,"file.filename":"r.raw"}',), ""),
    (('json:{"driver":"qcow2","backing":null,"file.filename":"lost.qcow2"}',), ""),
    (
        (
            'json:{"driver":"qcow2","backing":{"driver":"raw","file.filename":"r.raw"},"file.filename":"lost.qcow2"}',
        ),
        "",
    ),
    (('json:{"driver":"raw","backing":null,"file.filename":"r.raw"}',), ""),
    (("-f", "qcow2", 'json:{"driver":"raw","file.filename":"t.qcow2"}'), ""),
    (("json:[1]",), "Could not open 'json:[1]': Invalid JSON object given"),
    (("json:1",), "Could not open 'json:1': Invalid JSON object given"),
    (("json:{}",), "Could not open 'json:{}': Must specify either driver or file"),
    *(
        ((f"json:{text}",), f"Could not open 'json:{text}': {words}")
        for text, words in (
            ('{"filename":"t.qcow2"}', "Must specify either driver or file"),
            ('{"driver":"qcow2"}', 'A block device must be specified for "file"'),
            ('{"driver":"raw","file":"x"}', "Cannot find device='x' nor node-name='x'"),
            ('{"driver":"nosuch","file.filename":"t.qcow2"}', "Unknown driver 'nosuch'"),
            ('{"driver":"qcow2","file":{"driver":"nosuch"}}', "Unknown driver 'nosuch'"),
            ('{"driver":"qcow2","file":{"driver":"file"}}', "The 'file' block driver requires a file name"),
            ('{"driver":"qcow2","file.filename":"x"}', f"Could not open 'x': {NOT_FOUND}"),
            (
                '{"driver":"qcow2","file.filename":"t.qcow2","nonsense":1}',
                "Block format 'qcow2' does not support the option 'nonsense'",
            ),
            (
                '{"driver":"raw","file.filename":"t.qcow2","backing":{"driver":"raw","file.filename":"r.raw"}}',
                "Driver doesn't support backing files",
            ),
            (
                '{"driver":"qcow2","file":{"driver":"file","filename":"t.qcow2","nonsense":1}}',
                "Block protocol 'file' doesn't support the option 'nonsense'",
            ),
            (
                '{"driver":"qcow2","backing":"nope","file.filename":"t.qcow2"}',
                "Could not open backing file: Cannot find device='nope' nor node-name='nope'",
            ),
            ('{"driver":"raw","size":100,"file.filename":"r.raw"}', "Specified size is not multiple of 512"),
            (
                '{"driver":"raw","offset":8192,"file.filename":"r.raw"}',
                "Offset (8192) cannot be greater than size of the containing file (4096)",
            ),
            (
                '{"driver":"raw","offset":512,"size":4096,"file.filename":"r.raw"}',
                "The sum of offset (512) and size (4096) has to be smaller or equal to the actual size "
                "of the containing file (4096)",
            ),
        )
    ),
    # --image-opts
    ((OPTS, "driver=qcow2,file.filename=t.qcow2"), ""),
    ((OPTS, "driver=qcow2,file.driver=file,file.filename=t.qcow2"), ""),
    ((OPTS, "file.filename=t.qcow2"), ""),
    ((OPTS, "driver=file,filename=t.qcow2"), ""),
    ((OPTS, "driver=raw,file.filename=we:ird.raw"), ""),  # a plain name
    ((OPTS, "driver=raw,file.filename=a,,b"), ""),
    ((OPTS, "driver=raw,offset=1k,size=1024,file.filename=r.raw"), ""),
    ((OPTS, "driver=qcow2,backing.driver=raw,backing.file.filename=r.raw,file.filename=lost.qcow2"), ""),
    ((OPTS, "t.qcow2"), "Could not open 't.qcow2': Cannot find device='t.qcow2' nor node-name='t.qcow2'"),
    ((OPTS, "driver=qcow2"), """Could not open 'driver=qcow2': A block device must be specified for "file\""""),
    ((OPTS, "filename=t.qcow2"), "Could not open 'filename=t.qcow2': Must specify either driver or file"),
    (
        (OPTS, "driver=qcow2,file.filename=missing"),
        f"Could not open 'driver=qcow2,file.filename=missing': Could not open 'missing': {NOT_FOUND}",
    ),
    (
        (OPTS, "driver=qcow2,file.filename=t.qcow2,data-file.driver=file,data-file.filename=r.raw"),
        "Could not open 'driver=qcow2,file.filename=t.qcow2,data-file.driver=file,data-file.filename=r.raw': "
        "'data-file' can only be set for images with an external data file",
    ),
    ((OPTS, "-f", "raw", "driver=raw,file.filename=r.raw"), "--image-opts and --format are mutually exclusive"),
]
EVERY = pytest.mark.parametrize(
    ("words", "message"), [pytest.param(*row, id=" ".join(row[0]) or "-") for row in NAMES]
)


@EVERY
def test_name(words: tuple[str, ...], message: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = run(["--trust", "map", "--output=json", *words])
    out, err = capfd.readouterr()
    if not message:
        assert (code, err) == (0, "")
        return
    assert (code, out) == (1, "")
    assert err.startswith(f"imgloop: error: {message}")
    assert err.count("\n") == 1


@LIVE
@EVERY
def test_qemu_on_name(
    words: tuple[str, ...], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = qemu("qemu-img", "map", "--output=json", *words, cwd=folder)
    assert done.returncode == (1 if message else 0)
    assert " ".join(complaint(done).split()) == message
    if not message:
        run(["--trust", "map", "--output=json", *words])
        theirs = [{key: row.get(key) for key in ROW} for row in json.loads(done.stdout)]
        ours = [{key: row.get(key) for key in ROW} for row in json.loads(capfd.readouterr().out)]
        assert ours == theirs


ROW = ("start", "length", "depth", "present", "zero", "data", "offset")

REFUSED_HERE = [
    (("json:{",), "Could not parse the JSON options: "),
    (("json:" + "[" * 100_000,), "Could not parse the JSON options: "),
    (("nbd:unix:/nowhere",), "Protocol 'nbd' is not supported"),
    (("http://127.0.0.1:9/x",), "Protocol 'http' is not supported"),
    (("fat:.",), "Protocol 'fat' is not supported"),
    (
        ('json:{"driver":"qcow2","file":{"driver":"nbd","path":"x"}}',),
        "Driver 'nbd' is not supported below a format",
    ),
    (('json:{"driver":"raw","size":-1,"file.filename":"r.raw"}',), "Parameter 'size' expects a size"),
    (('json:{"driver":"raw","size":"x","file.filename":"r.raw"}',), "Parameter 'size' expects a size"),
    (('json:{"driver":"qcow2","file.filename":{"a":1}}',), "Invalid parameter type for 'filename'"),
    (('json:{"driver":"raw","file":{"filename":"t\\u0000x"}}',), "Could not open 't\\x00x': embedded null byte"),
    (("-f", "vmdk", "t.qcow2"), "The vmdk format is not supported; supported are qcow2 and raw"),
]


@pytest.mark.parametrize(("words", "message"), [pytest.param(*row, id=row[0][-1][:40]) for row in REFUSED_HERE])
def test_refused_here(
    words: tuple[str, ...], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", *words]) == 1
    err = capfd.readouterr().err
    assert f": {message}" in err
    assert err.count("\n") == 1


def test_a_relative_name_is_joined_as_text(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(["info", "--output=json", "sub/up.qcow2"])
    assert json.loads(capfd.readouterr().out)["full-backing-filename"] == "sub/../sub/./t.qcow2"


def test_no_backing_gives_zeros(folder: Path) -> None:
    with imgloop.open("over.qcow2") as image:
        assert image.pread(512, 0) == DATA(512)
    with imgloop.open('json:{"driver":"qcow2","backing":null,"file.filename":"over.qcow2"}') as image:
        assert image.pread(512, 0) == bytes(512)
    with imgloop.open(
        "driver=qcow2,backing.driver=raw,backing.file.filename=r.raw,file.filename=lost.qcow2", image_opts=True
    ) as image:
        assert image.pread(4608, 0) == DATA(4096) + bytes(512)


def test_part_of_a_raw_file(folder: Path) -> None:
    with imgloop.open('json:{"driver":"raw","offset":512,"size":"1k","file.filename":"r.raw"}') as image:
        assert image.size == 1024
        assert image.pread(1024, 0) == DATA(4096)[512:1536]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("verb", ["info", "map"])
def test_names_that_are_not_utf8(verb: str, encoding: str, folder: Path) -> None:
    # a strict encoding is what most people's terminals have; the name is the image's, and so a stranger's
    Path("odd.qcow2").write_bytes(overlay(b"\xff\xc3\xa9\n\x1b", b"raw"))
    root = str(Path(imgloop.__file__).parents[1])
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONPATH": root}
    command = [sys.executable, "-m", "imgloop", verb, "odd.qcow2"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode == (1 if verb == "map" else 0)
    if encoding == "utf-8":
        assert b"\xff\xc3\xa9" in done.stdout + done.stderr
    if verb == "map":
        assert done.stderr.count(b"\n") == 1


# --- probing ----------------------------------------------------------------------------------------------


def head(start: bytes, at: int = 0) -> bytes:
    """The first sector of a file, `start` in it."""
    return (bytes(at) + start).ljust(512, b"\0")


PROBES = [
    ("empty", b"", "x", "raw"),
    ("zeros", head(b""), "x", "raw"),
    ("qcow2 v2", head(b"QFI\xfb\0\0\0\2"), "x", "qcow2"),
    ("qcow2 v3", head(b"QFI\xfb\0\0\0\3"), "x", "qcow2"),
    ("qcow2 v4", head(b"QFI\xfb\0\0\0\4"), "x", "qcow2"),
    ("qcow2 v2^32-1", head(b"QFI\xfb\xff\xff\xff\xff"), "x", "qcow2"),
    ("qcow2 of 8 bytes", b"QFI\xfb\0\0\0\3", "x", "qcow2"),
    ("qcow", head(b"QFI\xfb\0\0\0\1"), "x", "qcow"),
    ("qcow2 v0", head(b"QFI\xfb\0\0\0\0"), "x", "raw"),
    ("half a magic", b"QFI", "x", "raw"),
    ("magic alone", b"QFI\xfb", "x", "raw"),
    ("qcow2 called .raw", head(b"QFI\xfb\0\0\0\3"), "x.raw", "qcow2"),
    ("raw called .qcow2", head(b"\xeb\x3c\x90"), "x.qcow2", "raw"),
    ("luks", head(b"LUKS\xba\xbe\0\1"), "x", "luks"),
    ("luks 2", head(b"LUKS\xba\xbe\0\2"), "x", "raw"),
    ("vmdk", head(b"KDMV"), "x", "vmdk"),
    ("vmdk 3", head(b"COWD"), "x", "vmdk"),
    ("vmdk text", head(b"# Disk DescriptorFile\nversion=1\n"), "x", "vmdk"),
    ("vmdk text with blank lines", head(b"# Disk DescriptorFile\n \n  \r\n#\nversion=3\r\n"), "x", "vmdk"),
    ("text with an empty line", head(b"# Disk DescriptorFile\n\nversion=3\n"), "x", "raw"),
    ("text", head(b"# Disk DescriptorFile\nedition=1\n"), "x", "raw"),
    ("vdi", head(b"\x7f\x10\xda\xbe", 64), "x", "vdi"),
    ("vhdx", head(b"vhdxfile"), "x", "vhdx"),
    ("vhd", head(b"conectix"), "x", "vpc"),
    ("vhd by its footer alone", bytes(4096) + head(b"conectix"), "x", "raw"),
    ("qed", head(b"QED\0"), "x", "qed"),
    ("parallels", head(b"WithoutFreeSpace" + struct.pack("<I", 2)), "x", "parallels"),
    ("parallels extended", head(b"WithouFreSpacExt" + struct.pack("<I", 2)), "x", "parallels"),
    (
        "cloop",
        head(b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"),
        "x",
        "cloop",
    ),
    ("dmg by its name", head(b""), "x.dmg", "dmg"),
    ("qcow2 called .dmg", head(b"QFI\xfb\0\0\0\3"), "x.dmg", "qcow2"),
    ("dmg in another case", head(b""), "x.DMG", "raw"),
]
PROBED = pytest.mark.parametrize(("data", "name", "format"), [pytest.param(*row[1:], id=row[0]) for row in PROBES])


@PROBED
def test_probe(data: bytes, name: str, format: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert probe(data[:512], name) == format
    Path(name).write_bytes(data)
    code = run(["info", "--output=json", name])
    out, err = capfd.readouterr()
    if format == "raw":
        assert code == 0
        assert json.loads(out)["format"] == "raw"
    else:  # all of these are damaged, or of a format that is not read here: none may become raw
        assert (code, out) == (1, "")
        assert format == "qcow2" or f"The {format} format is not supported" in err
    assert run(["info", "-f", "raw", name]) == 0


@LIVE
@PROBED
def test_qemu_probes_alike(data: bytes, name: str, format: str, folder: Path) -> None:
    Path(name).write_bytes(data)
    done = qemu("qemu-img", "info", "--output=json", name, cwd=folder)
    taken = json.loads(done.stdout)["format"] if done.returncode == 0 else "not raw"
    assert taken in ({"raw"} if format == "raw" else {format, "not raw"})


@pytest.mark.parametrize("format", ["vmdk", "qcow"])
def test_a_backing_file_of_another_format_is_refused(format: str, folder: Path) -> None:
    Path("base").write_bytes(head(b"KDMV") if format == "vmdk" else head(b"QFI\xfb\0\0\0\1"))
    for recorded in (None, format.encode()):
        Path("odd.qcow2").write_bytes(overlay(b"base", recorded))
        with pytest.raises(imgloop.OpenError, match=f"The {format} format is not supported"):
            imgloop.open("odd.qcow2")
