"""`dump` shows what lies on disk, of sound images and of damaged ones, in QEMU's words."""

import os
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import imgloop
from imgloop.formats.errors import OutOfRangeError
from imgloop.formats.qcow2 import schema
from imgloop.formats.qcow2.dump import PARTS, Inspected, inspect
from imgloop.formats.qcow2.dump_tables import l2
from imgloop.formats.source import Source
from tests.recorded import all_fixtures, restore

LIVE = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="QEMU-IMG IS MISSING: damaged images are not compared with it"
)
QCOW2 = [fixture.name for fixture in all_fixtures() if fixture.format == "qcow2"]
Patch = tuple[int, bytes]
Show = Callable[..., Inspected]


def u32(offset: int, value: int) -> Patch:
    return offset, struct.pack(">I", value)


def u64(offset: int, *values: int) -> Patch:
    return offset, struct.pack(f">{len(values)}Q", *values)


def field(name: str, value: int) -> Patch:
    offset = schema.offset_of(schema.Header, name)
    if name == "compression_type":
        return offset, bytes([value])
    wide = next(part for part in schema.Header.subcons if part.name == name).sizeof() == 8
    return u64(offset, value) if wide else u32(offset, value)


@pytest.fixture
def show(tmp_path: Path) -> Iterator[Show]:
    """Inspect a fixture, patched and cut."""
    opened: list[Source] = []

    def damaged(name: str, *patches: Patch, length: int | None = None) -> Inspected:
        path = restore(name, tmp_path)
        with path.open("r+b") as file:
            for offset, data in patches:
                file.seek(offset)
                file.write(data)
            if length is not None:
                file.truncate(length)
        opened.append(Source(os.open(path, os.O_RDONLY), str(path)))
        return inspect(opened[-1])

    yield damaged
    for source in opened:
        source.close()


def whole(image: Inspected) -> dict[str, dict[str, Any]]:
    """All parts, their tables read to the end."""
    return {name: drained(show(image)) for name, show in PARTS.items()}


def drained(part: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, Iterator) else value for key, value in part.items()}


def fields(image: Inspected) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in PARTS["header"](image)["fields"]}


# disk.qcow2: clusters of 16 KiB, refcount table at 0x4000, L1 at 0xc000, L2 tables at 0x44000 and 0x38000,
# one snapshot at 0x40000; bitmaps.qcow2: the directory at 0x40000, the table of its first bitmap at 0x2c000
L1, TABLE, SNAPSHOTS, DIRECTORY = 0xC000, 0x4000, 0x40000, 0x40000

