"""Log lines as text (time, level, message) or as JSON (one object per line)."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

import click

from lightbus.cli import output, tables

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


class JSONLines(logging.Formatter):
    """`{"time": ..., "level": ..., "logger": ..., "message": ...}`, and `exception` if there is one."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self.label:
            line["worker"] = self.label.strip("[]")
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = json.dumps(line, ensure_ascii=False, default=str)
        # json.dumps does not escape these control characters: delete (U+007F), and U+0080 to U+009F.
        return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1]
