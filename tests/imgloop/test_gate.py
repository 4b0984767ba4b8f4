"""The gate: which of the files that an image names are opened; and chains that never end.

An image here is a stranger's claim: it names whatever the test wants opened, and the test proves that it is
not (a FIFO would hang whoever opens it) or that it is.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import imgloop
from imgloop import Gate, GateError, ImageError, Limits, OpenError, Trust
from imgloop.cli import run
from tests.patching import BACKING_FORMAT, COPIED, DATA, DATA_FILE, build, extension, sparse

BYTES = DATA(4096)


def overlay(name: str, format: str = "raw") -> bytes:
    """An empty image on a backing file."""
    fields = {"backing_file_offset": 2048, "backing_file_size": len(name.encode())}
    return build(fields, {2048: name.encode()}, l2={}, extensions=[extension(BACKING_FORMAT, format.encode())])


def external(name: str) -> bytes:
    """An image whose first cluster is in an external data file."""
    extensions = [extension(DATA_FILE, name.encode())]
    return build({"incompatible_features": 4}, extensions=extensions, l2={0: COPIED})


NAMING = {"backing file": overlay, "data file": external}
ROLES = pytest.mark.parametrize("role", NAMING)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for images, with files in it, below it and outside of it; the home is the current directory."""
    for folder in ("home/below", "outside", "home-2"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("home/beside", "home/below/file", "outside/secret", "home-2/secret"):
        (tmp_path / name).write_bytes(BYTES)
    (tmp_path / "home/link-out").symlink_to("../outside/secret")
    (tmp_path / "home/link-below").symlink_to("below/file")
    (tmp_path / "home/folder-out").symlink_to("../outside")
    (tmp_path / "outside/link-home").symlink_to("../home/beside")
    os.mkfifo(tmp_path / "home/fifo")
    (tmp_path / "home/link-device").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path


def read(image: bytes, gate: Gate | None = None) -> bytes:
    """The first bytes of an image called top.qcow2 in the current directory."""
    Path("top.qcow2").write_bytes(image)
    with imgloop.open("top.qcow2", gate=gate) as opened:
        return opened.pread(512, 0)


# names that an image uses for one of the files above; each is in the home, whatever it looks like
INSIDE = [
    "beside",
    "./beside",
    "below/file",
    "below/../beside",
    "../home/beside",
    "link-below",
    "../outside/link-home",
]
OUTSIDE = ["../outside/secret", "link-out", "folder-out/secret", "below/../../outside/secret", "../home-2/secret"]


@ROLES
@pytest.mark.parametrize("name", INSIDE)
def test_inside(role: str, name: str, world: Path) -> None:
    assert read(NAMING[role](name)) == BYTES[:512]


@ROLES
def test_inside_by_its_absolute_name(role: str, world: Path) -> None:
    assert read(NAMING[role](f"{world}/home/beside")) == BYTES[:512]


@ROLES
@pytest.mark.parametrize("name", OUTSIDE)
def test_outside(role: str, name: str, world: Path) -> None:
    with pytest.raises(GateError) as caught:
        read(NAMING[role](name))
    said = str(caught.value)
    real = (world / "home" / name).resolve()
    assert f"The {role} '{name}' is outside of the image's directory '{world}/home'" in said
    assert f"--allow '{real}' or --trust lets it through" in said
    assert (caught.value.where.file, caught.value.where.field, caught.value.where.value) == (
        "top.qcow2",
        role,
        name,
    )


@ROLES
def test_outside_by_its_absolute_name(role: str, world: Path) -> None:
    with pytest.raises(GateError, match="is outside of the image's directory"):
        read(NAMING[role](f"{world}/outside/secret"))


@ROLES
@pytest.mark.parametrize("name", OUTSIDE)
def test_trust(role: str, name: str, world: Path) -> None:
    assert read(NAMING[role](name), Gate(trust=Trust.FULL)) == BYTES[:512]


@ROLES
@pytest.mark.parametrize("allowed", ["../outside/secret", "../outside", "..", "link-out", "folder-out"])
def test_allow(role: str, allowed: str, world: Path) -> None:
    assert read(NAMING[role]("../outside/secret"), Gate(allow=[allowed])) == BYTES[:512]
    assert read(NAMING[role]("link-out"), Gate(allow=[allowed])) == BYTES[:512]


@ROLES
@pytest.mark.parametrize("allowed", ["../outside/sec", "../outside/other", "../home", "../outsid"])
def test_allow_something_else(role: str, allowed: str, world: Path) -> None:
    with pytest.raises(GateError):
        read(NAMING[role]("../outside/secret"), Gate(allow=[allowed]))


@ROLES
@pytest.mark.parametrize("name", [*INSIDE, *OUTSIDE])
def test_untrusted(role: str, name: str, world: Path) -> None:
    with pytest.raises(GateError, match=f"its {role} '.*' is not opened"):
        read(NAMING[role](name), Gate(trust=Trust.NONE, allow=[".", ".."]))


@ROLES
@pytest.mark.parametrize(
    "gate", [Gate(), Gate(trust=Trust.FULL), Gate(allow=["/"])], ids=["default", "trust", "allow"]
)
@pytest.mark.parametrize("name", ["fifo", "below", "/dev/zero", "link-device", "/dev/null"])
def test_nothing_but_files(role: str, name: str, gate: Gate, world: Path) -> None:
    # opening the FIFO would hang, and reading the device would never end
    with pytest.raises(OpenError, match=f"requires '{name}' to be a regular file"):
        read(NAMING[role](name), gate)


def test_the_top_image_is_no_fifo_either(world: Path) -> None:
    with pytest.raises(OpenError, match="requires 'fifo' to be a regular file"):
        imgloop.open("fifo")


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"raw","file":{"driver":"file","filename":"../outside/secret"}}',
        'json:{"driver":"file","filename":"../outside/secret"}',
        'json:{"file.filename":"link-out"}',
        "file:../outside/secret",
        'json:{"driver":"qcow2","file.filename":"beside2","backing":{"driver":"raw","file.filename":"../outside/secret"}}',
    ],
)
def test_json_does_not_pass_the_gate(name: str, world: Path) -> None:
    Path("beside2").write_bytes(build(l2={}))
    format = "qcow2" if "qcow2" in name else "raw"  # it goes before the driver that the name asks for
    with pytest.raises(GateError, match=r"is outside of the image's directory"):
        read(overlay(name, format))
    assert read(overlay(name, format), Gate(trust=Trust.FULL)) == BYTES[:512]


