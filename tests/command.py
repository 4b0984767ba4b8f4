"""The command line, called in this process: what it wrote and how it ended."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgloop.cli import run


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call wrote on stdout and stderr, and its exit code."""

    rc: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)


def call(*args: str | Path, cwd: Path | None = None) -> Answer:
    """Run `imgloop ARGS` in `cwd`; what goes to file descriptors directly is not seen."""
    written, err = io.BytesIO(), io.StringIO()
    out = io.TextIOWrapper(written, encoding="utf-8", write_through=True)
    before = Path.cwd()
    try:
        os.chdir(cwd or before)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            rc = run([str(arg) for arg in args])
    finally:
        os.chdir(before)
    return Answer(rc, written.getvalue().decode(), err.getvalue())
