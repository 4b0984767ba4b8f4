"""The QEMU that is on PATH, as a judge."""

import shutil
import subprocess
from pathlib import Path

import pytest

MISSING = [tool for tool in ("qemu-img", "qemu-io") if shutil.which(tool) is None]
LIVE = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} is missing: NOTHING here is compared with a live QEMU"
)


def qemu(tool: str, *arguments: str, cwd: Path, timeout: float = 30) -> subprocess.CompletedProcess[bytes]:
    """Run a program of QEMU's in a directory."""
    command = (tool, *arguments)
    return subprocess.run(command, cwd=cwd, capture_output=True, check=False, timeout=timeout)


def complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line of QEMU's errors, without the program's name; hints and earlier warnings left out."""
    lines = done.stderr.decode("utf-8", "surrogateescape").splitlines()
    said = [line.partition(": ")[2] for line in lines if line.startswith(("qemu-img: ", "qemu-io: "))]
    return said[-1] if said else ""
