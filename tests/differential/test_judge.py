from pathlib import Path
from typing import Any

import pytest

from tests.differential import judge
from tests.differential.judge import (
    comparable_info,
    comparable_info_text,
    comparable_map,
    comparable_snapshots,
)

OLD = (7, 2, 22)
NEW = (10, 0, 2)

OLD_TABLE = f"""\
Snapshot list:
ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT
1         s1                    0 B 2026-11-22 20:11:12 00:00:00.000          0
2         a b  c            1.5 MiB 2026-11-22 20:11:12 01:02:03.456{"":11}
12        averyveryverylongsnapshotnameindeed      0 B 2026-11-22 20:11:12123:00:00.00012345678901
"""

NEW_TABLE = """\
Snapshot list:
ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT
1       s1                    0 B 2026-11-22 20:11:12  0000:00:00.000          0
2       a b  c            1.5 MiB 2026-11-22 20:11:12  0001:02:03.456         --
12      averyveryverylongsnapshotnameindeed      0 B 2026-11-22 20:11:12  0123:00:00.000 12345678901
"""

OLD_INFO = """\
image: a.qcow2
file format: qcow2
virtual size: 1 MiB (1048576 bytes)
disk size: 348 KiB
cluster_size: 65536
Snapshot list:
ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT
1         s1                    0 B 2026-11-22 20:11:12 00:00:00.000          0
Format specific information:
    compat: 1.1

image: base.raw
file format: raw
virtual size: 1 KiB (1024 bytes)
disk size: 0 B
"""

NEW_INFO = """\
image: a.qcow2
file format: qcow2
virtual size: 1 MiB (1048576 bytes)
disk size: 352 KiB
cluster_size: 65536
Snapshot list:
ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT
1       s1                    0 B 2026-11-22 20:11:12  0000:00:00.000          0
Format specific information:
    compat: 1.1
Child node '/file':
    filename: a.qcow2
    protocol type: file
    file length: 704 KiB (721408 bytes)
    disk size: 352 KiB
    Format specific information:
        extent size hint: 1048576

image: base.raw
file format: raw
virtual size: 1 KiB (1024 bytes)
disk size: 0 B
Child node '/file':
    filename: base.raw
    protocol type: file
    file length: 1 KiB (1024 bytes)
    disk size: 0 B
"""


def entry(start: int, length: int, **more: Any) -> judge.MapEntry:
    plain = {"start": start, "length": length, "depth": 0, "present": True, "zero": False, "data": True}
    return plain | {"compressed": False} | more


def test_what_each_version_knows() -> None:
    assert [judge.knows(what, OLD) for what in judge.KNOWN_SINCE] == [False, False, True, False]
    assert all(judge.knows(what, NEW) for what in judge.KNOWN_SINCE)
    assert judge.knows(judge.CHILDREN, (8, 0, 0))
    assert not judge.knows(judge.COMPRESSED, (8, 1, 5))


def test_both_tables_of_snapshots_have_the_same_rows() -> None:
    rows = comparable_snapshots(OLD_TABLE)
    assert rows == comparable_snapshots(NEW_TABLE)
    assert [row["tag"] for row in rows] == ["s1", "a b  c", "averyveryverylongsnapshotnameindeed"]
    assert rows[1] == {
        "id": "2",
        "tag": "a b  c",
        "vm_size": "1.5 MiB",
        "date": "2026-11-22 20:11:12",
        "vm_clock": "1:02:03.456",
        "icount": "",
    }
    assert [row["icount"] for row in rows] == ["0", "", "12345678901"]
    assert rows[2]["vm_clock"] == "123:00:00.000"


def test_no_snapshots_are_no_rows() -> None:
    assert comparable_snapshots("") == []


def test_another_line_is_no_row_of_snapshots() -> None:
    with pytest.raises(ValueError, match="not a row"):
        comparable_snapshots("Snapshot list:\nqemu-img: what?\n")


def test_json_info_loses_the_children_only_before_they_are_known() -> None:
    child = {"name": "file", "info": {"virtual-size": 512, "children": [], "actual-size": 4096}}
    told = {
        "filename": "a.qcow2",
        "actual-size": 8192,
        "children": [child],
        "format-specific": {"type": "qcow2"},
    }
    older = {"filename": "a.qcow2", "format-specific": {"type": "qcow2"}}
    assert comparable_info([told, told], OLD) == [older, older]
    kept = {"name": "file", "info": {"virtual-size": 512, "children": []}}
    assert comparable_info(told, NEW) == older | {"children": [kept]}


def test_json_info_loses_the_hint_of_the_host_file_system() -> None:
    specific = {"type": "file", "data": {"extent-size-hint": 1048576}}
    assert comparable_info({"format-specific": specific}, NEW) == {"format-specific": {"type": "file", "data": {}}}


