"""What `retry` and `purge` report at their end, including after an interruption or a lost connection."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from lightbus.cli import output, tables
from lightbus.cli.dead.reading import as_json as to_json

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.dead_letters.actions import Outcome


@contextmanager
def reported(app: Lightbus, outcome: Outcome, done: str, *, as_json: bool) -> Generator[None]:
    """Report the outcome at the end of the block, whatever ends it. An interruption exits with 130.

    Args:
        done: "retried" or "purged".
    """
    from lightbus import errors

    try:
        yield
    except KeyboardInterrupt:
        _report(app, outcome, done, as_json=as_json, interrupted=True)
        sys.exit(130)
    except errors.BrokerError as error:
        if not outcome.matched:
            raise
        outcome.problem = str(error)
        _report(app, outcome, done, as_json=as_json)
        sys.exit(1)
    _report(app, outcome, done, as_json=as_json)


def without_handler(handler: str, count: int, are: str) -> str:
    """A warning about retried dead letters. `are` is "are", or "would be" for a dry run."""
    return (
        f"{count:,} of them {are} for the handler {tables.printable(handler)}, which does not exist in this code: if "
        "no worker has it, they become dead letters again."
    )


def _report(app: Lightbus, outcome: Outcome, done: str, *, as_json: bool, interrupted: bool = False) -> None:
    if as_json:
        output.report(
            to_json(
                {
                    "matched": outcome.matched,
                    done: outcome.done,
                    "left": outcome.left,
                    "left_unproven": outcome.unproven,
                    "left_without_queue": outcome.stranded,
                    "problem": outcome.problem or None,
                    "interrupted": interrupted,
                }
            )
        )
        return
    if interrupted:
        click.echo(f"\nInterrupted: {outcome.done:,} {done}. All others are in {app.name}.dead as before.", err=True)
    elif not (outcome.matched or outcome.vanished):
        output.report("No matching dead letters.")
    else:
        output.report(f"{outcome.done:,} {done}.")
    for line in _notes(app, outcome):
        click.echo(line, err=True)


def _notes(app: Lightbus, outcome: Outcome) -> Generator[str]:
    for queue, count in outcome.stranded.items():
        yield (
            f"{count:,} skipped: their queue {tables.printable(queue)} does not exist. Start a worker whose handlers "
            "use it (the worker declares the queue), then retry again."
        )
    for handler, count in outcome.gone.items():
        yield without_handler(handler, count, "are")
    if outcome.unproven:
        yield (
            f"{outcome.unproven:,} skipped: the broker dead-lettered them (they crashed their workers, or a copy was "
            "refused), they were moved by hand, or a queue dead-lettered them to the bus, so their source is not "
            "verified. If you trust everyone who can publish on this broker, add --trust-origin."
        )
    if outcome.vanished:
        are = "1 of those shown is" if outcome.vanished == 1 else f"{outcome.vanished:,} of those shown are"
        yield f"{are} no longer in the queue: retried, purged or being read by another command."
    if outcome.problem:
        yield f"Stopped: {outcome.problem} What was not confirmed is in {app.name}.dead as before."
