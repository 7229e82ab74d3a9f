"""What `lightbus doctor` finds out about an outbox."""

from __future__ import annotations

from lightbus.inspection.finding import Finding
from lightbus.outbox.rows import OUTBOX
from lightbus.outbox.store import Store

OLD = 60.0
"""Seconds: a relay that runs sends much earlier."""


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
        if OUTBOX in text:
            cause, _, step = text.rpartition(". ")
            return [Finding("fail", "outbox", f"{store.name}: {cause or text}.", step or "lightbus outbox sql")]
        return [
            Finding(
                "fail",
                "outbox",
                f"{store.name} does not answer: {text}.",
                "Start the database, or correct the engine's URL. Until then, nothing in the outbox is sent.",
            )
        ]
    found: list[Finding] = []
    if depth.set_aside:
        found.append(
            Finding(
                "warn",
                "outbox",
                f"{store.name}: {depth.set_aside:,} set aside, which the broker has refused.",
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