OPENING: dict[str, tuple[str, list[Patch], str, str]] = {
    name: (image, patches, message, bad)
    for name, image, patches, message, bad in [
        ("magic", "disk.qcow2", [(0, b"X")], "Image is not in qcow2 format", "magic"),
        ("version", "disk.qcow2", [field("version", 9)], "Unsupported qcow2 version 9", "version"),
        ("old", "disk.qcow2", [field("version", 0)], "Unsupported qcow2 version 0", "version"),
        ("cluster", "disk.qcow2", [field("cluster_bits", 22)], "Unsupported cluster size: 2^22", "cluster_bits"),
        (
            "cluster bomb",
            "disk.qcow2",
            [field("cluster_bits", 0xFFFFFFFF)],
            "Unsupported cluster size: 2^4294967295",
            "cluster_bits",
        ),
        ("short", "disk.qcow2", [field("header_length", 50)], "qcow2 header too short", "header_length"),
        (
            "long",
            "disk.qcow2",
            [field("header_length", 0xFFFFFFFF)],
            "qcow2 header exceeds cluster size",
            "header_length",
        ),
        (
            "backing bomb",
            "disk.qcow2",
            [field("backing_file_offset", 1 << 62), field("incompatible_features", 0x20)],
            "Invalid backing file offset",
            "backing_file_offset",
        ),
        (
            "order",
            "disk.qcow2",
            [field("refcount_order", 7)],
            "Reference count entry width too large; may not exceed 64 bits",
            "refcount_order",
        ),
        (
            "no refcounts",
            "disk.qcow2",
            [field("refcount_table_clusters", 0)],
            "Image does not contain a reference count table",
            "refcount_table_clusters",
        ),
        (
            "refcount bomb",
            "disk.qcow2",
            [field("refcount_table_clusters", 0xFFFFFFFF)],
            "Reference count table too large",
            "refcount_table_clusters",
        ),
        (
            "refcounts far away",
            "disk.qcow2",
            [field("refcount_table_offset", 1 << 63)],
            "Reference count table offset invalid",
            "refcount_table_offset",
        ),
        (
            "snapshot bomb",
            "disk.qcow2",
            [field("nb_snapshots", 0xFFFFFFFF)],
            "Snapshot table too large",
            "nb_snapshots",
        ),
        ("L1 bomb", "disk.qcow2", [field("l1_size", 4194305)], "Active L1 table too large", "l1_size"),
        (
            "L1 far away",
            "disk.qcow2",
            [field("l1_table_offset", (1 << 64) - 0x4000)],
            "Active L1 table offset invalid",
            "l1_table_offset",
        ),
        ("L1 too small", "disk.qcow2", [field("l1_size", 0)], "L1 table is too small", "l1_size"),
        (
            "encryption",
            "disk.qcow2",
            [field("crypt_method", 3)],
            "Unsupported encryption method 3",
            "crypt_method",
        ),
        ("extension", "disk.qcow2", [u32(0x74, 0x7FFFFFFF)], "Header extension too large", "header extension"),
        (
            "luks",
            "luks.qcow2",
            [(0x40000, b"X")],
            "Volume is not in LUKS format",
            "LUKS magic",
        ),
        (
            "backing name",
            "overlay.qcow2",
            [field("backing_file_size", 1024)],
            "Backing file name too long",
            "backing_file_size",
        ),
        (
            "snapshot",
            "disk.qcow2",
            [u32(SNAPSHOTS + 36, 5000)],
            "Too much extra metadata in snapshot table entry 0",
            "extra_data_size of snapshot 0",
        ),
        (
            "bitmap",
            "bitmaps.qcow2",
            [(DIRECTORY + 16, b"\2")],
            "Bitmap 'nightly' doesn't satisfy the constraints",
            "bitmap 'nightly'",
        ),
        (
            "bitmap table",
            "bitmaps.qcow2",
            [u64(0x2C000, 3)],
            "Could not read bitmap_table table from image for bitmap 'nightly': Invalid argument",
            "bitmap 'nightly'",
        ),
        (
            "size",
            "disk.qcow2",
            [field("size", (1 << 64) - 1)],
            "Could not refresh total sector count: File too large",
            "size",
        ),
    ]
}

# What only `qemu-img check` sees; it begins these lines with ERROR.
CHECKED: dict[str, tuple[list[Patch], str, str]] = {
    "L1 reserved": (
        [u64(L1, 0x8100000000044000)],
        "found L1 entry with reserved bits set: 8100000000044000",
        "L1 entry 0",
    ),
    "L1 unaligned": (
        [u64(L1, 0x8000000000044200)],
        "l2_offset=44200: Table is not cluster aligned; L1 entry corrupted",
        "L1 entry 0",
    ),
    "L1 beyond": (
        [u64(L1, 0x8000000F00044000)],
        "counting reference for region exceeding the end of the file by one cluster or more: "
        "offset 0xf00044000 size 0x4000",
        "L1 entry 0",
    ),
    "refcount reserved": (
        [u64(TABLE, 0x8001)],
        "refcount table entry 0 has reserved bits set",
        "refcount table entry 0",
    ),
    "refcount unaligned": (
        [u64(TABLE, 0x8200)],
        "refcount block 0 is not cluster aligned; refcount table entry corrupted",
        "refcount table entry 0",
    ),
    "refcount beyond": (
        [u64(TABLE, 0x80000000)],
        "refcount block 0 is outside image",
        "refcount table entry 0",
    ),
    "refcount twice": (
        [u64(TABLE + 8, 0x8000)],
        "refcount block 1 refcount=2",
        "refcount table entry 1",
    ),
    "snapshot L1": (
        [u64(SNAPSHOTS, 0x3C200)],
        "snapshot 1 (before-upgrade) l1_offset=0x3c200: L1 table is not cluster aligned; "
        "snapshot table entry corrupted",
        "snapshot table entry 0",
    ),
    "snapshot short": (
        [u32(SNAPSHOTS + 36, 8)],
        "snapshot table entry 0 is incomplete",
        "snapshot table entry 0",
    ),
}


@pytest.mark.parametrize("name", QCOW2)
def test_nothing_is_wrong_with_what_qemu_made(name: str, show: Show) -> None:
    image = show(name)
    parts = whole(image)
    assert [str(problem) for problem in image.problems] == []
    assert not [part for part in parts.values() if "not-shown" in part]
    for row in parts["l1"]["rows"]:
        drained(l2(image, row["index"]))
    assert [str(problem) for problem in image.problems] == []


