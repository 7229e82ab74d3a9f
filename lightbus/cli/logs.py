"""Log lines as text (time, level, message) or as JSON (one object per line)."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

import click

from lightbus.cli import output, tables
from lightbus.logs import ATTRIBUTE, Fields, JSONLines, log_outcome

if TYPE_CHECKING:
    from collections.abc import Generator

    from lightbus import Lightbus

LEVELS = ("debug", "info", "warning", "error")

INDENT = "    "

_COLORS = {"DEBUG": "bright_black", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
_OWN = "lightbus"


def configure(level: str, *, as_json: bool = False, label: str = "") -> None:
    """Send all log records to stderr. The app's own loggers are shown as well, with their names.

    Args:
        label: the number of this worker process, if there are several.
    """
    handler = Handler(sys.stderr)
    handler.setFormatter(JSONLines(label) if as_json else Lines(label, use_color(sys.stderr)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("amqp", "kombu", "asyncio", "watchfiles"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    if as_json:  # what Python would write to stderr as lines of text
        logging.captureWarnings(True)
        threading.excepthook = _log_thread_failure


def _log_thread_failure(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_type is SystemExit:
        return
    name = "unknown" if failed.thread is None else failed.thread.name
    exc_info = None if failed.exc_value is None else (failed.exc_type, failed.exc_value, failed.exc_traceback)
    logging.getLogger(_OWN).error("Thread %s failed.", name, exc_info=exc_info)


def show_error(text: str) -> None:
    """Show why a command failed: as a line on stderr, or as a record where logs are JSON."""
    if _as_json():
        logging.getLogger(_OWN).error("%s", text)
    else:
        click.echo(f"Error: {text}", err=True)


def show_traceback(text: str) -> None:
    """The same for a traceback."""
    if _as_json():
        text = text.rstrip()
        logging.getLogger(_OWN).error("%s", text.splitlines()[-1], extra={ATTRIBUTE: Fields(exception=text)})
    else:
        click.echo(text, nl=False, err=True)


def _as_json() -> bool:
    return any(
        isinstance(one, Handler) and isinstance(one.formatter, JSONLines) for one in logging.getLogger().handlers
    )


def first_line(text: str, *, own_logging: bool, **fields: str) -> None:
    """Log it whatever `--log-level` is: operators look there for the broker.

    Args:
        own_logging: the app has configured logging, so its level applies.
        fields: for JSON.
    """
    logger = logging.getLogger(_OWN)
    if own_logging and not logger.isEnabledFor(logging.INFO):
        return
    logger.handle(logger.makeRecord(_OWN, logging.INFO, __file__, 0, text, (), None, extra={ATTRIBUTE: Fields(fields)}))


@contextlib.contextmanager
def outcomes_of(app: Lightbus) -> Generator[None]:
    """Log each outcome, if the level is DEBUG: of the worker and the publisher that are made within this block."""
    debug = logging.getLogger(_OWN).isEnabledFor(logging.DEBUG)
    with app.observed_by(log_outcome) if debug else contextlib.nullcontext():
        yield


def use_color(stream: TextIO) -> bool:
    """Whether to use colors: on a terminal, unless NO_COLOR or FORCE_COLOR is set."""
    setting = color_setting()
    return stream.isatty() and os.environ.get("TERM") != "dumb" if setting is None else setting


def color_setting() -> bool | None:
    """False with NO_COLOR (https://no-color.org), True with FORCE_COLOR (as for `| less -R`), else None."""
    if os.environ.get("NO_COLOR"):
        return False
    return True if os.environ.get("FORCE_COLOR") else None


class Handler(logging.StreamHandler[TextIO]):
    """Writes to stderr, and reports the number of records that stderr has dropped."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = self.stream
        if isinstance(stream, output.Stderr):
            if stream.lost and stream.has_room:
                lost, stream.lost = stream.lost, 0
                self._write(_dropped_record(lost))
            self._write(record)
        else:
            super().emit(record)

    def _write(self, record: logging.LogRecord) -> None:
        try:
            self.stream.write(self.format(record) + self.terminator)  # without a flush, which would wait
        except Exception:  # noqa: BLE001 - like logging.StreamHandler
            self.handleError(record)


def _dropped_record(lost: int) -> logging.LogRecord:
    message = "%d log lines to stderr were lost: the reader stopped or is too slow."
    return logging.LogRecord(_OWN, logging.WARNING, __file__, 0, message, (lost,), None)


class Lines(logging.Formatter):
    """`2026-05-04 10:20:30.123 WARNING  message`. Quoted text of other publishers cannot control the terminal, or look
    like another record: all lines of a record except the first are indented.
    """

    def __init__(self, label: str, color: bool) -> None:
        super().__init__()
        self.label = f"{label} " if label else ""
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S")
        level = f"{record.levelname:<8}"
        if self.color and record.levelname in _COLORS:
            level = click.style(level, fg=_COLORS[record.levelname])
        name = "" if record.name == _OWN else f"{record.name}: "
        lines = [f"{self.label}{name}{record.getMessage()}"]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        if record.stack_info:
            lines.append(self.formatStack(record.stack_info))
        text = tables.printable("\n".join(lines), kept="\n\t").rstrip("\n").replace("\n", f"\n{INDENT}")
        return f"{time}.{int(record.msecs):03d} {level} {text}"
