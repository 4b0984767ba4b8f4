"""The fixtures are complete, small, and still what QEMU takes them for."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.recorded import FIXTURES, Fixture, all_fixtures, holes_of, load, restore

LIMIT = 8 << 20  # bytes of all files in the folder
EVERY = [pytest.param(fixture, id=fixture.name) for fixture in all_fixtures()]
LIVE = pytest.mark.skipif(
    shutil.which("qemu-img") is None,
    reason="QEMU-IMG IS MISSING: the fixtures are not compared with a live QEMU",
)


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) < LIMIT


def test_every_image_has_its_record_and_every_record_its_image() -> None:
    records = {path.name.removesuffix(".json") for path in FIXTURES.glob("*.json")}
    images = [path.name.removesuffix(".gz") for path in FIXTURES.iterdir() if path.suffix != ".json"]
    assert sorted(images) == sorted(records)
    assert {needed for fixture in all_fixtures() for needed in fixture.said["files"]} <= records


@pytest.mark.parametrize("fixture", EVERY)
def test_restored_as_recorded(fixture: Fixture, tmp_path: Path) -> None:
    image = restore(fixture.name, tmp_path)
    assert image.stat().st_size == fixture.said["size"]
    for needed in fixture.said["files"]:
        assert (tmp_path / needed).stat().st_size == load(needed).said["size"]
    if not _keeps_holes(tmp_path):
        pytest.skip("this file system keeps no holes of 4 KiB")
    assert holes_of(image) == fixture.said["holes"]


def test_holes_hold_only_zeros(tmp_path: Path) -> None:
    # A stored image is dense: were there data where the record has a hole, restoring would lose it.
    for fixture in all_fixtures():
        if fixture.path.suffix != ".gz":
            restored = restore(fixture.name, tmp_path).read_bytes()
            assert restored == fixture.path.read_bytes(), fixture.name


def test_fixture_dir_holds_every_image(fixture_dir: Path) -> None:
    for fixture in all_fixtures():
        assert (fixture_dir / fixture.name).stat().st_size == fixture.said["size"]
    assert not list(fixture_dir.glob("*.gz"))


@pytest.mark.datafiles(FIXTURES / "chain-top.qcow2")
def test_fixture_dir_holds_what_a_test_names(fixture_dir: Path) -> None:
    images = {path.name for path in fixture_dir.iterdir()}
    assert images == {"chain-top.qcow2", "chain-mid.qcow2", "chain-base.qcow2"}


@LIVE
@pytest.mark.parametrize("fixture", EVERY)
def test_live_qemu_reads_the_same_bytes(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    assert _digest(tmp_path, "-f", fixture.format, fixture.name) == fixture.said["sha256"]
    for label, digest in fixture.said["snapshots"].items():
        assert _digest(tmp_path, "-f", fixture.format, "-l", f"snapshot.name={label}", fixture.name) == digest


@LIVE
@pytest.mark.parametrize("fixture", EVERY)
def test_live_qemu_checks_alike(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    done = _qemu_img(tmp_path, "check", "-f", fixture.format, "--output=json", fixture.name)
    assert done.returncode == fixture.said["check_rc"]
    assert done.stderr.splitlines() == fixture.said["check_stderr"]
    assert (json.loads(done.stdout) if done.stdout.strip() else None) == fixture.said["check"]


def _qemu_img(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ("qemu-img", *arguments)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _digest(folder: Path, *source: str) -> str | None:
    """SHA-256 of what convert makes of an image; None where it needs a key."""
    if _qemu_img(folder, "convert", "-O", "raw", *source, "guest-bytes").returncode:
        return None
    with (folder / "guest-bytes").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keeps_holes(folder: Path) -> bool:
    probe = folder / "probe"
    with probe.open("wb") as file:
        os.pwrite(file.fileno(), b"x" * 4096, 4096)
        os.pwrite(file.fileno(), b"x" * 4096, 12288)
    found = holes_of(probe)
    probe.unlink()
    return found == [[0, 4096], [8192, 4096]]
