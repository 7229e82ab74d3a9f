"""All contracts of a bus at one moment, and what they say about an event. Pure values: nothing connects."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import msgspec

from lightbus import errors
from lightbus.catalog import contract as contracts
from lightbus.catalog.contract import Contract, Listener, PublishedEvent
from lightbus.pattern import topic_matches

FORMAT = 1
"""The version of a snapshot's format."""
MOST_SUGGESTIONS = 20
"""How often a name that was probably meant is sought: each time takes milliseconds if there are thousands."""


@attrs.frozen
class Ignored:
    """A message in the catalogue that does not count."""

    writer: str
    """The app whose broker user wrote it, as the broker verified; "" if it was none."""
    at: float
    """When; seconds since 1970, or 0 if unknown."""
    reason: str
    """As a sentence, with what to do."""


@attrs.frozen
class Subscriber:
    """A handler, and the contract that it is part of."""

    contract: Contract
    listener: Listener

    @property
    def name(self) -> str:
        """`billing.send_invoice`."""
        return f"{self.contract.app}.{self.listener.handler}"


@attrs.frozen
class Catalog:
    """What all apps of a bus publish and subscribe to."""

    at: float
    """When it was read; seconds since 1970."""
    contracts: list[Contract]
    """The newest of each app, by its name."""
    ignored: list[Ignored] = attrs.field(factory=list)

    @functools.cached_property
    def _index(self) -> _Index:
        return _Index(self.contracts)

    def contract(self, app: str) -> Contract | None:
        """The contract of an app; None if it has published none."""
        return next((one for one in self.contracts if one.app == app), None)

    def events(self) -> Iterator[tuple[Contract, PublishedEvent]]:
        """All published events, by app and name."""
        return ((one, event) for one in self.contracts for event in one.events)

    def publishers(self, event: str) -> list[tuple[Contract, PublishedEvent]]:
        """The apps that publish an event with this name."""
        return self._index.published.get(event, [])

    def subscribers(self, event: str, source: str | None = None) -> list[Subscriber]:
        """The handlers that get an event with this name.

        Args:
            source: the app that publishes it; None: any.
        """
        return [
            one for one in self._index.subscribers(event) if source is None or one.listener.source in (None, source)
        ]

    def unconsumed(self) -> list[tuple[Contract, PublishedEvent]]:
        """Events that no handler gets."""
        return [(one, event) for one, event in self.events() if not self.subscribers(event.name, one.app)]

    def unmatched(self) -> list[tuple[Subscriber, str, str | None]]:
        """Patterns that match no event of any contract: handler, pattern, and the event that was probably meant.

        Where a handler names a source without a contract, its patterns are not listed: see `unknown_sources`.
        """
        found: list[tuple[Subscriber, str, str | None]] = []
        names: dict[str | None, list[str]] = {
            one.app: sorted({event.name for event in one.events}) for one in self.contracts
        }
        names[None] = sorted(self._index.published)
        for contract in self.contracts:
            for listener in contract.handlers:
                if listener.source is not None and listener.source not in names:
                    continue
                for pattern in listener.patterns:
                    if not self._index.matches(pattern, listener.source):
                        near = len(found) < MOST_SUGGESTIONS and errors.nearest(pattern, names[listener.source])
                        found.append((Subscriber(contract, listener), pattern, near or None))
        return found

    def unknown_sources(self) -> list[tuple[Subscriber, str | None]]:
        """Handlers whose source= names an app without a contract, and the app that was probably meant."""
        apps = {one.app: None for one in self.contracts}
        found: list[tuple[Subscriber, str | None]] = []
        for contract in self.contracts:
            for listener in contract.handlers:
                if listener.source is not None and listener.source not in apps:
                    near = len(found) < MOST_SUGGESTIONS and errors.nearest(listener.source, apps)
                    found.append((Subscriber(contract, listener), near or None))
        return found

    def replaced(self, contract: Contract) -> Catalog:
        """The same with this contract in the place of its app's."""
        others = [one for one in self.contracts if one.app != contract.app]
        return attrs.evolve(self, contracts=sorted([*others, contract], key=lambda one: one.app))


