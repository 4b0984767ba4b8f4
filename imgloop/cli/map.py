"""`imgloop map`: where the guest's data is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

import click

import imgloop
from imgloop.cli.options import Size, file_argument, image_options, output_option, warn
from imgloop.formats.errors import Where, visible
from imgloop.gate import Gate

if TYPE_CHECKING:
    from imgloop.formats.extents import Extents
    from imgloop.image import Image

MIXED = "File contains external, encrypted or compressed clusters."
ROWS = 4096  # put into text at a time: what fits into memory that the process already has
NO_ROW = (
    b'{ "start": %d, "length": 0, "depth": 0, "present": false, "zero": false, "data": false, "compressed": false}'
)


@click.command()
@image_options
@output_option
@click.option("--start-offset", "-s", type=Size("start offset"), default=0, help="Where to start.")
@click.option("--max-length", "-l", type=Size("max length"), help="How much to map.")
@file_argument
@click.pass_obj
def map(
    gate: Gate,
    file: str,
    format: str | None,
    image_opts: bool,
    force_share: bool,
    output: str,
    start_offset: int,
    max_length: int | None,
) -> None:
    """Show which parts of FILE hold data, in which layer of the backing chain, and where there.

    Offsets and lengths are in bytes. The output and the exit codes are those of `qemu-img map`.
    """
    with imgloop.open(file, format, gate=gate, image_opts=image_opts) as image:
        warn(image.warnings)
        if output == "json":
            _print_json(image, start_offset, max_length)
        else:
            _print_table(image, start_offset, max_length, sys.stdout)


def _print_json(image: Image, start: int, length: int | None) -> None:
    from imgloop.map import guest_map

    sys.stdout.flush()
    stdout = sys.stdout.buffer
    stdout.write(b"[")
    first = True
    try:
        for table in _one_ahead(guest_map(image, start, length)):
            for at in range(0, len(table), ROWS):
                stdout.write(_rows(table[at : at + ROWS])[2 * first :])
                first = False
        if first:  # nothing to map: QEMU says so in an entry of its own
            stdout.write(NO_ROW % start)
    finally:
        stdout.write(b"]\n")  # valid JSON up to the damage, if there is any


def _one_ahead(tables: Iterator[Extents]) -> Iterator[Extents]:
    """The tables, each made by a thread while the one before is printed: numpy lets both run at once."""
    first = next(tables, None)
    if first is None:
        return
    yield first
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = thread.submit(next, tables, None)
            yield table


def _rows(table: Extents) -> bytearray:
    """The JSON of a table's extents, each behind a comma and a line break; there may be millions."""
    from imgloop.cli.rows import render
    from imgloop.formats.extents import Kind

    row = ',\n{{ "start": %, "length": %, "depth": %, "present": {}, "zero": {}, "data": {}, "compressed": {}'
    templates = []
    for kind in Kind:
        data = kind in (Kind.DATA, Kind.COMPRESSED, Kind.ENCRYPTED, Kind.HOLE)
        flags = (kind != Kind.UNALLOCATED, not data or kind == Kind.HOLE, data, kind == Kind.COMPRESSED)
        start = row.format(*("true" if flag else "false" for flag in flags)).encode()
        templates += [start + b"}", start + b', "offset": %}']
    columns = [table[name].astype("i8") for name in ("start", "length", "depth", "offset")]
    return render(templates, table["kind"] * 2 + (columns[3] >= 0), columns)


def _print_table(image: Image, start: int, length: int | None, stdout: IO[str]) -> None:
    from imgloop.formats.extents import Kind
    from imgloop.map import guest_map

    stdout.write(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n")
    for table in guest_map(image, start, length):
        table = table[(table["kind"] == Kind.DATA) | (table["kind"] == Kind.COMPRESSED)]
        for guest, size, host, file in zip(
            *(table[name].tolist() for name in ("start", "length", "offset", "file")), strict=True
        ):
            if host < 0:
                raise imgloop.ImageError(MIXED, Where(image.name, field="guest offset", value=guest))
            name = visible(image.files[file].name)
            stdout.write(f"{_hex(guest):<16}{_hex(size):<16}{_hex(host):<16}{name}\n")


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"
