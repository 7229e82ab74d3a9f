"""What deserves a look in a catalogue: events without a handler, patterns without an event, and the like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs

from lightbus.catalog.catalog import Catalog

Kind = Literal["unconsumed", "unmatched", "unknown source", "ignored"]


@attrs.frozen
class Notice:
    """One thing to look at. None of them is an error: the other side may not be deployed yet."""

    kind: Kind
    app: str
    """The app that it is about; "" if unknown."""
    subject: str
    """The event, the handler (`billing.charge`), or the app."""
    detail: str
    """The pattern or the source; "" for other kinds."""
    meant: str | None
    """What was probably meant."""
    text: str
    """As a sentence."""


def notices(catalog: Catalog) -> list[Notice]:
    """Likely mistakes first."""
    return [*_ignored(catalog), *_unknown_sources(catalog), *_unmatched(catalog), *_unconsumed(catalog)]


def _ignored(catalog: Catalog) -> Iterator[Notice]:
    for one in catalog.ignored:
        writer = one.writer or "an unknown user"
        yield Notice(
            "ignored", one.writer, writer, "", None, f"A contract written by {writer} is ignored: {one.reason}"
        )


def _unknown_sources(catalog: Catalog) -> Iterator[Notice]:
    for one, meant in catalog.unknown_sources():
        source = one.listener.source or ""
        hint = f"Did you mean {meant!r}?" if meant else "It has published no contract."
        text = f"{one.name}: no app {source!r} (source=) is known. {hint}"
        yield Notice("unknown source", one.contract.app, one.name, source, meant, text)


def _unmatched(catalog: Catalog) -> Iterator[Notice]:
    for one, pattern, meant in catalog.unmatched():
        source = f" of {one.listener.source}" if one.listener.source else ""
        hint = f" Did you mean {meant!r}?" if meant else ""
        text = f"{one.name}: the pattern {pattern!r} matches no event{source}.{hint}"
        yield Notice("unmatched", one.contract.app, one.name, pattern, meant, text)


def _unconsumed(catalog: Catalog) -> Iterator[Notice]:
    for contract, event in catalog.unconsumed():
        text = f"{event.name} of {contract.app}: no handler gets it."
        yield Notice("unconsumed", contract.app, event.name, "", None, text)
