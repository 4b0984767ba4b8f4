"""`imgloop check`: is the image sound?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice

import click

import imgloop.check
from imgloop.check import CheckReport
from imgloop.cli.options import file_argument, image_options, output_option, warn
from imgloop.gate import Gate

LINES = 1 << 20  # of qemu-img's diagnostics, at most
BLOCK = 1 << 12  # lines written at a time


@click.command()
@image_options
@output_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on stdout.")
@file_argument
@click.pass_obj
def check(
    gate: Gate,
    file: str,
    format: str | None,
    image_opts: bool,
    force_share: bool,
    output: str,
    quiet: bool,
) -> int:
    """Check the structures of FILE against each other.

    The output and the exit codes are those of `qemu-img check`: 0 all is well, 1 the check could not be
    completed, 2 the image is corrupt, 3 it has leaked clusters, 63 its format has no checks.
    """
    with imgloop.check.check(file, format, gate=gate, image_opts=image_opts) as report:
        warn(tuple(warning for layer in report.layers for warning in layer.driver.warnings))
        return _say(report, output, quiet)


def _say(report: CheckReport, output: str, quiet: bool) -> int:
    from imgloop.cli import say

    if report.refusal is not None:
        raise report.refusal
    if report.exit_code == 63:
        say(imgloop.check.UNSUPPORTED)
        return 63
    _diagnostics(report)
    if report.failure is not None:
        say(f"Check failed: {report.failure}")
        return 1
    if not quiet:
        click.echo(json.dumps(report.to_json(), indent=4) if output == "json" else "\n".join(_summary(report)))
    if report.totals()["check-errors"]:
        sys.stdout.flush()
        say("Check failed")
    return report.exit_code


def _diagnostics(report: CheckReport) -> None:
    """qemu-img's lines on stderr, many at a time."""
    events = report.events()
    left = LINES
    while left and (block := list(islice(events, min(BLOCK, left)))):
        sys.stderr.write("".join(text + "\n" for event in block if (text := event.text)))
        left -= len(block)
    if not left and next(events, None):
        warn((f"only the first {LINES} messages are shown; the totals count all",))
    sys.stderr.flush()


def _summary(report: CheckReport) -> Iterator[str]:
    """What qemu-img prints for people."""
    totals = report.totals()
    corruptions, leaks, errors = (totals[key] for key in ("corruptions", "leaks", "check-errors"))
    if not corruptions and not leaks and not errors:
        yield "No errors were found on the image."
    if corruptions:
        yield f"\n{corruptions} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if leaks:
        yield f"\n{leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if errors:
        yield f"\n{errors} internal errors have occurred during the check."
    allocated, clusters = totals["allocated-clusters"], totals["total-clusters"]
    if allocated and clusters:
        fragmented, compressed = totals["fragmented-clusters"], totals["compressed-clusters"]
        yield (
            f"{allocated}/{clusters} = {allocated * 100 / clusters:.2f}% allocated, "
            f"{fragmented * 100 / allocated:.2f}% fragmented, "
            f"{compressed * 100 / allocated:.2f}% compressed clusters"
        )
    if totals["image-end-offset"]:
        yield f"Image end offset: {totals['image-end-offset']}"