def test_json_data_file_does_not_pass_the_gate(world: Path) -> None:
    Path("data.qcow2").write_bytes(external("unused"))
    options = {"driver": "qcow2", "file.filename": "data.qcow2", "data-file.filename": "../outside/secret"}
    with pytest.raises(GateError, match=r"The data file .* is outside"):
        read(overlay(f"json:{json.dumps(options)}", "qcow2"))


def test_what_a_person_names_is_opened(world: Path) -> None:
    Path("top.qcow2").write_bytes(overlay("missing"))
    options = "driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=../outside/secret"
    for gate in (Gate(), Gate(trust=Trust.NONE)):
        with imgloop.open(options, image_opts=True, gate=gate) as image:
            assert image.pread(512, 0) == BYTES[:512]
        with imgloop.open("../outside/secret", gate=gate) as image:
            assert image.pread(512, 0) == BYTES[:512]


def test_the_top_image_sets_the_directory(world: Path) -> None:
    # an image further down may lie elsewhere below; what it names still has to be in the top image's home
    Path("below/mid.qcow2").write_bytes(overlay("../beside"))
    assert read(overlay("below/mid.qcow2", "qcow2")) == BYTES[:512]
    Path("below/mid.qcow2").write_bytes(overlay("../../outside/secret"))
    with pytest.raises(GateError) as caught:
        read(overlay("below/mid.qcow2", "qcow2"))
    assert caught.value.where.file == "below/mid.qcow2"
    # and an allowed image does not widen the gate for those that it names
    (world / "outside/mid.qcow2").write_bytes(overlay("secret"))
    with pytest.raises(GateError):
        read(overlay("../outside/mid.qcow2", "qcow2"), Gate(allow=["../outside/mid.qcow2"]))