@pytest.mark.parametrize("case", OPENING)
def test_the_first_bad_field_is_qemus(case: str, show: Show) -> None:
    name, patches, message, bad = OPENING[case]
    image = show(name, *patches)
    first = image.problems[0]
    assert (first.message, first.where.field) == (message, bad)
    assert set(whole(image)) == set(PARTS)  # all the rest is shown, as far as it goes


@LIVE
@pytest.mark.parametrize("case", OPENING)
def test_live_qemu_names_it_first(case: str, show: Show) -> None:
    name, patches, message, _ = OPENING[case]
    path = show(name, *patches).source.name
    done = subprocess.run(["qemu-img", "info", "-f", "qcow2", path], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[0] == f"qemu-img: Could not open '{path}': {message}"


@pytest.mark.parametrize("case", CHECKED)
def test_bad_rows_are_told(case: str, show: Show) -> None:
    patches, message, bad = CHECKED[case]
    image = show("disk.qcow2", *patches)
    assert image.problems == []  # the image opens
    parts = whole(image)
    assert (image.problems[0].message, image.problems[0].where.field) == (message, bad)
    rows = [row for part in parts.values() for row in part.get("rows", ())]
    assert next(row["problem"] for row in rows if "problem" in row) == message


@LIVE
@pytest.mark.parametrize("case", CHECKED)
def test_live_check_says_the_same(case: str, show: Show) -> None:
    patches, message, _ = CHECKED[case]
    path = show("disk.qcow2", *patches).source.name
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, check=False)
    assert message in [line.removeprefix("ERROR").lstrip(": ") for line in done.stderr.splitlines()]


def test_several_problems_keep_qemus_order(show: Show) -> None:
    image = show("disk.qcow2", (0, b"X"), field("version", 7), field("l1_size", 0), u32(0x74, 0x7FFFFFFF))
    assert [problem.message for problem in image.problems] == [
        "Image is not in qcow2 format",
        "Unsupported qcow2 version 7",
        "L1 table is too small",
        "Header extension too large",
    ]


def test_a_wrong_magic_hides_nothing_else(show: Show) -> None:
    sound, damaged = show("disk.qcow2"), whole(show("disk.qcow2", (0, b"X")))
    expected = whole(sound)
    assert {part: damaged[part] for part in PARTS if part != "header"} == {
        part: expected[part] for part in PARTS if part != "header"
    }


def test_header_fields(show: Show) -> None:
    found = fields(show("disk.qcow2"))
    assert [row["name"] for row in found.values()] == [part.name for part in schema.Header.subcons]
    assert found["l1_table_offset"] == {
        "name": "l1_table_offset",
        "offset": 40,
        "size": 8,
        "value": L1,
        "hex": "0xc000",
    }
    assert found["cluster_bits"]["bytes"] == 16384
    assert found["l1_size"]["meaning"] == "2 needed"


def test_version_2_ends_at_72(show: Show) -> None:
    part = PARTS["header"](show("v2-overlay.qcow2"))
    assert part["length"] == 72
    assert part["fields"][-1]["name"] == "snapshots_offset"
    assert {row["name"]: row.get("name-stored") for row in part["fields"]}["backing_file_offset"] == "v2.qcow2"


def test_header_of_104_bytes_has_no_compression_type(show: Show) -> None:
    image = show("disk.qcow2", field("header_length", 104), field("compression_type", 9), u64(112, 0))
    assert image.problems == []
    assert "compression_type" not in fields(image)


def test_fields_behind_the_known_ones(show: Show) -> None:
    # the header is made longer by what was the feature name table
    part = PARTS["header"](show("disk.qcow2", field("header_length", 120)))
    assert part["unknown-fields"] == {"offset": 112, "length": 8, "data": "6803f85700000180"}


def test_unknown_features_have_the_images_names(show: Show) -> None:
    row = 0x78  # the first of the feature name table
    image = show("disk.qcow2", (row, b"\0\x05my feature\0"), field("incompatible_features", 0x61))
    found = fields(image)["incompatible_features"]
    assert found["meaning"] == "dirty, unknown bit 5 'my feature', unknown 0x40"
    assert found["bits"] == [
        {"bit": 0, "name": "dirty", "known": True},
        {"bit": 5, "name": "my feature", "known": False},
        {"bit": 6, "name": None, "known": False},
    ]
    assert found["problem"] == image.problems[0].message
    assert found["problem"] == "Unsupported qcow2 feature(s): my feature, Unknown incompatible feature: 40"


