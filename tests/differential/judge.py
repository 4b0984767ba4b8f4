"""
The live judge: what the qemu-img first on PATH says of an image.

Every question is asked with a working directory and relative names, because QEMU repeats the names it
was given in its answers and resolves the name of an external data file against the working directory.

An older QEMU does not know all that a newer one tells. What appeared when is written down once, in
KNOWN_SINCE; the `comparable_...` functions bring an answer to the form that both sides can give. They are
to be applied to both sides, and applying them twice changes nothing.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest

Version = tuple[int, int, int]
MapEntry = dict[str, Any]

TIMEOUT_SECONDS: Final = 60

CHILDREN: Final = "children"
COMPRESSED: Final = "compressed"
PRESENT: Final = "present"
SNAPSHOT_COLUMNS: Final = "snapshot columns"

# The one place that says what an older QEMU does not know, and since which version it is known.
KNOWN_SINCE: Final[Mapping[str, Version]] = {
    # `children` in the JSON of info, with all that is said of the protocol node (its `format-specific`
    # too), and the `Child node '/file':` block of the human form.
    CHILDREN: (8, 0, 0),
    # `compressed` in the entries of map. Without it neighbours that differ in nothing else are one entry.
    COMPRESSED: (8, 2, 0),
    # `present` in the entries of map; neighbours merge in the same way.
    PRESENT: (6, 1, 0),
    # The table of snapshots with VM_SIZE, VM_CLOCK, four digits of hours, and "--" for no icount.
    SNAPSHOT_COLUMNS: (9, 0, 0),
}

# Allocation on the host moves while nobody writes, and the hint is the host file system's own.
_NEVER_COMPARED: Final = frozenset({"actual-size", "extent-size-hint"})
_NEVER_COMPARED_TEXT: Final = re.compile(r" *disk size: | {4}Format specific information:$| {8}extent size hint: ")

_SNAPSHOT_ROW: Final = re.compile(
    r"(?P<id>\S*)\s+(?P<tag>.*?)\s+(?P<vm_size>\S+ (?:[KMGTPE]i)?B)\s+"
    r"(?P<date>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\s*"
    r"(?P<hours>\d+):(?P<clock>\d\d:\d\d\.\d{3})\s*(?P<icount>\d*|--)"
)


@dataclass(frozen=True, slots=True)
class Said:
    """What a command said: its exit code and both streams, decoded as UTF-8."""

    rc: int
    out: str
    err: str


class JudgeRefusedError(Exception):
    """The judge gave an exit code other than 0 where an answer was needed."""

    def __init__(self, command: Iterable[str], said: Said) -> None:
        super().__init__(f"{' '.join(command)}: exit code {said.rc}: {said.err.strip()}")
        self.said = said


def _find(tool: str) -> str | None:
    return shutil.which(tool)


available: Final[bool] = _find("qemu-img") is not None and _find("qemu-io") is not None

needs_qemu: Final = pytest.mark.skipif(not available, reason="qemu-img is missing: the live comparison is skipped")


@cache
def _version_of(executable: str) -> Version:
    out = subprocess.run(
        [executable, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS
    ).stdout
    found = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", out)
    if found is None:
        raise ValueError(f"no version in {out!r}")
    return int(found[1]), int(found[2]), int(found[3] or 0)


def version() -> Version:
    """The version of the judge, such as (7, 2, 22)."""
    executable = _find("qemu-img")
    if executable is None:
        raise FileNotFoundError("qemu-img")
    return _version_of(executable)


def knows(what: str, judge_version: Version) -> bool:
    """Whether a QEMU of that version knows `what`, a key of KNOWN_SINCE."""
    return judge_version >= KNOWN_SINCE[what]


def run(*args: str, cwd: Path, tool: str = "qemu-img") -> Said:
    """Run the tool in the directory `cwd`; any exit code is an answer. More than 60 seconds is an error."""
    done = subprocess.run(
        [tool, *args],
        cwd=cwd,
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    out, err = (stream.decode("utf-8", "surrogateescape") for stream in (done.stdout, done.stderr))
    return Said(done.returncode, out, err)


def _must(*args: str, cwd: Path) -> str:
    said = run(*args, cwd=cwd)
    if said.rc != 0:
        raise JudgeRefusedError(("qemu-img", *args), said)
    return said.out


def _options(fmt: str | None, **switches: bool | int | None) -> list[str]:
    """Long options, in the order given; False and None leave the option out."""
    words = [] if fmt is None else ["-f", fmt]
    for name, value in switches.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words.append(f"{option}={value}")
    return words


def info(
    name: str, *, cwd: Path, backing_chain: bool = False, fmt: str | None = None, image_opts: bool = False
) -> Any:
    """The parsed JSON of `qemu-img info`: an object, or an array with `backing_chain`."""
    options = _options(fmt, backing_chain=backing_chain, image_opts=image_opts)
    return json.loads(_must("info", "--output=json", *options, name, cwd=cwd))


def info_text(
    name: str, *, cwd: Path, backing_chain: bool = False, fmt: str | None = None, image_opts: bool = False
) -> str:
    """The human form of `qemu-img info`."""
    options = _options(fmt, backing_chain=backing_chain, image_opts=image_opts)
    return _must("info", *options, name, cwd=cwd)


def map(
    name: str,
    *,
    cwd: Path,
    fmt: str | None = None,
    start_offset: int | None = None,
    max_length: int | None = None,
    image_opts: bool = False,
) -> list[MapEntry]:
    """The entries of `qemu-img map --output=json`; offsets and lengths are bytes."""
    options = _options(fmt, start_offset=start_offset, max_length=max_length, image_opts=image_opts)
    entries: list[MapEntry] = json.loads(_must("map", "--output=json", *options, name, cwd=cwd))
    return entries


def map_text(
    name: str,
    *,
    cwd: Path,
    fmt: str | None = None,
    start_offset: int | None = None,
    max_length: int | None = None,
) -> Said:
    """
    The human form of `qemu-img map`. Compressed clusters make it stop with exit code 1 after the rows
    before them, and that is an answer like any other.
    """
    options = _options(fmt, start_offset=start_offset, max_length=max_length)
    return run("map", *options, name, cwd=cwd)


@dataclass(frozen=True, slots=True)
class Checked:
    """The verdict of `qemu-img check`: exit code, the parsed JSON (None if there is none), messages."""

    rc: int
    report: Any
    err: str


def check(name: str, *, cwd: Path, fmt: str | None = None) -> Checked:
    """`qemu-img check --output=json`; 0 is clean, 1 failed, 2 corrupt, 3 leaks, 63 not supported."""
    said = run("check", "--output=json", *_options(fmt), name, cwd=cwd)
    return Checked(said.rc, json.loads(said.out) if said.out.strip() else None, said.err)


def check_text(name: str, *, cwd: Path, fmt: str | None = None) -> Said:
    """The human form of `qemu-img check`."""
    return run("check", *_options(fmt), name, cwd=cwd)


def snapshot_list(name: str, *, cwd: Path) -> str:
    """The human form of `qemu-img snapshot -l`; empty without snapshots."""
    return _must("snapshot", "-l", name, cwd=cwd)


def convert(name: str, target: Path, *, cwd: Path, snapshot: str | None = None, fmt: str | None = None) -> None:
    """Write what a guest reads, of the image or of the internal snapshot so named, to a raw file."""
    options = _options(fmt)
    if snapshot is not None:
        # Plain `-l NAME` would look for an id first; a comma inside of an option is doubled.
        options += ["-l", "snapshot.name=" + snapshot.replace(",", ",,")]
    _must("convert", "-O", "raw", "-t", "unsafe", *options, name, str(target.absolute()), cwd=cwd)


def raw_bytes_digest(name: str, *, cwd: Path, snapshot: str | None = None, fmt: str | None = None) -> str:
    """SHA-256, in hexadecimal, of all bytes that a guest reads."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "raw")
        convert(name, target, cwd=cwd, snapshot=snapshot, fmt=fmt)
        with target.open("rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()


def comparable_info(answer: Any, judge_version: Version) -> Any:
    """The JSON of info, an object or a chain's array, without what cannot be compared with that version."""
    dropped = _NEVER_COMPARED if knows(CHILDREN, judge_version) else _NEVER_COMPARED | {CHILDREN}
    return _without(answer, dropped)


def _without(value: Any, dropped: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, dropped) for key, inner in value.items() if key not in dropped}
    if isinstance(value, list):
        return [_without(inner, dropped) for inner in value]
    return value


