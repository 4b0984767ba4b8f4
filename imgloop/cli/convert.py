"""`imgloop convert`: an image, or several in a row, as a raw file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

import imgloop
from imgloop.cli.options import image_options, warn
from imgloop.cli.progress import progress_bar, progress_option, work_progress
from imgloop.formats import KNOWN
from imgloop.gate import Gate
from imgloop.parallel import processors
from imgloop.sizes import parse_size

if TYPE_CHECKING:
    from imgloop.cli.progress import Report
    from imgloop.convert import Lost
    from imgloop.image import Image

SALVAGED = 3  # exit code: the target is complete, but for ranges that could not be read
MAX_SPARSE = 16 << 20
MAX_THREADS = 16
BAD_SPARSE = (
    "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
    f"{MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
)


@click.command()
@image_options
@click.option("-O", "--output-format", metavar="FMT", default="raw", help="The target's format: raw.")
@click.option("-l", "--snapshot", metavar="SNAPSHOT", help="Convert an internal snapshot, by id or name.")
@click.option("-S", "--sparse-size", metavar="N", help="Zeros that make a hole (4k); 0 writes all zeros out.")
@click.option("-m", "--threads", metavar="N", help="Blocks in work at a time, 1 to 16.")
@click.option("-n", "no_create", is_flag=True, help="Write into a target that exists.")
@click.option("--target-is-zero", is_flag=True, help="The target reads as zeros already (with -n).")
@click.option("--salvage", is_flag=True, help="Go on past what cannot be read: zeros, a list, exit code 3.")
@click.option("--no-offload", is_flag=True, help="Copy even where the file system could share.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.option("-p", "show_progress", is_flag=True, help="Show progress.")
@progress_option
@click.argument("files", metavar="SRC... DST", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def convert(
    gate: Gate,
    files: tuple[str, ...],
    format: str | None,
    image_opts: bool,
    force_share: bool,
    output_format: str,
    snapshot: str | None,
    sparse_size: str | None,
    threads: str | None,
    no_create: bool,
    target_is_zero: bool,
    salvage: bool,
    no_offload: bool,
    quiet: bool,
    show_progress: bool,
    progress: str,
) -> int:
    """Write what the guest reads of each SRC, one behind the other, to DST, as `qemu-img convert -O raw` does.

    DST appears only when it is complete, with holes for zeros. Where its file system can share data with that
    of SRC, nothing is copied.
    """
    from imgloop.convert import GRAIN, Target
    from imgloop.convert import convert as write

    sparse = parse_sparse(sparse_size)
    workers = parse_threads(threads)
    check_words(files, snapshot, output_format, no_create=no_create, target_is_zero=target_is_zero)
    *sources, destination = files
    with ExitStack() as opened:
        images = []
        for source in sources:
            image = imgloop.open(source, format, snapshot=snapshot, gate=gate, image_opts=image_opts)
            images.append(opened.enter_context(image))
            warn(image.warnings)
        refuse_own_files(images, destination)
        total = sum(image.size for image in images)
        advance = opened.enter_context(
            progress_bar(work_progress(progress, show_progress and not quiet), total, "converting")
        )
        fd = opened.enter_context(open_target(destination, total, no_create=no_create))
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if not regular and not stat.S_ISBLK(os.fstat(fd).st_mode):
            return write_in_order(images, fd, advance)
        target = Target(
            fd,
            clean=target_is_zero if no_create else regular,
            sparse=GRAIN if sparse is None else sparse,
            offload=not no_offload and sparse is None,
            salvage=salvage,
            threads=workers,
        )
        if regular and not no_create:
            os.ftruncate(fd, total)
        lost = write(images, target, progress=advance)
    return report(lost)


def check_words(
    files: tuple[str, ...], snapshot: str | None, output_format: str, *, no_create: bool, target_is_zero: bool
) -> None:
    """QEMU's words for options that do not go together."""
    if target_is_zero and not no_create:
        raise click.ClickException("--target-is-zero requires use of -n flag")
    if len(files) < 2:
        raise click.ClickException("Must specify image file name")
    if snapshot is not None and len(files) > 2:
        raise click.ClickException("No support for concatenating multiple snapshot")
    if output_format not in KNOWN:
        raise click.ClickException(f"Unknown file format '{output_format}'")
    if output_format != "raw":
        raise click.ClickException(f"Cannot write format '{output_format}': only raw")


def parse_sparse(text: str | None) -> int | None:
    """The value of -S (bytes); QEMU's words where it is not one."""
    if text is None:
        return None
    try:
        size = parse_size(text)
    except OverflowError:
        size = MAX_SPARSE + 1
    except ValueError:
        raise click.ClickException("Invalid buffer size for sparse output specified.") from None
    if size % 512 or size > MAX_SPARSE:
        raise click.ClickException(BAD_SPARSE)
    return size


def parse_threads(text: str | None) -> int:
    """The value of -m; QEMU's words where it is not one."""
    if text is None:
        return min(processors(), MAX_THREADS)
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MAX_THREADS:
        raise click.ClickException(
            f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {MAX_THREADS}"
        )
    return int(text)


def refuse_own_files(images: list[Image], destination: str) -> None:
    """An image is not converted onto itself, nor onto a file that it is made of."""
    try:
        found = Path(destination).stat()
    except OSError:
        return
    for image in images:
        for file in image.files:
            if file.identity == (found.st_dev, found.st_ino):
                raise imgloop.UsageError(f"'{destination}' is a file of the source '{image.name}'")


def open_target(path: str, size: int, *, no_create: bool) -> AbstractContextManager[int]:
    """The target: new, or with -n one that exists and is large enough."""
    from imgloop.output import existing_file, whole_file

    if not no_create:
        return whole_file(path)
    return large_enough(existing_file(path), size)


@contextmanager
def large_enough(target: AbstractContextManager[int], size: int) -> Iterator[int]:
    """The target, whose length counts in whole sectors, if `size` bytes fit into it."""
    with target as fd:
        if -(-os.lseek(fd, 0, os.SEEK_END) // 512) * 512 < size:
            raise imgloop.ImageError("output file is smaller than input file")
        yield fd


def write_in_order(images: list[Image], fd: int, advance: Report) -> int:
    """All bytes one after the other, into a pipe or a character device."""
    from imgloop.output import copy_range

    for image in images:
        copy_range(image, 0, image.size, fd, progress=advance)
    return 0


def report(lost: list[Lost]) -> int:
    """What could not be read, a line each; the exit code."""
    for one in lost:
        warn((f"lost {one.length} bytes at offset {one.start}, zeros instead: {one.reason}",))
    return SALVAGED if lost else 0
