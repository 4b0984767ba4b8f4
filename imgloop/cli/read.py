"""`imgloop read`: a part of what the guest sees, as bytes or as a hex dump."""

from __future__ import annotations

import sys

import click

import imgloop
from imgloop.cli.options import Size, file_argument, image_options, warn
from imgloop.cli.progress import progress_bar, progress_option
from imgloop.formats.errors import OutOfRangeError, UsageError, Where
from imgloop.gate import Gate
from imgloop.image import Image

LINE = 16  # bytes in a line of a hex dump
CHUNK = 1 << 16  # bytes dumped at a time


@click.command()
@image_options
@click.option("-l", "--snapshot", metavar="SNAPSHOT", help="Read an internal snapshot, by id or name.")
@click.option("--offset", type=Size("offset"), default=0, help="Where to start: bytes, 4k, 1M, 8s (sectors).")
@click.option("--length", type=Size("length"), help="How much to read; without it, to the end.")
@click.option("-o", "--out", metavar="OUT", help="Write to this file instead of stdout.")
@click.option("-x", "--hex", "hexadecimal", is_flag=True, help="A hex dump with guest offsets.")
@progress_option
@file_argument
@click.pass_obj
def read(
    gate: Gate,
    file: str,
    format: str | None,
    image_opts: bool,
    force_share: bool,
    snapshot: str | None,
    offset: int,
    length: int | None,
    out: str | None,
    hexadecimal: bool,
    progress: str,
) -> None:
    """Read guest bytes of FILE: those at --offset, --length of them, through its whole backing chain.

    OUT appears only when it is complete, with holes where the guest has zeros.
    """
    if out and hexadecimal:
        raise UsageError("-o and -x are mutually exclusive")
    with imgloop.open(file, format, snapshot=snapshot, gate=gate, image_opts=image_opts) as image:
        warn(image.warnings)
        if offset > image.size:
            raise OutOfRangeError(
                f"Offset {offset} is past the end: the image has {image.size} bytes", Where(image.name)
            )
        if length is None:
            length = image.size - offset
        if offset + length > image.size:
            raise OutOfRangeError(
                f"Cannot read {length} bytes at offset {offset}: the image has {image.size} bytes",
                Where(image.name),
            )
        if hexadecimal:
            hex_dump(image, offset, length)
        else:
            _copy(image, offset, length, out, progress)


def _copy(image: Image, offset: int, length: int, out: str | None, progress: str) -> None:
    from imgloop.output import copy_range, whole_file

    with progress_bar(progress, length, "reading") as advance:
        if out is None:
            sys.stdout.flush()
            copy_range(image, offset, length, sys.stdout.fileno(), progress=advance)
        else:
            with whole_file(out, keep=image.files) as fd:
                copy_range(image, offset, length, fd, progress=advance)


def hex_dump(image: Image, offset: int, length: int) -> None:
    """Print lines of guest offset, 16 bytes, and their ASCII; a run of equal lines is one `*`, as hexdump -C."""
    previous, starred = b"", False
    end = offset + length
    for start in range(offset, end, CHUNK):
        data = image.pread(min(CHUNK, end - start), start)
        for at in range(0, len(data), LINE):
            row = data[at : at + LINE]
            if row == previous and len(row) == LINE:
                if not starred:
                    click.echo("*")
                starred = True
                continue
            previous, starred = row, False
            click.echo(_line(start + at, row))
    click.echo(f"{end:08x}")


def _line(offset: int, row: bytes) -> str:
    left, right = row[:8].hex(" "), row[8:].hex(" ")
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
    return f"{offset:08x}  {left:<23}  {right:<23}  |{text}|"
