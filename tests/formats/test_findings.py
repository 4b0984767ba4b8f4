"""The declaration of findings is complete, and each of them has a damage that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

import imgloop
from imgloop.formats.findings import FINDINGS, OWN_CODES, RULES, Event, Rule, total, worst
from tools.damage import DAMAGES

# What no small image can show: too many overlapping tables.
UNSEEN = {"L2_TABLES_NOT_FOLLOWED"}


@pytest.mark.parametrize("rule", FINDINGS, ids=lambda rule: rule.code)
def test_rule_is_complete(rule: Rule) -> None:
    assert rule.title and rule.meaning and rule.remedy
    assert (rule.counter is None) == (rule.code in OWN_CODES)
    assert RULES[rule.code] is rule
    if rule.message:
        text = Event(rule.code, tuple(range(1, len(rule.fields) + 1))).text
        assert "%" not in text


def test_codes_are_distinct() -> None:
    assert len({rule.code for rule in FINDINGS}) == len(FINDINGS)


def test_every_finding_has_a_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    for name, damage in DAMAGES.items():
        folder = tmp_path / name
        folder.mkdir()
        damage.build(folder / "image.qcow2")
        monkeypatch.chdir(folder)
        with imgloop.check("image.qcow2", format="qcow2") as report:
            report.decode_all()
            seen |= set(report.counts)
    assert {rule.code for rule in FINDINGS} - seen == UNSEEN


def test_totals_and_severities() -> None:
    assert total({"CLUSTER_LEAKED": 3, "DATA_UNALIGNED": 2, "DIRTY": 1}, "leaks") == 3
    assert worst([RULES["DIRTY"], RULES["CLUSTER_LEAKED"]]) == "leak"
    assert worst([]) is None
