"""Fixtures: disk images made by QEMU, each beside a record of what qemu-img says of it.

`fixtures/NAME` is the image (or `fixtures/NAME.gz`, for git keeps no holes) and `fixtures/NAME.json` the
record. `tools/make_fixtures.py` makes both again. The keys of a record:

- `description`, `made_with` (commands), `made_by` and `qemu` (version lines of the QEMU that made the
  image and of the one that was asked about it);
- `files`: other fixtures that must lie beside this one, such as its backing file;
- `size`: length of the image file in bytes; `holes`: `[start, length]` of its holes, in bytes;
- `info`, `map`, `check`: the parsed JSON of these subcommands, or null where QEMU printed none (`map` and
  `info` hold no `actual-size`, which belongs to the file system); `check_rc`, `check_stderr` (lines);
- `sha256`: of all the guest's bytes (null for encrypted images); `snapshots`: by name of each internal
  snapshot, the same of what `convert -l` gives, which is as long as the disk is now; `snapshots_applied`:
  the `size` in bytes and the `sha256` of the disk as it was then;
- `snapshot_list`: what `qemu-img snapshot -l` prints in UTC.

QEMU looks for a data file in the current directory and the names in a record are relative: run a
comparison inside the directory into which the fixture was restored.
"""

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIXTURES: Path = Path(__file__).resolve().parent.parent / "fixtures"

_PIECE = 1 << 20  # bytes moved at a time


@dataclass(frozen=True)
class Fixture:
    """One image: its name, where it is stored (perhaps compressed), and what QEMU said of it."""

    name: str
    path: Path
    said: dict[str, Any]

    @property
    def format(self) -> str:
        """Name of the image format, `raw` or `qcow2`."""
        return self.name.rpartition(".")[2]


def load(name: str, folder: Path = FIXTURES) -> Fixture:
    """The fixture of this name, read from a folder laid out as `fixtures/` is."""
    said = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    packed = folder / f"{name}.gz"
    return Fixture(name, packed if packed.exists() else folder / name, said)


def all_fixtures() -> list[Fixture]:
    """All fixtures, by name."""
    return [load(record.name.removesuffix(".json")) for record in sorted(FIXTURES.glob("*.json"))]


def restore(fixture_name: str, directory: Path, folder: Path = FIXTURES) -> Path:
    """Put an image, and every file that it needs, into a directory; return the path of the image.

    The holes that QEMU saw are made again, because what it says of a raw image depends on them. A file that
    is there already is written anew.
    """
    waiting, placed = [fixture_name], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in placed:
            placed.add(name)
            fixture = load(name, folder)
            _lay_out(fixture, directory / name)
            waiting += fixture.said["files"]
    return directory / fixture_name


def holes_of(path: Path) -> list[list[int]]:
    """The holes of a file as `[start, length]` in bytes, as the file system tells them."""
    holes: list[list[int]] = []
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at < end:
            start = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            if start >= end:
                break
            try:
                at = os.lseek(file.fileno(), start, os.SEEK_DATA)
            except OSError:  # ENXIO: no data up to the end
                at = end
            holes.append([start, at - start])
    return holes


def _lay_out(fixture: Fixture, target: Path) -> None:
    """Write the stored image to a new file, leaving out the recorded holes."""
    size = fixture.said["size"]
    target.unlink(missing_ok=True)
    unpack = gzip.open if fixture.path.suffix == ".gz" else open
    with unpack(fixture.path, "rb") as source, target.open("xb") as file:
        file.truncate(size)
        for start, end in _data_ranges(size, fixture.said["holes"]):
            source.seek(start)
            file.seek(start)
            for at in range(start, end, _PIECE):
                file.write(source.read(min(_PIECE, end - at)))


def _data_ranges(size: int, holes: list[list[int]]) -> Iterator[tuple[int, int]]:
    """The `(start, end)` of what lies between the holes, in order."""
    at = 0
    for start, length in holes:
        if start > at:
            yield at, start
        at = start + length
    if at < size:
        yield at, size
