"""What commands write to stdout, where nobody may read it, and where there may be no room for it."""

from __future__ import annotations

import contextlib
import os
import sys

import click


def write(text: str, *, nl: bool = True) -> bool:
    """Write it to stdout; False where nobody reads that any more, as after `| head -1`.

    No error of stdout's must pass for a lost connection.

    Raises:
        click.ClickException: it cannot be written, as on a full disk.
    """
    try:
        return _written(text, nl=nl)
    except OSError as error:
        raise click.ClickException(f"the output cannot be written: {error.strerror}. It is not whole.") from error


def report(text: str) -> None:
    """Say what has been done. That stays done where stdout cannot take it: then stderr says it."""
    try:
        _written(text)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may be the same file
            _written(f"Not written to stdout ({error.strerror}): {text}", err=True)


def _written(text: str, *, nl: bool = True, err: bool = False) -> bool:
    try:
        click.echo(text, nl=nl, err=err)
    except OSError as error:
        # What is in its buffer, Python writes at its end: that would fail too, and decide the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())
        if not isinstance(error, BrokenPipeError):
            raise
        return False
    return True
