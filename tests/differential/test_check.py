"""`imgloop check` against the live qemu-img: every damage by name, streams and exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import imgloop
from tests.command import call
from tests.differential import judge
from tests.recorded import restore
from tools.damage import DAMAGES, random_image

# QEMU prints this hint without the end of the line, glued to whatever comes next.
_GLUED = "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
_OURS = re.compile(r"imgloop: (?:corruption|warning|note): [A-Z0-9_]{4,}: |imgloop: note: \d+ ")
COMPARED = [name for name, damage in DAMAGES.items() if "hangs" not in damage.tags]


def comparable(stderr: str) -> list[str]:
    """The lines that both programs print, without the name of the program and our place of the fault."""
    lines = []
    for line in stderr.splitlines():
        if _OURS.match(line):
            continue
        line = re.sub(r"^(qemu-img: |imgloop: error: |imgloop: )", "", line).removeprefix(_GLUED)
        if line.startswith("Could not open"):
            line = re.sub(r" \[[^\]]*\]$", "", line)
        if line:
            lines.append(line)
    return lines


def assert_judged_alike(folder: Path) -> None:
    theirs = judge.check("image.qcow2", cwd=folder, fmt="qcow2")
    ours = call("check", "-f", "qcow2", "--output", "json", "image.qcow2", cwd=folder)
    assert comparable(ours.err) == comparable(theirs.err)
    assert (json.loads(ours.out) if ours.out.strip() else None) == theirs.report
    assert ours.rc == theirs.rc


@judge.needs_qemu
@pytest.mark.parametrize("name", COMPARED)
def test_damage_is_judged_alike(name: str, tmp_path: Path) -> None:
    DAMAGES[name].build(tmp_path / "image.qcow2")
    assert_judged_alike(tmp_path)


@judge.needs_qemu
@pytest.mark.parametrize("seeds", [range(start, start + 25) for start in range(0, 200, 25)], ids=str)
def test_random_damage_is_judged_alike(seeds: range, tmp_path: Path) -> None:
    for seed in seeds:
        random_image(seed).write(tmp_path / "image.qcow2")
        assert_judged_alike(tmp_path)


@judge.needs_qemu
def test_luks_header_is_claimed(tmp_path: Path) -> None:
    # QEMU wants the key, which it has no need of: the library does without
    restore("luks.qcow2", tmp_path)
    options = "driver=qcow2,encrypt.key-secret=key,file.filename=luks.qcow2"
    secret = "secret,id=key,data=orchard"
    said = judge.run("check", "--output=json", "--object", secret, "--image-opts", options, cwd=tmp_path)
    theirs = json.loads(said.out)
    with imgloop.check(tmp_path / "luks.qcow2") as report:
        ours = report.to_json()
        assert {key: ours[key] for key in ours if key != "filename"} == {
            key: theirs[key] for key in theirs if key != "filename"
        }
        assert set(report.counts) == {"UNREADABLE_IMAGE"}


@judge.needs_qemu
@pytest.mark.parametrize("name", COMPARED)
def test_summary_for_people_is_the_same(name: str, tmp_path: Path) -> None:
    DAMAGES[name].build(tmp_path / "image.qcow2")
    theirs = judge.check_text("image.qcow2", cwd=tmp_path, fmt="qcow2")
    ours = call("check", "-f", "qcow2", "image.qcow2", cwd=tmp_path)
    assert (ours.out, ours.rc) == (theirs.out, theirs.rc)
    quiet = call("check", "-q", "-f", "qcow2", "image.qcow2", cwd=tmp_path)
    assert (quiet.out, quiet.rc) == ("", theirs.rc)
