"""How `lightbus tail` shows an event: as text for people, or as JSON."""

from __future__ import annotations

import base64
import json
import re
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import click

from lightbus.cli import tables

if TYPE_CHECKING:
    from lightbus.message import Message
    from lightbus.tail import Taken

LONGEST_TEXT = 2000
"""Maximum number of characters of a payload that are shown without --full."""
LONGEST_BODY = 64 * 1024
"""Maximum size of a body that is formatted as JSON without --full. A larger one is cut first."""

_TOKENS = re.compile(
    r'(?P<string>"(?:\\.|[^"\\])*")(?P<colon>\s*:)?|(?P<number>-?\d[\d.eE+-]*)|(?P<word>true|false|null)'
)


class Format(Protocol):
    """How an event is shown."""

    def lines(self, message: Message, taken: Taken) -> list[str]: ...


class JSONLines:
    """One JSON object per line, in ASCII, so that a payload contains no line breaks or terminal control characters."""

    def lines(self, message: Message, taken: Taken) -> list[str]:
        head = {
            "received": datetime.fromtimestamp(taken.received, UTC).isoformat(timespec="milliseconds"),
            "id": message.id,
            "event": message.event,
            "source": message.source,
            "time": message.time.isoformat(),
            "version": message.version,
            "correlation_id": message.correlation_id,
            "causation_id": message.causation_id,
            "headers": message.headers,
        }
        payload = tables.json_in_ascii(message.body)
        if payload is None:
            head["body_base64"] = base64.b64encode(message.body).decode()
            return [json.dumps(head, default=str)]
        return [f'{json.dumps(head, default=str)[:-1]}, "payload": {payload}}}']


class Text:
    """For people: time, name, source and id of the event, then its payload."""

    def __init__(self, *, full: bool, color: bool) -> None:
        self.full = full
        self.color = color

    def lines(self, message: Message, taken: Taken) -> list[str]:
        moment = datetime.fromtimestamp(taken.received)
        head = [
            self._in(f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}", "bright_black"),
            self._in(tables.printable(message.event) or "(no name)", "cyan", bold=True),
            f"from {self._in(tables.printable(message.source) or '?', 'green')}",
            *([f"version {message.version}"] if message.version > 1 else []),
            self._in(tables.printable(message.id, 40), "bright_black"),
        ]
        lines = ["  ".join(head)]
        if message.causation_id is not None:
            lines.append(self._in(f"  caused by {tables.printable(message.causation_id, 40)}", "bright_black"))
        for key, value in sorted(message.headers.items()):
            lines.append(f"  {tables.printable(key, 60)}: {tables.printable(str(value), 200)}")
        return [*lines, *self._payload(message.body)]

    def _payload(self, body: bytes) -> list[str]:
        if not body:
            return ["  (no body)"]
        size = f"  ({len(body):,} bytes in all; --full shows them)"
        if len(body) > LONGEST_BODY and not self.full:
            return [f"  {tables.printable(body[:LONGEST_TEXT].decode(errors='replace'), LONGEST_TEXT)}", size]
        text = tables.json_laid_out(body, indent=0)
        if text is None:
            shown = tables.printable(repr(body), 0 if self.full else 200)
            return [f"  {shown}  (not JSON, {len(body):,} bytes)"]
        if len(text) > shutil.get_terminal_size((100, 24)).columns - 2:
            text = tables.json_laid_out(body, indent=2) or text
        cut = len(text) > LONGEST_TEXT and not self.full
        text = tables.printable_lines(text[:LONGEST_TEXT] if cut else text)
        lines = [f"  {self._painted(line)}" for line in text.split("\n")]
        return [f"{lines[-1]}…" if line is lines[-1] and cut else line for line in lines] + ([size] if cut else [])

    def _painted(self, line: str) -> str:
        return _TOKENS.sub(self._paint, line) if self.color else line

    def _paint(self, found: re.Match[str]) -> str:
        if found["string"] is not None:
            if found["colon"] is not None:
                return self._in(found["string"], "blue") + found["colon"]
            return self._in(found["string"], "green")
        return self._in(found[0], "yellow" if found["number"] else "magenta")

    def _in(self, text: str, color: str, *, bold: bool = False) -> str:
        return click.style(text, fg=color, bold=bold or None) if self.color else text