def test_human_info_of_both_versions_is_the_same_for_the_older_one() -> None:
    assert comparable_info_text(NEW_INFO, OLD) == comparable_info_text(OLD_INFO, OLD)


def test_human_info_keeps_the_child_node_for_the_newer_one() -> None:
    told = comparable_info_text(NEW_INFO, NEW)
    assert told.count("Child node '/file':") == 2
    assert "    file length: 704 KiB (721408 bytes)\n\nimage: base.raw\n" in told
    assert told.count("Format specific information:") == 1
    assert "disk size" not in told
    assert "1 | s1 | 0 B | 2026-11-22 20:11:12 | 0:00:00.000 | 0\n" in told


def test_comparable_twice_is_comparable_once() -> None:
    for version in (OLD, NEW):
        once = comparable_info_text(NEW_INFO, version)
        assert comparable_info_text(once, version) == once


def test_a_map_for_the_newer_one_is_left_alone() -> None:
    entries = [entry(0, 512), entry(512, 512)]
    assert comparable_map(entries, NEW) == entries


def test_entries_that_differ_only_in_compressed_merge_for_the_older_one() -> None:
    entries = [entry(0, 512), entry(512, 1024, compressed=True), entry(1536, 512)]
    (merged,) = comparable_map(entries, OLD)
    assert merged == {"start": 0, "length": 2048, "depth": 0, "present": True, "zero": False, "data": True}
    assert entries[0]["length"] == 512


@pytest.mark.parametrize(
    "second",
    [
        entry(512, 512, zero=True),
        entry(512, 512, data=False),
        entry(512, 512, present=False),
        entry(512, 512, depth=1),
        entry(512, 512, offset=4608),
        entry(512, 512, filename="other"),
    ],
)
def test_any_other_difference_keeps_entries_apart(second: judge.MapEntry) -> None:
    assert len(comparable_map([entry(0, 512), second], OLD)) == 2


def test_offsets_must_be_contiguous_to_merge() -> None:
    first = entry(0, 512, offset=4096)
    assert len(comparable_map([first, entry(512, 512, offset=4608)], OLD)) == 1
    assert len(comparable_map([first, entry(512, 512, offset=8192)], OLD)) == 2
    assert len(comparable_map([first, entry(512, 512)], OLD)) == 2


def test_present_is_dropped_before_it_is_known() -> None:
    (merged,) = comparable_map([entry(0, 512), entry(512, 512, present=False)], (6, 0, 0))
    assert "present" not in merged
    assert merged["length"] == 1024


def test_the_first_difference_of_two_files(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"abcdef")
    for content, expected in ((b"abcdef", None), (b"abcdeX", 5), (b"abc", 3), (b"", 0)):
        other.write_bytes(content)
        assert judge.first_difference(one, other, chunk_bytes=4) == expected


@judge.needs_qemu
def test_the_judge_answers(tmp_path: Path) -> None:
    assert judge.version() >= (4, 0, 0)
    assert judge.run("create", "-q", "-f", "qcow2", "a.qcow2", "1M", cwd=tmp_path).rc == 0
    assert judge.run("-f", "qcow2", "-c", "write -q -P 7 0 64k", "a.qcow2", cwd=tmp_path, tool="qemu-io").rc == 0
    assert judge.run("snapshot", "-c", "a,b", "a.qcow2", cwd=tmp_path).rc == 0
    assert judge.info("a.qcow2", cwd=tmp_path)["virtual-size"] == 1 << 20
    assert judge.info("driver=qcow2,file.filename=a.qcow2", cwd=tmp_path, image_opts=True)["format"] == "qcow2"
    (only,) = judge.info("a.qcow2", cwd=tmp_path, backing_chain=True)
    assert only["snapshots"][0]["name"] == "a,b"
    assert judge.info_text("a.qcow2", cwd=tmp_path).startswith("image: a.qcow2\n")
    assert judge.map("a.qcow2", cwd=tmp_path, start_offset=65536, max_length=512)[0]["zero"] is True
    assert judge.map_text("a.qcow2", cwd=tmp_path).out.startswith("Offset ")
    assert judge.check("a.qcow2", cwd=tmp_path).report["total-clusters"] == 16
    assert judge.check_text("a.qcow2", cwd=tmp_path).rc == 0
    assert [row["tag"] for row in comparable_snapshots(judge.snapshot_list("a.qcow2", cwd=tmp_path))] == ["a,b"]
    now = judge.raw_bytes_digest("a.qcow2", cwd=tmp_path, fmt="qcow2")
    assert judge.raw_bytes_digest("a.qcow2", cwd=tmp_path, snapshot="a,b") == now


@judge.needs_qemu
def test_a_refusal_is_told_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(
        judge.JudgeRefusedError, match=r"qemu-img info .* exit code 1: .*Could not open"
    ) as refused:
        judge.info("missing.qcow2", cwd=tmp_path)
    assert refused.value.said.rc == 1