def test_extensions_are_decoded(show: Show) -> None:
    luks = PARTS["extensions"](show("luks.qcow2"))["extensions"][0]
    assert luks["content"] == {"offset": 0x40000, "length": 0x101000}
    assert luks["luks"]["cipher-alg"] == "aes-128"
    bitmaps = {row["name"]: row for row in PARTS["extensions"](show("bitmaps.qcow2"))["extensions"]}
    assert bitmaps["bitmaps"]["content"] == {
        "nb-bitmaps": 2,
        "reserved": 0,
        "directory-size": 64,
        "directory-offset": DIRECTORY,
    }
    assert {"type": "autoclear", "bit": 1, "name": "raw external data"} in bitmaps["feature names"]["features"]
    overlay = PARTS["extensions"](show("overlay.qcow2"))["extensions"]
    assert (overlay[0]["name"], overlay[0]["text"]) == ("backing format", "qcow2")


def test_an_unknown_extension_is_shown_in_hex(show: Show) -> None:
    row = PARTS["extensions"](show("disk.qcow2", u32(0x70, 0x1234)))["extensions"][0]
    assert (row["type"], row["name"], row["length"]) == ("0x00001234", "unknown", 384)
    assert row["content"]["data"].startswith("0000") and len(row["content"]["data"]) == 512


def test_an_extension_that_does_not_fit_is_still_shown(show: Show) -> None:
    part = PARTS["extensions"](show("disk.qcow2", u32(0x74, 0x7FFFFFFF)))
    assert part["extensions"][-1]["length"] == 0x7FFFFFFF
    assert part["extensions"][-1]["problem"] == "Header extension too large"


def test_l1_rows(show: Show) -> None:
    part = drained(PARTS["l1"](show("disk.qcow2")))
    assert (part["entries"], part["needed"]) == (2, 2)
    assert part["rows"][1] == {
        "index": 1,
        "at": 0xC008,
        "entry": "0x0000000000038000",
        "copied": False,
        "reserved-high": 0,
        "offset": 0x38000,
        "reserved-low": 0,
        "guest-offset": 0x2000000,
    }


@pytest.mark.parametrize("name", QCOW2)
def test_l2_agrees_with_the_extents(
    name: str, tmp_path: Path, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where data files are looked for
    image = show(name)
    try:
        driver = imgloop.open(image.source.name).layers[0].driver
    except imgloop.FormatError as error:
        assert "encrypted" in str(error)
        return
    for entry in drained(PARTS["l1"](image))["rows"]:
        for row in drained(l2(image, entry["index"]))["rows"]:
            if row["guest-offset"] >= driver.size or row["kind"] == "mixed":
                continue
            found = driver.extents(row["guest-offset"], 1)[0]
            assert (row["kind"], row.get("stored", 0)) == (_kind(found["kind"]), int(found["stored"]))
            if found["offset"] >= 0:
                assert row["offset"] == found["offset"]
    driver.close()


def _kind(number: int) -> str:
    from imgloop.formats.extents import Kind

    return Kind(number).name.lower()


def test_l2_subclusters(show: Show) -> None:
    rows = drained(l2(show("extl2.qcow2"), 0))["rows"]
    assert (rows[0]["kind"], rows[0]["subclusters"]) == ("mixed", "DD0D......D.....00" + "." * 14)
    assert rows[0]["zero-bitmap"] == 0b110000000000000100
    assert (rows[2]["kind"], rows[2]["subclusters"]) == ("zero", "0" * 32)


def test_l2_compressed(show: Show) -> None:
    row = drained(l2(show("zlib-mixed.qcow2"), 0))["rows"][0]
    assert row == {
        "index": 0,
        "at": 0x4000,
        "entry": "0x4c00000000005000",
        "copied": False,
        "kind": "compressed",
        "offset": 0x5000,
        "sectors": 4,
        "stored": 2048,
        "guest-offset": 0,
    }


L2_DAMAGE = {
    "reserved": (0x80000000000050FE, "found l2 entry with reserved bits set: 80000000000050fe"),
    "copied": (0xCC00000000005000, "coffset=0x5000: copied flag must never be set for compressed clusters"),
    "unaligned": (
        0x8000000000005200,
        "Image is corrupt: Cluster allocation offset 0x5200 unaligned (L2 offset: 0x4000, L2 index: 0)",
    ),
    "beyond": (
        0x8000000000F00000,
        "counting reference for region exceeding the end of the file by one cluster or more: "
        "offset 0xf00000 size 0x1000",
    ),
    "compressed beyond": (
        0x4C00000000F00010,
        "counting reference for region exceeding the end of the file by one cluster or more: "
        "offset 0xf00010 size 0x7f0",
    ),
}


@pytest.mark.parametrize("case", L2_DAMAGE)
def test_l2_damage(case: str, show: Show) -> None:
    entry, message = L2_DAMAGE[case]
    image = show("zlib-mixed.qcow2", u64(0x4000, entry))
    assert drained(l2(image, 0))["rows"][0]["problem"] == message
    problem = image.problems[0]
    assert (problem.message, problem.where.offset, problem.where.value) == (message, 0x4000, entry)


@LIVE
@pytest.mark.parametrize("case", [case for case in L2_DAMAGE if case != "unaligned"])
def test_live_check_sees_l2_damage_alike(case: str, show: Show) -> None:
    entry, message = L2_DAMAGE[case]
    path = show("zlib-mixed.qcow2", u64(0x4000, entry)).source.name
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, check=False)
    assert message in [line.removeprefix("ERROR").lstrip(": ") for line in done.stderr.splitlines()]


