"""The payloads: an order of seven fields (about 250 bytes of JSON), real commits, or a text of any length.

Every event has a number, which the handler records. So each run can check that every event was handled exactly once.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FIRST = 100_000_000
"""Numbers have nine digits, so that a copy of a message can have another number in the same place."""
SEED = FIRST + 123_456
"""The number in the message that is the template of the copies."""

COMMITS = Path(__file__).parent.parent / "docs" / "examples" / "demo" / "commits.jsonl"

NUMBER = {"order": "customer_id", "commit": "insertions", "blob": "number"}
"""The field with the number, by kind of payload."""


def make(kind: str, number: int, size: int = 0) -> dict[str, Any]:
    """The fields of an event, as JSON values."""
    if kind == "commit":
        return commits()[number % len(commits())]
    if kind == "blob":
        return {"number": number, "data": "x" * max(0, size - 33)}
    return {
        "order_id": "o-123456789",
        "customer_id": number,
        "email": "somebody@example.com",
        "total": 99.5,
        "currency": "EUR",
        "items": ["sku-1001-blue-large", "sku-2002-green-medium", "sku-3003-red-small", "sku-4004-yellow-extra-large"],
        "paid": True,
    }


@functools.cache
def commits() -> list[dict[str, Any]]:
    """Real events: commits of well-known repositories."""
    with COMMITS.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def expected(kind: str, count: int) -> list[int]:
    """The numbers of `count` events that were copied from templates (see `broker.Template`), in order."""
    if kind == "commit":
        numbers = [commit["insertions"] for commit in commits()]
        return sorted(numbers[index % len(numbers)] for index in range(count))
    return list(range(FIRST, FIRST + count))