def comparable_info_text(text: str, judge_version: Version) -> str:
    """
    The human form of info without what cannot be compared with that version. The rows of snapshots are
    brought to one form that depends on no version.
    """
    lines: list[str] = []
    in_child = False
    for line in text.splitlines():
        in_child = line.startswith("Child node '/") or (in_child and line.startswith(" "))
        if in_child and not knows(CHILDREN, judge_version):
            continue
        if _NEVER_COMPARED_TEXT.match(line):
            continue
        if _is_snapshot_header(line):
            line = "ID TAG VM_SIZE DATE VM_CLOCK ICOUNT"
        elif (row := _snapshot_row(line)) is not None:
            line = " | ".join(row.values())
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def comparable_snapshots(text: str) -> list[dict[str, str]]:
    """
    The rows of a listing of snapshots in either layout: id, tag, vm_size, date, vm_clock, icount.
    The hours of vm_clock have no leading zeros, and no icount is the empty string. Blanks at the end of
    a tag cannot be told from the filling of its column and are lost.
    """
    rows = []
    for line in text.splitlines():
        if line == "Snapshot list:" or _is_snapshot_header(line):
            continue
        row = _snapshot_row(line)
        if row is None:
            raise ValueError(f"not a row of snapshots: {line!r}")
        rows.append(row)
    return rows