def test_l2_without_a_table_or_an_entry(show: Show) -> None:
    image = show("disk.qcow2", u64(L1, 0))
    assert l2(image, 0)["not-shown"] == "L1 entry 0 names no L2 table"
    with pytest.raises(OutOfRangeError, match="There is no L1 entry 2"):
        l2(image, 2)


@pytest.mark.parametrize("order", range(7))
def test_refcount_runs_count_every_cluster(order: int, show: Show) -> None:
    from imgloop.formats.qcow2.refcounts import read_refcounts

    image = show(f"refcount-{1 << order}.qcow2")
    stored = [
        int(count)
        for block in read_refcounts(image.source, image.header, 0, image.host_clusters)
        for count in block
    ]
    part = drained(PARTS["refcounts"](image))
    assert part["refcount-bits"] == 1 << order
    shown = [run["refcount"] for run in part["runs"] for _ in range(run["first"], run["last"] + 1)]
    assert shown[: len(stored)] == stored
    assert all(a["refcount"] != b["refcount"] for a, b in zip(part["runs"], part["runs"][1:], strict=False))


def test_refcounts_beyond_the_end_only_where_there_are_some(show: Show) -> None:
    block = 0x8000  # 8192 refcounts of 16 bits
    runs = drained(PARTS["refcounts"](show("disk.qcow2", (block + 2 * 5000, b"\0\7"))))["runs"]
    assert runs[-2:] == [
        {"first": 15, "last": 24, "refcount": 1},
        {"first": 5000, "last": 5000, "refcount": 7},
    ]


def test_a_refcount_block_named_twice_is_read_once(show: Show) -> None:
    image = show("disk.qcow2", u64(TABLE, *[0x8000] * 2048))
    part = drained(PARTS["refcounts"](image))
    assert part["runs"][-1] == {
        "first": 8192,
        "last": 2048 * 8192 - 1,
        "refcount": None,
        "not-shown": "the block is that of an earlier entry",
    }
    assert image.problems[-1].message == "refcount block 1 refcount=2 (and 2046 more entries of this table)"


def test_snapshot_rows(show: Show) -> None:
    row = drained(PARTS["snapshots"](show("disk.qcow2")))["rows"][0]
    assert (row["id"], row["name"], row["l1-table-offset"]) == ("1", "before-upgrade", 0x3C000)
    assert row["extra-data"] == {"vm-state-size": 0, "disk-size": 64 << 20, "icount": 0}


def test_snapshot_extra_data_of_any_length(show: Show) -> None:
    # 15 bytes more of extra data: the id and the name come from what follows
    row = drained(PARTS["snapshots"](show("disk.qcow2", u32(SNAPSHOTS + 36, 39))))["rows"][0]
    assert row["unknown-extra-data"] == {
        "offset": SNAPSHOTS + 64,
        "length": 15,
        "data": b"1before-upgrade".hex(),
    }
    short = drained(PARTS["snapshots"](show("disk.qcow2", u32(SNAPSHOTS + 36, 8))))["rows"][0]
    assert short["extra-data"] == {"vm-state-size": 0}