class _Index:
    """Finds events and handlers without comparing each pattern with each event: a bus can have thousands of both."""

    def __init__(self, contracts: list[Contract]) -> None:
        self.published: dict[str, list[tuple[Contract, PublishedEvent]]] = {}
        self._by_first_word: dict[str, list[str]] = {}
        """The names of published events."""
        self._exact: dict[str, list[tuple[int, Subscriber]]] = {}
        self._wildcards: dict[str, list[tuple[int, str, Subscriber]]] = {}
        """Patterns with a wildcard by their first word, with the handler's number. Those that begin with a wildcard are
        under ""."""
        for contract in contracts:
            for event in contract.events:
                self.published.setdefault(event.name, []).append((contract, event))
        for name in self.published:
            self._by_first_word.setdefault(_first_word(name), []).append(name)
        every = (Subscriber(contract, listener) for contract in contracts for listener in contract.handlers)
        for number, one in enumerate(every):
            for pattern in one.listener.patterns:
                if _is_exact(pattern):
                    self._exact.setdefault(pattern, []).append((number, one))
                else:
                    self._wildcards.setdefault(_first_word(pattern), []).append((number, pattern, one))

    def subscribers(self, event: str) -> list[Subscriber]:
        """In the order of the contracts, each once."""
        found = dict(self._exact.get(event, []))
        for word in {_first_word(event), ""}:
            found |= {
                number: one for number, pattern, one in self._wildcards.get(word, []) if topic_matches(pattern, event)
            }
        return [found[number] for number in sorted(found)]

    def matches(self, pattern: str, source: str | None) -> bool:
        """Whether the pattern matches an event of this app, or of any (None)."""
        if _is_exact(pattern):
            names = [pattern] if pattern in self.published else []
        else:
            first = _first_word(pattern)
            names = self._by_first_word.get(first, []) if first else list(self.published)
        return any(
            topic_matches(pattern, name)
            and (source is None or any(contract.app == source for contract, _ in self.published[name]))
            for name in names
        )


def _is_exact(pattern: str) -> bool:
    return "*" not in pattern and "#" not in pattern


def _first_word(pattern: str) -> str:
    """ "" if it is a wildcard."""
    first = pattern.partition(".")[0]
    return "" if first in ("*", "#") else first


def of(given: list[Contract], ignored: list[Ignored] | None = None, at: float | None = None) -> Catalog:
    """The catalogue of these contracts; of several contracts of an app, the last one counts."""
    newest = {one.app: one for one in given}
    return Catalog(time.time() if at is None else at, [newest[app] for app in sorted(newest)], ignored or [])


# --- snapshots --------------------------------------------------------------------------------


def to_json(catalog: Catalog) -> dict[str, Any]:
    """A snapshot: a JSON object."""
    return {
        "lightbus": FORMAT,
        "at": catalog.at,
        "contracts": [contracts.to_json(one) for one in catalog.contracts],
        "ignored": [attrs.asdict(one) for one in catalog.ignored],
    }


def from_file(path: Path) -> Catalog:
    """Read a snapshot, as `lightbus catalog --format json` writes it.

    Raises:
        errors.CatalogError: the file cannot be read, or is no snapshot.
    """
    try:
        written: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise errors.CatalogError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise errors.CatalogError(f"{path} is not JSON: {error}. {_NEXT}") from error
    if (
        not isinstance(written, dict)
        or written.get("lightbus") != FORMAT
        or not isinstance(written.get("contracts"), list)
    ):
        raise errors.CatalogError(f"{path} is not a snapshot of a catalogue (format {FORMAT}). {_NEXT}")
    at = written.get("at")
    try:
        ignored = msgspec.convert(written.get("ignored", []), list[Ignored])
    except msgspec.ValidationError as error:
        raise errors.CatalogError(f"{path}: its ignored contracts cannot be read: {error}. {_NEXT}") from error
    given = []
    for number, one in enumerate(written["contracts"], 1):
        try:
            given.append(contracts.from_json(one))
        except errors.CatalogError as error:
            name = one.get("app") if isinstance(one, dict) else None
            raise errors.CatalogError(f"{path}: contract {number}, of app {str(name)[:100]!r}: {error}") from error
    return of(given, ignored, at if isinstance(at, int | float) else 0.0)


_NEXT = "Write one with: lightbus catalog --format json > catalog.json"
