"""`imgloop dd`: copy a part of an image to a raw file, with the operands of `qemu-img dd`."""

from __future__ import annotations

import re

import click

import imgloop
from imgloop.cli.options import image_options, warn
from imgloop.cli.progress import progress_bar, progress_option
from imgloop.formats.driver import SECTOR
from imgloop.gate import Gate
from imgloop.sizes import MAX_SIZE, parse_size

INT_MAX = (1 << 31) - 1
RANGES = {"bs": (1, INT_MAX), "count": (0, MAX_SIZE), "skip": (0, MAX_SIZE)}


@click.command()
@image_options
@click.option("-O", "--output-format", metavar="FMT", default="raw", help="The target's format: raw.")
@progress_option
@click.argument("operands", nargs=-1, metavar="[bs=N] [count=N] [skip=N] if=FILE of=FILE", type=click.UNPROCESSED)
@click.pass_obj
def dd(
    gate: Gate,
    operands: tuple[str, ...],
    format: str | None,
    image_opts: bool,
    force_share: bool,
    output_format: str,
    progress: str,
) -> None:
    """Copy guest bytes to a raw file, as `qemu-img dd` does.

    bs is the size of a block (512 by default), count how many blocks of the input are taken, counted from its
    start, and skip how many of those are left out: bs=64k skip=16 count=17 copies one block. The file
    appears only when it is complete, with holes where the guest has zeros, and is a whole number of sectors.
    """
    from imgloop.output import copy_range, whole_file

    words = parse_operands(operands)
    if output_format != "raw":
        raise click.ClickException(f"Cannot write format '{output_format}': only raw")
    numbers = {name: number(name, words[name]) for name in RANGES if name in words}
    block = numbers.get("bs", SECTOR)
    with imgloop.open(words["if"], format, gate=gate, image_opts=image_opts) as image:
        warn(image.warnings)
        end = min(image.size, numbers["count"] * block) if "count" in numbers else image.size
        start = numbers.get("skip", 0) * block
        if start > end:
            click.echo(f"imgloop: {words['if']}: cannot skip to specified offset", err=True)
        start = min(start, end)
        length = end - start
        with progress_bar(progress, length, "copying") as advance, whole_file(words["of"], keep=image.files) as fd:
            copy_range(image, start, length, fd, progress=advance, pad=SECTOR)


def parse_operands(operands: tuple[str, ...]) -> dict[str, str]:
    """The operands by name; QEMU's words for those it does not know."""
    words: dict[str, str] = {}
    for operand in operands:
        name, equals, value = operand.partition("=")
        if not equals or name not in ("bs", "count", "skip", "if", "of"):
            raise click.ClickException(f"unrecognized operand {name}")
        words[name] = value
    if not (words.get("if") and words.get("of")):
        raise click.ClickException("Must specify both input and output files")
    return words


def number(name: str, text: str) -> int:
    """The value of bs, count or skip, within its range; QEMU's words where it is not."""
    low, high = RANGES[name]
    if not re.fullmatch(r"-?[0-9].*", text):
        raise click.ClickException(f"Invalid {name} specified: '{text}'.")
    try:
        value = parse_size(text)
    except OverflowError:
        value = high + 1
    except ValueError:
        if not text.startswith("-"):
            raise click.ClickException(f"Invalid {name} specified: '{text}'.") from None
        value = low - 1
    if not low <= value <= high:
        raise click.ClickException(f"Invalid {name} specified. Must be between {low} and {high}.")
    return value
