"""What `lightbus doctor` finds out about an outbox."""

from __future__ import annotations

from lightbus.inspection.finding import Finding
from lightbus.outbox.store import Store

OLD = 60.0
"""Seconds: a relay that runs sends much earlier."""

CREATE = "Create the tables"
"""How the next step begins in what a `Store` says about a missing table."""


async def examine(store: Store, target: str) -> list[Finding]:
    """
    Args:
        target: MODULE:ATTR, for the next steps.
    """
    try:
        depth = await store.depth()
    except Exception as error:
        if not store.is_temporary(error):
            raise
        text = store.describe(error).rstrip(".")
        cause, missing, how = text.partition(f". {CREATE}")
        if missing:
            return [Finding("fail", "outbox", f"{store.name}: {cause}.", CREATE + how)]
        return [
            Finding(
                "fail",
                "outbox",
                f"{store.name} cannot be used: {text}.",
                "Check that the database runs, its URL, and the user's permissions. Until then, nothing is sent.",
            )
        ]
    found: list[Finding] = []
    if depth.set_aside:
        found.append(
            Finding(
                "warn",
                "outbox",
                f"{store.name}: {depth.set_aside:,} set aside, which could not be sent.",
                f"lightbus outbox list {target}",
            )
        )
    waiting = f"{depth.waiting:,} waiting in {store.name}"
    if depth.oldest_seconds > OLD:
        found.append(
            Finding(
                "fail",
                "outbox",
                f"{waiting}, the oldest for {depth.oldest_seconds:,.0f} s.",
                f"Is a relay running? Each worker has one; or start one: lightbus relay {target}",
            )
        )
    else:
        found.append(Finding("ok", "outbox", f"{waiting}."))
    return found