def test_the_top_image_by_a_link(world: Path) -> None:
    # the directory is that of the name that a person gave, for it is there that relative names count from
    (world / "outside/top.qcow2").write_bytes(overlay("beside"))
    Path("link.qcow2").symlink_to("../outside/top.qcow2")
    with imgloop.open("link.qcow2") as image:
        assert image.pread(512, 0) == BYTES[:512]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 1),
        (["--allow", "../outside"], 0),
        (["--allow", "beside", "--allow", "../outside/secret"], 0),
        (["--allow", "beside"], 1),
        (["--trust"], 0),
        (["--untrusted"], 1),
        (["--untrusted", "--allow", "../outside"], 1),
        (["--trust", "--untrusted"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"exit {value}",
)
def test_command_line(options: list[str], code: int, world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("top.qcow2").write_bytes(overlay("../outside/secret"))
    assert run([*options, "map", "--output=json", "top.qcow2"]) == code
    out, err = capfd.readouterr()
    assert bool(out) is not bool(err)
    if code and "--trust" not in options:
        assert err.startswith("imgloop: error: Could not open 'top.qcow2': Could not open backing file: ")
        assert err.count("\n") == 1


# --- info opens neither -----------------------------------------------------------------------------------


@ROLES
@pytest.mark.parametrize("name", ["fifo", "missing", "../outside/secret", "below"])
@pytest.mark.parametrize("options", [[], ["--untrusted"]], ids=["default", "untrusted"])
def test_info_opens_neither(
    role: str, name: str, options: list[str], world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("top.qcow2").write_bytes(NAMING[role](name))
    assert run([*options, "info", "--output=json", "top.qcow2"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert name in (said.get("backing-filename"), said["format-specific"]["data"].get("data-file"))


def test_info_of_the_chain_goes_through_the_gate(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("top.qcow2").write_bytes(overlay("../outside/secret"))
    words = ["info", "--output=json", "--backing-chain", "top.qcow2"]
    assert run(words) == 1
    assert "is outside of the image's directory" in capfd.readouterr().err
    assert run(["--trust", *words]) == 0
    assert [layer["format"] for layer in json.loads(capfd.readouterr().out)] == ["qcow2", "raw"]


# --- chains -----------------------------------------------------------------------------------------------

# which file names which as its backing file, of what format; or what it is a link to
LOOPS = {
    "itself": [("top.qcow2", "qcow2", "top.qcow2")],
    "itself by another name": [("top.qcow2", "qcow2", "below/../top.qcow2")],
    "itself as raw": [("top.qcow2", "raw", "top.qcow2")],
    "two files": [("top.qcow2", "qcow2", "b.qcow2"), ("b.qcow2", "qcow2", "top.qcow2")],
    "symlink": [("top.qcow2", "qcow2", "s.qcow2"), ("s.qcow2", "symlink", "top.qcow2")],
    "hard link": [("top.qcow2", "qcow2", "h.qcow2"), ("h.qcow2", "hard link", "top.qcow2")],
    "not at the top": [
        ("top.qcow2", "qcow2", "b.qcow2"),
        ("b.qcow2", "qcow2", "c.qcow2"),
        ("c.qcow2", "qcow2", "b.qcow2"),
    ],
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("words", [["map"], ["info", "--backing-chain"]], ids=["map", "info"])
def test_loop(loop: str, words: list[str], world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, how, target in LOOPS[loop]:
        if how == "symlink":
            Path(name).symlink_to(target)
        elif how == "hard link":
            Path(name).hardlink_to(target)
        else:
            Path(name).write_bytes(overlay(target, how))
    assert run([*words, "--output=json", "top.qcow2"]) == 1
    err = capfd.readouterr().err
    assert "creates an infinite loop" in err
    assert err.count("\n") == 1


def make_chain(layers: int) -> None:
    """A chain of overlays 000.qcow2 (the top), 001.qcow2, ..., with a raw file below them all."""
    for number in range(layers - 1):
        last = number == layers - 2
        below = "beside" if last else f"{number + 1:03}.qcow2"
        sparse(Path(f"{number:03}.qcow2"), overlay(below, "raw" if last else "qcow2"))


def test_deepest_chain(world: Path) -> None:
    make_chain(200)
    with imgloop.open("000.qcow2") as image:
        assert len(image.layers) == 200
        assert image.pread(512, 0) == BYTES[:512]


@pytest.mark.parametrize("words", [["map"], ["info", "--backing-chain"]], ids=["map", "info"])
def test_too_deep_a_chain(words: list[str], world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_chain(201)
    before = open_files()
    assert run([*words, "--output=json", "000.qcow2"]) == 1
    err = capfd.readouterr().err
    assert "The backing chain has more than 200 layers" in err
    assert err.count("\n") == 1
    assert open_files() == before


def test_depth_is_a_limit(world: Path) -> None:
    make_chain(4)
    with imgloop.open("000.qcow2", limits=Limits(chain_depth=4)) as image:
        assert len(image.layers) == 4
    with pytest.raises(OpenError, match="more than 3 layers"):
        imgloop.open("000.qcow2", limits=Limits(chain_depth=3))


def open_files() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # the listing must not itself stay open


@ROLES
@pytest.mark.parametrize("name", ["../outside/secret", "fifo", "missing"])
def test_a_refusal_leaves_no_file_open(role: str, name: str, world: Path) -> None:
    before = open_files()
    with pytest.raises(ImageError):
        read(NAMING[role](name))
    assert open_files() == before


# --- what hostile sizes cost ------------------------------------------------------------------------------


def hostile() -> Iterator[tuple[str, dict[str, Any]]]:
    """Images that claim to be huge: sound for a reader that allocates what it is told to."""
    l1 = {"l1_size": 4194304}
    yield "l1 of 32 MiB", {"fields": l1}
    yield "2 PiB", {"fields": {**l1, "size": 1 << 51}, "cluster_bits": 16}
    yield "2 EiB", {"fields": {**l1, "size": 1 << 61}, "cluster_bits": 21}
    yield "l1 of 32 GiB", {"fields": {"l1_size": 0xFFFFFFFF}}
    yield "refcounts of 8 MiB", {"fields": {"refcount_table_clusters": 2048}}
    yield "refcounts of 16 TiB", {"fields": {"refcount_table_clusters": 0xFFFFFFFF}}
    yield "65536 snapshots", {"fields": {"nb_snapshots": 65536, "snapshots_offset": 1 << 40}}
    yield "2^32 snapshots", {"fields": {"nb_snapshots": 0xFFFFFFFF}}
    yield "header of 4 GiB", {"fields": {"header_length": 0xFFFFFFFF}}
    yield "backing name of 4 GiB", {"fields": {"backing_file_offset": 512, "backing_file_size": 0xFFFFFFFF}}
    yield "backing name at 2^63", {"fields": {"backing_file_offset": 1 << 63, "backing_file_size": 1}}
    yield "clusters of 2^63", {"fields": {"cluster_bits": 63}}
    yield "clusters of 2^(2^32)", {"fields": {"cluster_bits": 0xFFFFFFFF}}
    yield "extension of 4 GiB", {"extensions": [extension(0x1234, length=0xFFFFFFFF)]}
    yield (
        "bitmap directory of 64 MiB",
        {
            "fields": {"autoclear_features": 1},
            "extensions": [extension(0x23852875, struct.pack(">IIQQ", 65535, 0, 67107840, 1 << 40))],
        },
    )
    yield (
        "bitmap directory of 2^64",
        {
            "fields": {"autoclear_features": 1},
            "extensions": [extension(0x23852875, struct.pack(">IIQQ", 65535, 0, 2**64 - 1, 4096))],
        },
    )
    yield (
        "snapshot with 4 GiB of extra data",
        {
            "fields": {"nb_snapshots": 1, "snapshots_offset": 0x8000},
            "at": {0x8000: struct.pack(">QIHHIIQII", 0, 0, 65535, 65535, 0, 0, 0, 0, 0xFFFFFFFF)},
        },
    )
    yield (
        "bitmap table of 512 MiB",
        {
            "fields": {"autoclear_features": 1},
            "extensions": [extension(0x23852875, struct.pack(">IIQQ", 1, 0, 32, 0x8000))],
            "at": {0x8000: struct.pack(">QIIBBHI2s6x", 1 << 20, 0x20000, 0, 1, 9, 2, 0, b"b0")},
        },
    )


JUDGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from imgloop.cli import run
for number in range(int(sys.argv[1])):
    for verb in ("info", "map"):
        print(number, verb, run([verb, "-f", "qcow2", f"{number}.qcow2"]), file=sys.stderr)
"""


def test_hostile_sizes_cost_no_memory(tmp_path: Path) -> None:
    images = list(hostile())
    for number, (_, arguments) in enumerate(images):
        sparse(tmp_path / f"{number}.qcow2", build(**arguments))
    root = str(Path(imgloop.__file__).parents[1])
    # one thread: OpenBLAS reserves address space for each
    environment = os.environ | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", JUDGE, str(len(images))]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "memory" not in done.stderr.lower()
    verdicts = [line.split() for line in done.stderr.splitlines() if line[0].isdigit()]
    assert len(verdicts) == 2 * len(images)
    assert {code for _, _, code in verdicts} == {"0", "1"}
