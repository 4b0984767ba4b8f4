"""`imgloop info`: what an image is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from imgloop.cli.options import file_argument, image_options, output_option, print_json, warn
from imgloop.formats.errors import visible
from imgloop.gate import Gate
from imgloop.image import open_layers
from imgloop.info import layer_info
from imgloop.sizes import size_text


@click.command()
@image_options
@output_option
@click.option("--backing-chain", "-b", is_flag=True, help="Show the backing files as well.")
@file_argument
@click.pass_obj
def info(
    gate: Gate,
    file: str,
    format: str | None,
    image_opts: bool,
    force_share: bool,
    output: str,
    backing_chain: bool,
) -> None:
    """Show what FILE is: its format, its sizes, what it refers to.

    Opens neither its backing file (but for --backing-chain) nor its data file. The output and the exit codes
    are those of `qemu-img info`.
    """
    found = []
    for layer in open_layers(file, format, purpose="info", gate=gate, image_opts=image_opts):
        found.append(layer_info(layer.driver, layer.node))
        warn(layer.driver.warnings)
        layer.driver.close()
        if not backing_chain:
            break
    if output == "json":
        print_json(found if backing_chain else found[0])
    else:
        click.echo("\n\n".join("\n".join(visible(line) for line in lines(one)) for one in found))


def lines(info: dict[str, Any]) -> Iterator[str]:
    """The human form of one layer's info."""
    yield f"image: {info['filename']}"
    yield f"file format: {info['format']}"
    yield f"virtual size: {_bytes(info['virtual-size'])}"
    yield f"disk size: {size_text(info['actual-size'])}"
    if info.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in info:
        yield f"cluster_size: {info['cluster-size']}"
    if info["dirty-flag"]:
        yield "cleanly shut down: no"
    yield from _backing(info)
    if "snapshots" in info:
        yield "Snapshot list:"
        yield from snapshot_table(info["snapshots"])
    if info.get("format-specific", {}).get("data"):
        yield "Format specific information:"
        yield from _tree(info["format-specific"]["data"], 1)
    for child in info["children"]:
        about = child["info"]
        yield f"Child node '/{child['name']}':"
        yield f"    filename: {about['filename']}"
        yield f"    protocol type: {about['format']}"
        yield f"    file length: {_bytes(about['virtual-size'])}"
        yield f"    disk size: {size_text(about['actual-size'])}"


def _bytes(size: int) -> str:
    return f"{size_text(size)} ({size} bytes)"


def _backing(info: dict[str, Any]) -> Iterator[str]:
    name = info.get("backing-filename")
    if name is None:
        return
    full = info["full-backing-filename"]
    yield f"backing file: {name}" + (f" (actual path: {full})" if full != name else "")
    if "backing-filename-format" in info:
        yield f"backing file format: {info['backing-filename-format']}"


def _tree(value: dict[str, Any] | list[Any], depth: int) -> Iterator[str]:
    """Nested values, indented; an item of a list is named by its number."""
    named = value.items() if isinstance(value, dict) else ((f"[{n}]", item) for n, item in enumerate(value))
    for key, item in named:
        start = "    " * depth + key.replace("-", " ") + ":"
        if isinstance(item, dict | list):
            yield start
            yield from _tree(item, depth + 1)
        else:
            yield f"{start} {str(item).lower() if isinstance(item, bool) else item}"


def snapshot_table(snapshots: list[dict[str, Any]]) -> Iterator[str]:
    """The table of internal snapshots, with its heading; times are local."""
    from datetime import datetime

    columns = "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}"
    yield columns.format("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")
    for one in snapshots:
        minutes, seconds = divmod(one["vm-clock-sec"], 60)
        hours, minutes = divmod(minutes, 60)
        yield columns.format(
            one["id"],
            one["name"],
            size_text(one["vm-state-size"]),
            datetime.fromtimestamp(one["date-sec"]).strftime("%Y-%m-%d %H:%M:%S"),
            f"{hours:04}:{minutes:02}:{seconds:02}.{one['vm-clock-nsec'] // 1_000_000:03}",
            one.get("icount", "--"),
        )
