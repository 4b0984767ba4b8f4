"""`imgloop compare`: whether two images hold the same for a guest."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

import imgloop
from imgloop.cli import say
from imgloop.cli.options import Output, print_json, warn
from imgloop.cli.progress import progress_bar, progress_option, work_progress
from imgloop.formats.errors import OpenError, UsageError, visible
from imgloop.gate import Gate
from imgloop.parallel import processors

if TYPE_CHECKING:
    from imgloop.cli.progress import Report
    from imgloop.image import Image

DIFFERENT, NOT_OPENED, NOT_MAPPED, NOT_READ = 1, 2, 3, 4  # exit codes


def two_files(ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """The callback of the files: exactly two, in QEMU's words."""
    if len(value) != 2:
        raise click.UsageError("Expecting two image file names", ctx)
    return value


@click.command()
@click.option("-f", "--a-format", metavar="FMT", help="The format of A; without it, probe.")
@click.option("-F", "--b-format", metavar="FMT", help="The format of B; without it, probe.")
@click.option("--image-opts", is_flag=True, help="A and B are lists of options: key=value,…")
@click.option("-U", "--force-share", is_flag=True, help="Read even while another process writes.")
@click.option("-s", "--strict", is_flag=True, help="Sizes and allocation have to be the same too.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on stdout.")
@click.option("--all", "everything", is_flag=True, help="List every range that differs, and why.")
@click.option("--output", type=Output(), default="human", help="Of --all: human (default) or json.")
@click.option("-p", "show_progress", is_flag=True, help="Show progress.")
@progress_option
@click.argument("files", metavar="A B", nargs=-1, type=click.UNPROCESSED, callback=two_files)
@click.pass_obj
def compare(
    gate: Gate,
    files: tuple[str, str],
    a_format: str | None,
    b_format: str | None,
    image_opts: bool,
    force_share: bool,
    strict: bool,
    quiet: bool,
    everything: bool,
    output: str,
    show_progress: bool,
    progress: str,
) -> int:
    """Compare what A and B hold for a guest: `qemu-img compare`, its messages and exit codes.

    0: identical; 1: different; 2: an image cannot be opened; 3: what it maps cannot be told; 4: it cannot be
    read. A shorter image is identical where the rest of the longer one is zeros, but for --strict.
    """
    from imgloop.compare import CompareReadError, StatusError

    if output == "json" and not everything:
        raise UsageError("--output json goes with --all")
    with ExitStack() as opened:
        try:
            pair = []
            for file, format in zip(files, (a_format, b_format), strict=True):
                image = opened.enter_context(imgloop.open(file, format, gate=gate, image_opts=image_opts))
                warn(image.warnings)
                pair.append(image)
        except (OpenError, UsageError) as error:
            say(str(error))
            return NOT_OPENED
        mode = work_progress(progress, show_progress and not quiet)
        try:
            with progress_bar(mode, max(image.size for image in pair), "comparing") as advance:
                if everything:
                    return _print_all(pair[0], pair[1], strict=strict, quiet=quiet, output=output, advance=advance)
                return _print_verdict(pair[0], pair[1], strict=strict, quiet=quiet, advance=advance)
        except StatusError as error:
            say(str(error))
            return NOT_MAPPED
        except CompareReadError as error:
            say(str(error))
            return NOT_READ


def _print_verdict(a: Image, b: Image, *, strict: bool, quiet: bool, advance: Report) -> int:
    from imgloop.compare import compare

    verdict = compare(a, b, strict=strict, progress=advance, threads=processors())
    if not quiet:
        click.echo("\n".join(verdict.lines))
    return 0 if verdict.identical else DIFFERENT


def _print_all(a: Image, b: Image, *, strict: bool, quiet: bool, output: str, advance: Report) -> int:
    """Every difference; those of allocation and length make images different only for --strict."""
    from imgloop.compare import differences

    totals = {"data": 0, "allocation": 0, "length": 0}
    ranges = []
    if output == "human" and not quiet:
        click.echo(f"{'Offset':<16}{'Length':<16}Differs in")
    for found in differences(a, b, progress=advance, threads=processors()):
        totals[found.cause] += found.length
        if output == "json":
            ranges.append({"start": found.start, "length": found.length, "cause": found.cause})
        elif not quiet:
            click.echo(f"{found.start:<#16x}{found.length:<#16x}{found.cause}")
    identical = not any(totals.values()) if strict else not totals["data"]
    if output == "json" and not quiet:
        sizes = [{"filename": image.name, "virtual-size": image.size} for image in (a, b)]
        print_json({"identical": identical, "images": sizes, "ranges": ranges, "totals": totals})
    elif not quiet:
        parts = ", ".join(f"{name} {size} bytes" for name, size in totals.items())
        click.echo(visible(f"{a.name} and {b.name}: {parts}"))
        click.echo("Images are identical." if identical else "Images differ.")
    return 0 if identical else DIFFERENT