def _is_snapshot_header(line: str) -> bool:
    return re.fullmatch(r"ID +TAG +VM[ _]SIZE +DATE +VM[ _]CLOCK +ICOUNT", line) is not None


def _snapshot_row(line: str) -> dict[str, str] | None:
    found = _SNAPSHOT_ROW.fullmatch(line)
    if found is None:
        return None
    icount = "" if found["icount"] == "--" else found["icount"]
    row = {key: found[key] for key in ("id", "tag", "vm_size", "date")}
    return row | {"vm_clock": f"{int(found['hours'])}:{found['clock']}", "icount": icount}


def comparable_map(entries: Iterable[Mapping[str, Any]], judge_version: Version) -> list[MapEntry]:
    """
    The entries of map as that version would give them: keys that it does not know are dropped, and
    neighbours that then differ in nothing are merged as qemu-img merges them.
    """
    unknown = {key for key in (PRESENT, COMPRESSED) if not knows(key, judge_version)}
    merged: list[MapEntry] = []
    for entry in entries:
        known = {key: value for key, value in entry.items() if key not in unknown}
        if unknown and merged and _continues(merged[-1], known):
            merged[-1]["length"] += known["length"]
        else:
            merged.append(known)
    return merged


def _continues(first: MapEntry, second: MapEntry) -> bool:
    """Whether qemu-img tells both as one: the same in all but place, and the host offsets contiguous."""
    expected = dict(first)
    expected["start"] = first["start"] + first["length"]
    expected["length"] = second["length"]
    if "offset" in first:
        expected["offset"] = first["offset"] + first["length"]
    return expected == second


def first_difference(ours: Path, theirs: Path, chunk_bytes: int = 1 << 20) -> int | None:
    """The byte offset at which two files first differ, or None; a shorter file differs at its end."""
    with ours.open("rb") as one, theirs.open("rb") as other:
        for start in count(0, chunk_bytes):
            a, b = one.read(chunk_bytes), other.read(chunk_bytes)
            if a != b:
                same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
                return start + (min(len(a), len(b)) if same is None else same)
            if not a:
                break
    return None
