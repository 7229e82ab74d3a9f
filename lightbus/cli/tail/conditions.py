"""--where: conditions on the payload of an event."""

from __future__ import annotations

import contextlib
import fnmatch
import json
from typing import Any

import attrs
import click


@attrs.frozen
class Condition:
    """One --where option."""

    path: tuple[str, ...]
    value: str
    equal: bool

    @classmethod
    def parse(cls, given: str) -> Condition:
        """
        Raises:
            click.UsageError: it is not FIELD=VALUE or FIELD!=VALUE.
        """
        field, equals, value = given.partition("=")
        path = tuple(field.removesuffix("!").split("."))
        if not equals or not all(path):
            raise click.UsageError(f"--where {given!r} is not FIELD=VALUE, as in amount=9.50 or user.name='A*'.")
        return cls(path, value, not field.endswith("!"))

    def matches(self, payload: Any) -> bool:
        return any(self._equals(found) for found in self._find(payload)) == self.equal

    def _find(self, payload: Any) -> list[Any]:
        """The value at the end of the path, or nothing."""
        for name in self.path:
            match payload:
                case dict() if name in payload:
                    payload = payload[name]
                case list() if name.isdecimal() and int(name) < len(payload):
                    payload = payload[int(name)]
                case _:
                    return []
        return [payload]

    def _equals(self, found: Any) -> bool:
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            with contextlib.suppress(ValueError):
                if float(self.value) == found:
                    return True
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, separators=(",", ":"))
        return fnmatch.fnmatchcase(text, self.value)
