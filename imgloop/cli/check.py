"""`imgloop check`: is the image sound?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice

import click

from imgloop.cli import say
from imgloop.cli.options import file_argument, image_options, output_option, warn
from imgloop.formats.findings import RULES
from imgloop.gate import Gate
from imgloop.report import LIMIT, UNSUPPORTED, CheckReport
from imgloop.verify import check as check_image

LINES = 1 << 17  # of qemu-img's diagnostics, at most, unless --limit is more
BLOCK = 1 << 12  # lines written at a time


@click.command()
@image_options
@output_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on stdout.")
@click.option(
    "--findings",
    type=click.Choice(["human", "json"]),
    help="Print every finding, with its owners.",
)
@click.option("--limit", metavar="N", type=click.IntRange(0), default=LIMIT, help="Findings shown (1000).")
@click.option("--deep", is_flag=True, help="Decode every compressed cluster too.")
@click.option("--strict", is_flag=True, help="Let findings that qemu-img does not have count in the exit code.")
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
    findings: str | None,
    limit: int,
    deep: bool,
    strict: bool,
) -> int:
    """Check the structures of FILE against each other.

    The output and the exit codes are those of `qemu-img check`: 0 all is well, 1 the check could not be
    completed, 2 the image is corrupt, 3 it has leaked clusters, 63 its format has no checks. What qemu-img
    passes as clean is said on stderr; with --strict it is an exit code of 2 as well.
    """
    with check_image(file, format, gate=gate, image_opts=image_opts) as report:
        warn(tuple(warning for driver, _ in report.chain for warning in driver.warnings))
        if deep:
            _decode_all(report)
        code = _show(report, findings, limit, quiet) if findings else _say(report, output, quiet, limit)
        return report.strict_exit_code if strict and code in (0, 3) else code


def _decode_all(report: CheckReport) -> None:
    """With a progress bar, where somebody watches."""
    if not sys.stderr.isatty():
        report.decode_all()
        return
    with click.progressbar(length=1, label="Decoding", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        report.decode_all(progress)


def _show(report: CheckReport, form: str, limit: int, quiet: bool) -> int:
    """--findings: all in one place, on stdout."""
    if report.exit_code == 63:
        return _say(report, "human", quiet, limit)
    if not quiet:
        if form == "json":
            click.echo(json.dumps(report.findings_json(limit), indent=2))
        else:
            click.echo("\n".join(_listing(report, limit)))
    return report.exit_code


def _listing(report: CheckReport, limit: int) -> Iterator[str]:
    """Findings for people."""
    found = report.findings(limit)
    for finding in found:
        yield f"{finding.severity}: {finding.code}"
        yield f"    {finding.message.splitlines()[0]}"
        if finding.guest:
            shown = [f"{start:#x}+{length:#x}" for start, length in finding.guest[:4]]
            yield f"    guest: {', '.join(shown)}{' ...' if len(finding.guest) > 4 else ''}"
        for owner in finding.owners[:8]:
            yield f"    owner: {owner}"
        if len(finding.owners) > 8:
            yield f"    owner: and {len(finding.owners) - 8} more"
        yield f"    means: {finding.rule.meaning}"
        yield f"    remedy: {finding.rule.remedy}"
    number = sum(report.counts.values())
    if len(found) < number:
        yield f"{len(found)} of {number} findings are shown (--limit)."
    if report.counts:
        yield "Findings: " + ", ".join(f"{times} {code}" for code, times in report.counts.items())
    else:
        yield "No findings."


def _say(report: CheckReport, output: str, quiet: bool, limit: int) -> int:
    """What qemu-img says, and on stderr what it does not."""
    if report.refusal is not None:
        others = sum(report.counts.values()) - 1
        if others > 0:
            click.echo(f"imgloop: note: {others} findings in what can be read; see --findings human", err=True)
        raise report.refusal
    if report.exit_code == 63:
        say(UNSUPPORTED)
        return 63
    _diagnostics(report, max(LINES, limit))
    _own_findings(report, limit)
    if report.failure is not None:
        say(f"Check failed: {report.failure}")
        return 1
    if not quiet:
        click.echo(json.dumps(report.to_json(), indent=4) if output == "json" else "\n".join(_summary(report)))
    if report.totals()["check-errors"]:
        sys.stdout.flush()
        say("Check failed")
    return report.exit_code


def _own_findings(report: CheckReport, limit: int) -> None:
    """Findings that qemu-img does not have, a line each."""
    events = report.own_events()
    for event in islice(events, limit):
        click.echo(f"imgloop: {RULES[event.code].severity}: {event.code}: {event.text}", err=True)
    left = sum(report.own_counts.values()) - limit
    if left > 0:
        click.echo(f"imgloop: note: {left} more findings are not shown (--limit)", err=True)


def _diagnostics(report: CheckReport, most: int) -> None:
    """qemu-img's lines on stderr, many at a time."""
    events = report.events()
    left = most
    while left and (block := list(islice(events, min(BLOCK, left)))):
        sys.stderr.write("".join(text + "\n" for event in block if (text := event.text)))
        left -= len(block)
    if not left and next(events, None):
        warn((f"only the first {most} messages are shown (--limit); the totals count all",))
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
