"""What the common calls import: start-up is paid for by every one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.recorded import restore

HEAVY = {"numpy", "cryptography", "rich", "isal", "backports", "compression", "concurrent.futures", "hypothesis"}


@pytest.mark.parametrize(
    "words", [["--help"], ["info", "--help"], ["info", "v3.qcow2"], ["--version"]], ids=" ".join
)
def test_no_heavy_import(words: list[str], tmp_path: Path) -> None:
    restore("v3.qcow2", tmp_path)
    code = f"import sys, imgloop.cli; rc = imgloop.cli.run({words!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stderr.split())
