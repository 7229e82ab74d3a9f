"""How many events the services should handle, and how many they have handled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

LARGE, TOO_LONG = 500, 3_000
"""Lines of a commit: above LARGE, reviews.py requests a review. Above TOO_LONG, inbox.py cannot deliver it."""

Entries = dict[str, list[tuple[str, int]]]
"""The records of each service: (what, lines)."""


def expected(lines: Sequence[bytes]) -> list[tuple[str, str, int]]:
    """(service, what, count), from the file alone."""
    commits = [json.loads(line) for line in lines]
    sizes = [commit["insertions"] + commit["deletions"] for commit in commits]
    large = [size for size in sizes if size > LARGE]
    too_long = sum(size > TOO_LONG for size in large)
    busy_once = sum(size <= TOO_LONG and size % 5 == 0 for size in large)
    rows: list[tuple[str, str, int]] = []
    for repository in sorted({commit["repository"] for commit in commits}):
        own = [size for commit, size in zip(commits, sizes, strict=True) if commit["repository"] == repository]
        rows += [("stats", f"{repository}: commits", len(own)), ("stats", f"{repository}: lines", sum(own))]
    return [
        *rows,
        ("reviews", "commits checked", len(commits)),
        ("reviews", f"of more than {LARGE} lines: review.requested", len(large)),
        ("inbox", "review.requested received", len(large)),
        ("inbox", "second attempts", busy_once + too_long),
        ("inbox", "third attempts", too_long),
        ("inbox", "delivered", len(large) - too_long),
        ("inbox", "dead letters, kept in inbox.dead", too_long),
    ]


def handled(entries: Entries, dead: int) -> dict[tuple[str, str], int]:
    """The same counts, from the records of the services and the number of dead letters."""
    commits = Counter(what for what, _ in entries["stats"])
    lines: Counter[str] = Counter()
    for what, size in entries["stats"]:
        lines[what] += size
    checked = Counter(what for what, _ in entries["reviews"])
    mails = Counter(what for what, _ in entries["inbox"])
    return {
        **{("stats", f"{repository}: commits"): count for repository, count in commits.items()},
        **{("stats", f"{repository}: lines"): count for repository, count in lines.items()},
        ("reviews", "commits checked"): checked.total(),
        ("reviews", f"of more than {LARGE} lines: review.requested"): checked["large"],
        ("inbox", "review.requested received"): mails["attempt 1"],
        ("inbox", "second attempts"): mails["attempt 2"],
        ("inbox", "third attempts"): mails["attempt 3"],
        ("inbox", "delivered"): mails["delivered"],
        ("inbox", "dead letters, kept in inbox.dead"): dead,
    }
