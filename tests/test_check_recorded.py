"""`imgloop check` against what the fixtures' records say of qemu-img's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import call
from tests.differential.test_check import comparable
from tests.recorded import Fixture, all_fixtures, restore

EVERY = [pytest.param(fixture, id=fixture.name) for fixture in all_fixtures()]


@pytest.mark.parametrize("fixture", EVERY)
def test_fixture_is_checked_as_recorded(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    said = fixture.said
    ours = call("check", "-f", fixture.format, "--output", "json", fixture.name, cwd=tmp_path)
    assert comparable(ours.err) == comparable("\n".join(said["check_stderr"]))
    assert (json.loads(ours.out) if ours.out.strip() else None) == said["check"]
    assert ours.rc == said["check_rc"]


@pytest.mark.parametrize("fixture", EVERY)
def test_sound_fixture_gives_no_finding_of_our_own(fixture: Fixture, tmp_path: Path) -> None:
    restore(fixture.name, tmp_path)
    if said_clean := fixture.said["check_rc"] == 0:
        found = call("check", "--strict", "--deep", "--findings", "json", fixture.name, cwd=tmp_path)
        counts = json.loads(found.out)["counts"]
        assert said_clean
        assert found.rc == 0
        assert set(counts) <= {"BACKING_SIZE"}  # fixtures with backing files of other sizes
