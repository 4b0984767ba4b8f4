"""`imgloop.check` and its command: every damage against what qemu-img said of it, and what it did not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import imgloop
from imgloop.formats.qcow2.claims import Layout
from imgloop.formats.source import Source
from tests.command import call
from tests.differential.test_check import comparable
from tools.damage import DAMAGES, Builder, summary

RECORD = Path(__file__).parent.parent / "damages.json"
SAID: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))

# What imgloop finds in each damage that qemu-img does not say; --deep is on.
UNSAID: dict[str, dict[str, int]] = {
    "l1-only-copied": {"COMPRESSED_DAMAGED": 1, "DATA_IN_METADATA": 2, "METADATA_OVERLAP": 1},
    "l1-duplicate": {"CLUSTER_SHARED": 3, "L2_TABLE_SHARED": 1},
    "l1-duplicate-uncounted": {"CLUSTER_SHARED": 3, "L2_TABLE_SHARED": 1},
    "l1-cut-off": {"METADATA_TRUNCATED": 1, "REFCOUNT_PAST_END": 1},
    "l2-unaligned": {"CLUSTER_SHARED": 1},
    "l2-unaligned-zero": {"CLUSTER_SHARED": 1},
    "l2-duplicate": {"CLUSTER_SHARED": 1},
    "l2-duplicate-counted": {"CLUSTER_SHARED": 1},
    "l2-to-l2": {"DATA_IN_METADATA": 1},
    "l2-to-l2-counted": {"DATA_IN_METADATA": 1},
    "l2-to-reftable": {"DATA_IN_METADATA": 1},
    "l2-to-refblock": {"DATA_IN_METADATA": 1},
    "l2-cut-off": {"REFCOUNT_PAST_END": 1},
    "data-cut-off": {"DATA_TRUNCATED": 1},
    "zero-flag-v2": {"ZERO_FLAG_IN_V2": 2},
    "compressed-garbage": {"COMPRESSED_DAMAGED": 1},
    "compressed-past-end": {"COMPRESSED_DAMAGED": 1},
    "compressed-in-data": {"COMPRESSED_DAMAGED": 1, "CLUSTER_SHARED": 1},
    "subclusters-unaligned": {"CLUSTER_SHARED": 2},
    "refcount-past-end": {"REFCOUNT_PAST_END": 1},
    "refblock-duplicate": {"REFCOUNT_PAST_END": 1, "METADATA_OVERLAP": 1},
    "refblock-to-data": {"REFCOUNT_PAST_END": 1, "DATA_IN_METADATA": 1},
    "refcount-overflow": {"CLUSTER_SHARED": 1},
    "refcount-overflow-snapshots": {"REFCOUNT_PAST_END": 1, "CLUSTER_SHARED": 2, "METADATA_OVERLAP": 1},
    "snapshot-table-at-header": {"METADATA_OVERLAP": 1},
    "snapshot-l1-entry": {"DATA_IN_METADATA": 1},
    "bitmap-in-use": {"BITMAP_IN_USE": 1},
    "bitmap-table-invalid": {"BITMAP_IN_USE": 2},
    "bitmap-table-refused": {"UNREADABLE_IMAGE": 1},
    "bitmap-past-end": {"BITMAP_IN_USE": 1},
    "bitmap-table-past-end": {"BITMAP_IN_USE": 1},
    "bitmap-in-data": {"BITMAP_IN_USE": 1, "DATA_IN_METADATA": 1},
    "bitmaps-stale": {"BITMAPS_STALE": 1},
    "autoclear-without-bitmaps": {"AUTOCLEAR_WITHOUT_EXTENSION": 1},
    "dirty": {"DIRTY": 1},
    "corrupt": {"CORRUPT": 1},
    "l1-too-small": {"UNREADABLE_IMAGE": 1},
    "version-unknown": {"UNREADABLE_IMAGE": 1},
    "feature-unknown": {"UNREADABLE_IMAGE": 1},
    "features-and-l1": {"UNREADABLE_IMAGE": 1, "FIELD_INVALID": 1},
    "extension-too-large": {"UNREADABLE_IMAGE": 1},
    "data-file-swapped": {"DATA_FILE_OFFSET": 2},
    "data-file-short": {"DATA_FILE_SHORT": 1},
    "data-file-not-copied": {"DATA_FILE_OFFSET": 1},
    "backing-missing": {"UNREADABLE_IMAGE": 1},
    "backing-loop": {"UNREADABLE_IMAGE": 1},
    "backing-format": {"BACKING_FORMAT_MISMATCH": 1, "BACKING_SIZE": 1},
    "backing-unrecorded": {"BACKING_FORMAT_MISSING": 1},
    "backing-size": {"BACKING_SIZE": 1},
}
ONLY_NOTES = {"refcount-past-end", "backing-size", "backing-unrecorded"}


def findings(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    answer = call("check", "--findings", "json", *options, "-f", "qcow2", "image.qcow2", cwd=folder)
    return answer.rc, json.loads(answer.out)


def built(name: str, folder: Path) -> Path:
    DAMAGES[name].build(folder / "image.qcow2")
    return folder / "image.qcow2"


def test_every_damage_is_recorded() -> None:
    assert set(SAID) == {name for name, damage in DAMAGES.items() if "hangs" not in damage.tags}
    assert set(UNSAID) <= set(DAMAGES)


@pytest.mark.parametrize("name", SAID)
def test_damage_is_judged_as_recorded(name: str, tmp_path: Path) -> None:
    built(name, tmp_path)
    said = SAID[name]
    ours = call("check", "-f", "qcow2", "--output", "json", "image.qcow2", cwd=tmp_path)
    assert ours.rc == said["rc"]
    assert (json.loads(ours.out) if ours.out.strip() else None) == said["json"]
    lines = comparable(ours.err)
    assert lines[: len(said["first"])] == comparable("\n".join(said["first"]))
    if name != "bitmaps-stale" and not any(line.startswith("qemu-img:") for line in said["first"]):
        assert summary(lines)["sha256"] == said["sha256"]


@pytest.mark.parametrize("name", DAMAGES)
def test_what_qemu_does_not_say(name: str, tmp_path: Path) -> None:
    built(name, tmp_path)
    rc, found = findings(tmp_path, "--deep")
    own = {
        code: number
        for code, number in found["counts"].items()
        if imgloop.formats.findings.RULES[code].counter is None
    }
    assert own == UNSAID.get(name, {})
    strict, _ = findings(tmp_path, "--deep", "--strict")
    assert strict == (2 if rc in (0, 3) and own and name not in ONLY_NOTES and rc != 3 else rc)


@pytest.mark.parametrize("name", DAMAGES)
def test_findings_add_up(name: str, tmp_path: Path) -> None:
    built(name, tmp_path)
    with imgloop.check(tmp_path / "image.qcow2", format="qcow2") as report:
        found = report.findings(limit=None)
        assert len(found) == sum(report.counts.values())
        tally = {code: sum(one.code == code for one in found) for code in report.counts}
        assert tally == report.counts
        assert len(report.findings(limit=2)) == min(2, len(found))


def test_owners_of_a_shared_cluster(tmp_path: Path) -> None:
    built("l2-duplicate-counted", tmp_path)
    _, found = findings(tmp_path)
    (finding,) = found["findings"]
    assert finding["code"] == "CLUSTER_SHARED"
    assert finding["host"] == {"offset": 0x60000, "length": 0x10000}
    assert [guest["offset"] for guest in finding["guest"]] == [0, 0x10000]
    assert [(owner["kind"], owner["l1-index"], owner["l2-index"]) for owner in finding["owners"]] == [
        ("data cluster", 0, 0),
        ("data cluster", 0, 1),
    ]


def test_owners_name_snapshots_and_bitmaps(tmp_path: Path) -> None:
    built("snapshot-l1-entry", tmp_path)
    _, found = findings(tmp_path)
    views = {owner.get("view") for finding in found["findings"] for owner in finding.get("owners", ())}
    assert {"active", "snap1", "snap2"} <= views
    built("bitmap-in-data", tmp_path)
    _, found = findings(tmp_path)
    (finding,) = [one for one in found["findings"] if one["code"] == "DATA_IN_METADATA"]
    assert [(owner["kind"], owner.get("name")) for owner in finding["owners"]] == [
        ("bitmap", "bitmap0"),
        ("data cluster", None),
    ]


def test_limit_shows_some_and_counts_all(tmp_path: Path) -> None:
    built("leaks-many", tmp_path)
    rc, found = findings(tmp_path, "--limit", "5")
    assert (rc, found["shown"], len(found["findings"])) == (3, 5, 5)
    assert found["counts"] == {"CLUSTER_LEAKED": 300}


def test_refused_image_is_diagnosed(tmp_path: Path) -> None:
    built("feature-unknown", tmp_path)
    rc, found = findings(tmp_path)
    assert rc == 1
    assert [one["code"] for one in found["findings"]] == ["UNREADABLE_IMAGE", "CLUSTER_LEAKED"]
    answer = call("check", "image.qcow2", cwd=tmp_path)
    assert answer.rc == 1
    assert "1 findings in what can be read" in answer.err
    assert answer.err.splitlines()[-1].startswith("imgloop: error: Could not open 'image.qcow2': Unsupported")


def test_backing_loop_ends(tmp_path: Path) -> None:
    built("backing-loop", tmp_path)
    answer = call("check", "image.qcow2", cwd=tmp_path)
    assert answer.rc == 1
    assert "infinite loop" in answer.err


def test_raw_has_no_checks(tmp_path: Path) -> None:
    (tmp_path / "image.raw").write_bytes(bytes(512))
    answer = call("check", "-f", "raw", "image.raw", cwd=tmp_path)
    assert (answer.rc, answer.out, answer.err) == (
        63,
        "",
        "imgloop: error: This image format does not support checks\n",
    )


def test_open_image_can_be_checked(tmp_path: Path) -> None:
    with imgloop.open(built("none-snapshots", tmp_path)) as image:
        report = image.check()
        assert report.exit_code == 0
        assert report.counts == {}


def test_listing_for_people(tmp_path: Path) -> None:
    built("l2-to-l2-counted", tmp_path)
    answer = call("check", "--findings", "human", "image.qcow2", cwd=tmp_path)
    assert "owner: L2 table L1[0] of the active image" in answer.out
    assert "Findings: 1 DATA_IN_METADATA" in answer.out


def test_every_l1_entry_names_one_table(tmp_path: Path) -> None:
    builder = Builder()
    entries = 1 << 18
    table = builder.take(entries * 8)
    builder.file[table : table + entries * 8] = builder.word(builder.l1).to_bytes(8, "big") * entries
    builder.set_header(l1_size=entries, l1_table_offset=table)
    builder.write(tmp_path / "image.qcow2")
    with imgloop.check(tmp_path / "image.qcow2") as report:
        assert report.totals()["allocated-clusters"] == 3 * entries
        assert report.counts["REFCOUNT_OVERFLOW"] == 4 * (entries - 65535)


def test_sparse_pebibyte(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    Builder(cluster_bits=21, size=1 << 40).write(path)
    try:
        with path.open("r+b") as file:
            file.truncate(1 << 50)
    except OSError:
        pytest.skip("this file system has no files of a pebibyte")
    with imgloop.check(path) as report:
        assert report.exit_code == 0
        assert report.totals()["image-end-offset"] == 8 << 21


def test_overlapping_tables_are_followed_only_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgloop.formats.qcow2.claims.MOST_ASTRAY", 1 << 17)
    builder = Builder(size=4096 << 20)
    for index in range(8):
        builder.put(builder.l1 + index * 8, builder.l2 + 512 * (index + 1))
    builder.write(tmp_path / "image.qcow2")
    with imgloop.check(tmp_path / "image.qcow2") as report:
        assert report.counts["L2_TABLE_UNALIGNED"] == 8
        assert report.own_counts["L2_TABLES_NOT_FOLLOWED"] == 1
        (event,) = [event for event in report.own_events() if event.code == "L2_TABLES_NOT_FOLLOWED"]
        assert event.values == (6,)


def test_layout_counts_whole_sectors(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(513))
    with imgloop.open(built("none", tmp_path)) as image, path.open("rb") as file:
        driver = image.layers[0].driver
        assert isinstance(driver, imgloop.formats.qcow2.driver.Qcow2)
        layout = Layout(Source(file.fileno(), "image"), driver.header, [], [])
        assert layout.end == 1024
