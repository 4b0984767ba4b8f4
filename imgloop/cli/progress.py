"""Progress of long work on stderr: a bar on a terminal, JSON lines on request, otherwise nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from imgloop.sizes import size_text

progress_option = click.option(
    "--progress", type=click.Choice(["auto", "json", "none"]), default="auto", help="auto: a bar on a terminal."
)

Report = Callable[[int], None]  # is told how many bytes more are done


def work_progress(mode: str, wanted: bool) -> str:
    """The mode for verbs that show a bar only on request (-p), as qemu-img does."""
    return mode if mode != "auto" or wanted else "none"


@contextmanager
def progress_bar(mode: str, total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A function that is told how many bytes more of `total` are done."""
    if mode == "json":
        report = _JsonLines(total)
        yield report
        report.say()
    elif mode == "auto" and sys.stderr.isatty():
        start = time.monotonic()
        done = 0

        def rate(_: object) -> str:
            return f"{size_text(int(done / max(time.monotonic() - start, 1e-3)))}/s"

        with click.progressbar(
            length=total, label=label, file=sys.stderr, show_eta=True, item_show_func=rate
        ) as bar:

            def advance(more: int) -> None:
                nonlocal done
                done += more
                bar.update(more, done)

            yield advance
    else:
        yield lambda _: None


class _JsonLines:
    """At most five lines a second: {"done": bytes, "total": bytes}."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.said = total, 0, 0.0

    def __call__(self, more: int) -> None:
        self.done += more
        now = time.monotonic()
        if now - self.said >= 0.2:
            self.said = now
            self.say()

    def say(self) -> None:
        click.echo(json.dumps({"done": self.done, "total": self.total}), err=True)