def test_the_head_of_a_snapshot_with_too_much_extra_data_is_shown(show: Show) -> None:
    rows = drained(PARTS["snapshots"](show("disk.qcow2", u32(SNAPSHOTS + 36, 5000))))["rows"]
    assert [row["problem"] for row in rows] == ["Too much extra metadata in snapshot table entry 0"]
    assert (rows[0]["offset"], rows[0]["l1-table-offset"]) == (SNAPSHOTS, 0x3C000)


def test_snapshots_behind_the_end_of_the_file_are_one_row(show: Show) -> None:
    image = show("disk.qcow2", field("nb_snapshots", 65536), length=SNAPSHOTS + 0x4F)
    rows = drained(PARTS["snapshots"](image))["rows"]
    assert (rows[1]["index"], rows[1]["offset"], rows[1]["more"]) == (1, SNAPSHOTS + 0x50, 65534)
    assert len(rows) == 2


def test_bitmap_rows(show: Show) -> None:
    rows = drained(PARTS["bitmaps"](show("bitmaps.qcow2")))["rows"]
    assert [(row["name"], row["flag-names"], row["granularity-bits"]) for row in rows] == [
        ("nightly", ["auto"], 12),
        ("weekly", [], 16),
    ]
    assert rows[0]["table"] == {"clusters": 1, "all-ones": 0, "bad": 0, "all-zero": 0}
    assert rows[1]["table"] == {"clusters": 0, "all-ones": 0, "bad": 0, "all-zero": 1}


def test_bitmaps_after_a_bad_one_are_shown(show: Show) -> None:
    image = show("bitmaps.qcow2", (DIRECTORY + 16, b"\2"), u64(0x3C000, 1))
    rows = drained(PARTS["bitmaps"](image))["rows"]
    assert rows[0]["problem"] == "Bitmap 'nightly' doesn't satisfy the constraints"
    assert (rows[0]["type"], "table" in rows[0]) == (2, False)
    assert rows[1]["table"] == {"clusters": 0, "all-ones": 1, "bad": 0, "all-zero": 0}


def test_bitmaps_that_nobody_vouches_for(show: Show) -> None:
    part = drained(PARTS["bitmaps"](show("bitmaps.qcow2", field("autoclear_features", 0))))
    assert part["trusted"] is False
    assert part["warning"].startswith("a program lacking bitmap support modified this file")
    assert [row["name"] for row in part["rows"]] == ["nightly", "weekly"]


BOMBS = {
    "l1": (field("l1_size", 0xFFFFFFFF), "Active L1 table too large"),
    "refcounts": (field("refcount_table_clusters", 0xFFFFFFFF), "Reference count table too large"),
    "snapshots": (field("nb_snapshots", 0xFFFFFFFF), "Snapshot table too large"),
}


@pytest.mark.parametrize("part", BOMBS)
def test_tables_beyond_qemus_limits_are_not_read(part: str, show: Show) -> None:
    patch, reason = BOMBS[part]
    found = PARTS[part](show("disk.qcow2", patch))
    assert list(found) == ["not-shown"]
    assert found["not-shown"].startswith(reason)


def test_a_bitmap_directory_beyond_qemus_limit_is_not_read(show: Show) -> None:
    extension = PARTS["bitmaps"](show("bitmaps.qcow2"))["extension-offset"]
    image = show("bitmaps.qcow2", u64(extension + 16, 1 << 40))
    assert PARTS["bitmaps"](image)["not-shown"].startswith("bitmap directory size (1099511627776) exceeds")


def test_memory_is_bounded(show: Show) -> None:
    # the largest tables that QEMU allows, over a file that is long enough for them
    rows = 60000
    image = show(
        "disk.qcow2",
        field("l1_size", 4194304),
        field("refcount_table_offset", 1 << 29),
        field("refcount_table_clusters", 512),
        u64(L1, *[0x8000000000044000] * rows),
        length=1 << 30,
    )
    assert _peak(PARTS["l1"](image)["rows"]) < 16 << 20  # the rows together have 60 MiB
    assert _peak(PARTS["refcounts"](image)["runs"]) < 64 << 20  # the table has 8 MiB


def _peak(rows: Iterator[dict[str, Any]]) -> int:
    """Bytes that it takes at most to run through the rows."""
    tracemalloc.start()
    try:
        for _ in rows:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
