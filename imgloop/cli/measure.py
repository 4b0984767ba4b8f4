"""`imgloop measure`: how much space an image would take in another format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import click

import imgloop
from imgloop.cli.options import Size, image_options, output_option, print_json, warn
from imgloop.formats import KNOWN
from imgloop.gate import Gate
from imgloop.measure import Layout, Measured, measure_qcow2, measure_raw
from imgloop.sizes import parse_size

OPTIONS = {
    "qcow2": frozenset(
        [
            "backing_file",
            "backing_fmt",
            "cluster_size",
            "compat",
            "compression_type",
            "data_file",
            "data_file_raw",
            "extended_l2",
            "lazy_refcounts",
            "preallocation",
            "refcount_bits",
            "size",
        ]
    ),
    "raw": frozenset(("extent_size_hint", "nocow", "preallocation", "size")),
}
VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
PREALLOCATION = ("off", "metadata", "falloc", "full")


@click.command()
@image_options
@output_option
@click.option("-O", "--output-format", metavar="FMT", default="raw", help="The target's format: raw or qcow2.")
@click.option("-o", "--options", metavar="OPTIONS", multiple=True, help="Options of the target: key=value,…")
@click.option("-l", "--snapshot", metavar="SNAPSHOT", help="Measure an internal snapshot, by id or name.")
@click.option("--size", type=Size("image size"), help="Measure an empty disk of this size.")
@click.argument("files", metavar="[FILE]", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def measure(
    gate: Gate,
    files: tuple[str, ...],
    format: str | None,
    image_opts: bool,
    force_share: bool,
    output: str,
    output_format: str,
    options: tuple[str, ...],
    snapshot: str | None,
    size: int | None,
) -> None:
    """Tell how many bytes FILE, or an empty disk, would take in another format, as `qemu-img measure` does."""
    check_words(files, size, selecting=image_opts or format is not None or snapshot is not None)
    given = parse_target_options(options, output_format)
    layout = parse_layout(given) if output_format == "qcow2" else None
    if size is not None:
        show(measure_qcow2(size, layout) if layout else measure_raw(size), output)
        return
    with imgloop.open(files[0], format, snapshot=snapshot, gate=gate, image_opts=image_opts) as image:
        warn(image.warnings)
        show(measure_qcow2(image.size, layout, image) if layout else measure_raw(image.size), output)


def check_words(files: tuple[str, ...], size: int | None, *, selecting: bool) -> None:
    """QEMU's words for what does not go together."""
    if len(files) > 1:
        raise click.ClickException("At most one filename argument is allowed.")
    if not files and selecting:
        raise click.ClickException("--image-opts, -f, and -l require a filename argument.")
    if not files and size is None:
        raise click.ClickException("Either --size N or one filename must be specified.")
    if files and size is not None:
        raise click.ClickException("--size N cannot be used together with a filename.")


def parse_target_options(options: tuple[str, ...], output_format: str) -> dict[str, str]:
    """The target's options by name, a doubled comma standing for one; QEMU's words for formats and names."""
    if output_format not in OPTIONS:
        if output_format in KNOWN:
            raise click.ClickException(f"Block driver '{output_format}' does not support size measurement")
        raise click.ClickException(f"Unknown file format '{output_format}'")
    found = {}
    for word in (word for text in options for word in text.replace(",,", "\0").split(",")):
        name, _, value = word.replace("\0", ",").partition("=")
        if name.startswith("encrypt.") or name == "encryption":
            raise click.ClickException("Encrypted targets are not measured")
        if name not in OPTIONS[output_format]:
            raise click.ClickException(f"Invalid parameter '{name}'")
        found[name] = value or "on"
    return found


def parse_layout(given: Mapping[str, str]) -> Layout:
    """What the options of a qcow2 target say; QEMU's words, in its order, for what cannot be."""
    extended = flag(given, "extended_l2")
    cluster_size = number(given, "cluster_size", 1 << 16)
    if cluster_size & (cluster_size - 1) or not 512 <= cluster_size <= 2 << 20:
        raise click.ClickException("Cluster size must be a power of two between 512 and 2048k")
    if extended and cluster_size < 1 << 14:
        raise click.ClickException(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
        )
    preallocation = given.get("preallocation", "off")
    if preallocation not in PREALLOCATION:
        raise click.ClickException(f"invalid parameter value: {preallocation}")
    compat = given.get("compat", "1.1")
    if compat not in VERSIONS:
        raise click.ClickException(f"Invalid compatibility level: '{compat}'")
    bits = number(given, "refcount_bits", 16)
    if bits > 64 or not bits or bits & (bits - 1):
        raise click.ClickException("Refcount width must be a power of two and may not exceed 64 bits")
    if VERSIONS[compat] < 3 and bits != 16:
        raise click.ClickException(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above "
            "(use compat=1.1 or greater)"
        )
    return Layout(
        cluster_size=cluster_size,
        version=VERSIONS[compat],
        refcount_bits=bits,
        extended_l2=extended,
        backing="backing_file" in given,
        preallocation=cast(Any, preallocation),
    )


def flag(given: Mapping[str, str], name: str) -> bool:
    """An option that is on or off."""
    value = given.get(name, "off")
    if value not in ("on", "off", "yes", "no", "true", "false", "y", "n"):
        raise click.ClickException(f"Parameter '{name}' expects 'on' or 'off'")
    return value in ("on", "yes", "true", "y")


def number(given: Mapping[str, str], name: str, default: int) -> int:
    """An option that is a size or a number."""
    try:
        return parse_size(given[name]) if name in given else default
    except (ValueError, OverflowError):
        what = "a number" if name == "refcount_bits" else "a non-negative number below 2^64"
        raise click.ClickException(f"Parameter '{name}' expects {what}") from None


def show(measured: Measured, output: str) -> None:
    """Print it, as people or programs read it."""
    if output == "json":
        bitmaps = {} if measured.bitmaps is None else {"bitmaps": measured.bitmaps}
        print_json(bitmaps | {"required": measured.required, "fully-allocated": measured.fully_allocated})
        return
    click.echo(f"required size: {measured.required}")
    click.echo(f"fully allocated size: {measured.fully_allocated}")
    if measured.bitmaps is not None:
        click.echo(f"bitmaps size: {measured.bitmaps}")
