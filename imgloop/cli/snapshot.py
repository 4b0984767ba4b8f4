"""`imgloop snapshot`: the internal snapshots of an image."""

from __future__ import annotations

import click

import imgloop
from imgloop.cli.info import snapshot_table
from imgloop.cli.options import file_argument, image_options, output_option, print_json, warn
from imgloop.formats.errors import visible
from imgloop.gate import Gate


@click.command()
@image_options
@output_option
@click.option("-l", "--list", "listing", is_flag=True, help="List the snapshots (the default).")
@click.option("-q", "--quiet", is_flag=True, help="Accepted as qemu-img has it; the list is printed.")
@file_argument
@click.pass_obj
def snapshot(
    gate: Gate,
    file: str,
    format: str | None,
    image_opts: bool,
    force_share: bool,
    output: str,
    listing: bool,
    quiet: bool,
) -> None:
    """List the internal snapshots of FILE, as `qemu-img snapshot -l` does; nothing where there are none."""
    with imgloop.open(file, format, gate=gate, image_opts=image_opts) as image:
        warn(image.warnings)
        found = image.info().get("snapshots", [])
    if output == "json":
        print_json(found)
    elif found:
        click.echo("\n".join(["Snapshot list:", *(visible(row) for row in snapshot_table(found))]))
