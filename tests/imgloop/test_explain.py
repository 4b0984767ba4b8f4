"""`imgloop explain`: both ways through an image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import imgloop
from imgloop.explain import explain_guest
from tests.command import call
from tests.recorded import restore
from tools.damage import DAMAGES


def test_host_names_all_owners(tmp_path: Path) -> None:
    DAMAGES["none-snapshots"].build(tmp_path / "image.qcow2")
    found = json.loads(call("explain", "--host", "0x50010", "--output", "json", "image.qcow2", cwd=tmp_path).out)
    assert (found["cluster"], found["refcount"], found["claims"]) == (5, 4, 4)
    assert [owner["view"] for owner in found["owners"]] == ["active", "snap1", "snap2", "snap3"]
    assert all(owner["holds"] and owner["guest"]["offset"] == 0 for owner in found["owners"])


@pytest.mark.parametrize(
    ("offset", "kind"),
    [
        ("0", "header"),
        ("64k", "refcount table"),
        ("128k", "refcount block"),
        ("192k", "L1 table"),
        ("256k", "L2 table"),
    ],
)
def test_host_names_structures(offset: str, kind: str, tmp_path: Path) -> None:
    DAMAGES["none"].build(tmp_path / "image.qcow2")
    found = json.loads(call("explain", "--host", offset, "--output", "json", "image.qcow2", cwd=tmp_path).out)
    assert [owner["kind"] for owner in found["owners"]] == [kind]


def test_host_that_nobody_claims(tmp_path: Path) -> None:
    DAMAGES["leak"].build(tmp_path / "image.qcow2")
    assert "nobody claims it" in call("explain", "--host", "512k", "image.qcow2", cwd=tmp_path).out
    assert "past the end" in call("explain", "--host", "1G", "image.qcow2", cwd=tmp_path).out


def test_compressed_neighbours_share_a_cluster(tmp_path: Path) -> None:
    DAMAGES["none-compressed"].build(tmp_path / "image.qcow2")
    found = json.loads(call("explain", "--host", "512k", "--output", "json", "image.qcow2", cwd=tmp_path).out)
    assert {owner["kind"] for owner in found["owners"]} == {"compressed cluster"}
    assert sum(owner["holds"] for owner in found["owners"]) == 1


def test_guest_goes_down_the_chain(tmp_path: Path) -> None:
    with imgloop.open(restore("chain-top.qcow2", tmp_path)) as image:
        for table in image.iter_extents():
            for extent in table[:: max(1, len(table) // 50)]:
                found = explain_guest(image, int(extent["start"]))
                last = found["layers"][-1]
                assert last.get("host", -1) == int(extent["offset"])
                if last["answer"] not in ("unallocated", "zero"):
                    assert last["depth"] == int(extent["depth"])


def test_guest_of_a_snapshot(tmp_path: Path) -> None:
    DAMAGES["none-snapshots"].build(tmp_path / "image.qcow2")
    answer = call("explain", "--guest", "0", "-l", "snap2", "image.qcow2", cwd=tmp_path)
    assert answer.out.splitlines()[0] == "guest offset 0x0: data"
    assert "data at 0x50000 of image.qcow2" in answer.out


def test_guest_that_cannot_be_read(tmp_path: Path) -> None:
    DAMAGES["l2-unaligned"].build(tmp_path / "image.qcow2")
    answer = call("explain", "--guest", "0", "image.qcow2", cwd=tmp_path)
    assert answer.rc == 0
    assert "invalid" in answer.out and "unaligned" in answer.out


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    DAMAGES["none"].build(tmp_path / "image.qcow2")
    for words in ((), ("--host", "0", "--guest", "0"), ("--host", "0", "-l", "x"), ("--guest", "1T")):
        assert call("explain", *words, "image.qcow2", cwd=tmp_path).rc == 1
    (tmp_path / "raw").write_bytes(bytes(512))
    assert call("explain", "--host", "0", "-f", "raw", "raw", cwd=tmp_path).rc == 1
    assert "data at" in call("explain", "--guest", "0", "-f", "raw", "raw", cwd=tmp_path).out
