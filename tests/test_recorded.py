"""Every fixture: info, map, snapshot list and bytes are what qemu-img said of it, even where none is installed."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import imgloop
from tests.command import call
from tests.differential import judge
from tests.recorded import Fixture, all_fixtures, holes_of, restore

NEWEST = (10, 0, 0)  # the records were asked of a QEMU that knows all
every_fixture = pytest.mark.parametrize("fixture", all_fixtures(), ids=lambda fixture: fixture.name)


def comparable(info: Any) -> Any:
    return judge.comparable_info(info, NEWEST)


@every_fixture
def test_info(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    answer = call("info", "--output", "json", fixture.name, cwd=tmp_path)
    assert (answer.rc, answer.err) == (0, "")
    assert comparable(answer.json) == comparable(fixture.said["info"])


@every_fixture
def test_map(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    if holes_of(tmp_path / fixture.name) != fixture.said["holes"]:
        pytest.skip("this file system does not keep the holes that the record was made with")
    answer = call("map", "--output", "json", fixture.name, cwd=tmp_path)
    if fixture.said["map"] is None:  # encrypted
        assert answer.rc == 1
        assert "encrypted" in answer.err
    else:
        assert (answer.rc, answer.err) == (0, "")
        assert answer.json == fixture.said["map"]


@every_fixture
def test_snapshot_list(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    if fixture.said["map"] is None:
        pytest.skip("encrypted images can only be shown by info")
    answer = call("snapshot", "-l", fixture.name, cwd=tmp_path)
    assert answer.rc == 0
    said = judge.comparable_snapshots(fixture.said["snapshot_list"])
    assert judge.comparable_snapshots(answer.out) == said
    assert len(said) == len(fixture.said["snapshots"])


@every_fixture
def test_bytes(fixture: Fixture, tmp_path: Path) -> None:
    path = restore(fixture.name, tmp_path)
    if fixture.said["sha256"] is None:
        with pytest.raises(imgloop.OpenError, match="encrypted"):
            imgloop.open(path)
        return
    # a data file's name counts from the current directory
    out = tmp_path / "out.raw"
    answer = call("read", "-o", out, fixture.name, cwd=tmp_path)
    assert (answer.rc, answer.err) == (0, "")
    assert sha256(out.read_bytes()).hexdigest() == fixture.said["sha256"]
    for name, then in fixture.said["snapshots_applied"].items():
        with imgloop.open(path, snapshot=name) as image:
            assert image.size == then["size"]
            assert sha256(image.pread(image.size, 0)).hexdigest() == then["sha256"]


def test_fixtures_through_datafiles(fixture_dir: Path) -> None:
    """The whole folder at once, as pytest-datafiles hands it out."""
    with imgloop.open(fixture_dir / "overlay.qcow2") as image:
        assert [layer.node.filename.rsplit("/", 1)[-1] for layer in image.layers] == [
            "overlay.qcow2",
            "disk.qcow2",
        ]
        assert image.pread(2, 510) == b"\x55\xaa"
