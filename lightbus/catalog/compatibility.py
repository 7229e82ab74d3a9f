"""What a change of an app breaks: its new contract, compared with the contracts of a catalogue. Pure values.

What counts is whether each handler can read every body that is published. A problem that the old contract of the app
has as well is not of this change: it is reported as "before".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import attrs

from lightbus import errors
from lightbus.catalog import differences
from lightbus.catalog.catalog import Catalog, Subscriber
from lightbus.catalog.contract import Contract, Listener, PublishedEvent
from lightbus.catalog.differences import Difference, Kind
from lightbus.catalog.schemas import Schema
from lightbus.pattern import topic_matches

TYPO = 0.85
"""How similar a name that nobody publishes must be to a published one to fail the check, from 0 to 1.
`order.paced` and `order.placed` have 0.96, `user.created` and `user.deleted` 0.75."""

Verdict = Literal["break", "before", "note"]


@attrs.frozen
class Break:
    """One thing that a change breaks, or that is worth knowing about it."""

    verdict: Verdict
    """`break`: this change causes it. `before`: it was so before. `note`: nothing breaks."""
    rule: str
    """`gone`, `pattern`, `source`, `default`, `version`, or the value of a `differences.Kind`."""
    event: str
    """The event or the pattern; "" if it is about none."""
    field: str
    """The path of the field in the body; "" if it is about none."""
    handler: str
    """`app.handler`; "" if it is about none."""
    what: str
    """As a sentence, without the event, field and handler."""
    next: str
    """What to do."""


def check(new: Contract, catalog: Catalog) -> list[Break]:
    """What breaks if `new` replaces its app's contract in the catalogue.

    Returns:
        Breaks first, then what was so before, then notes; in the order of events.
    """
    found = _Check(new, catalog).run()
    order = ("break", "before", "note")
    return sorted(dict.fromkeys(found), key=lambda one: order.index(one.verdict))


class _Check:
    def __init__(self, new: Contract, catalog: Catalog) -> None:
        self.new = new
        self.old = catalog.contract(new.app)
        self.after = catalog.replaced(new)
        self.old_events = {one.name: one for one in self.old.events} if self.old is not None else {}
        self.old_handlers = {one.handler: one for one in self.old.handlers} if self.old is not None else {}

    def run(self) -> Iterator[Break]:
        for event in self.new.events:
            yield from self._published(event)
        for name in sorted(self.old_events.keys() - {one.name for one in self.new.events}):
            yield from self._gone(name)
        for listener in self.new.handlers:
            yield from self._listens(Subscriber(self.new, listener))

    # --- as a publisher -----------------------------------------------------------------------

    def _published(self, event: PublishedEvent) -> Iterator[Break]:
        old = self.old_events.get(event.name)
        for subscriber in self.after.subscribers(event.name, self.new.app):
            before = self._before(subscriber, old, event.name)
            for one in _differences(event.schema, subscriber.listener):
                yield _difference(
                    "before" if one in before else "break",
                    event.name,
                    subscriber.name,
                    one,
                    f"Keep what {subscriber.name} reads, or publish the new form as another event until it is deployed "
                    "with a class that reads both.",
                )
        if old is not None:
            yield from _notes(old, event)

    def _before(self, subscriber: Subscriber, old: PublishedEvent | None, name: str) -> list[Difference]:
        """The differences between the old event and the old handler."""
        listener: Listener | None = subscriber.listener
        if subscriber.contract is self.new:
            listener = self.old_handlers.get(subscriber.listener.handler)
        if old is None or listener is None or not _gets(listener, name, self.new.app):
            return []
        return _differences(old.schema, listener)

    def _gone(self, name: str) -> Iterator[Break]:
        others = {contract.app for contract, _ in self.after.publishers(name)}
        for subscriber in self.after.subscribers(name, self.new.app):
            if subscriber.listener.source is None and others:
                continue  # it still gets the event, from another app
            yield Break(
                "break",
                "gone",
                name,
                "",
                subscriber.name,
                "The event is no longer published",
                f"Keep publishing {name} until {subscriber.name} no longer subscribes to it.",
            )

    # --- as a subscriber ----------------------------------------------------------------------

    def _listens(self, subscriber: Subscriber) -> Iterator[Break]:
        listener = subscriber.listener
        old = self.old_handlers.get(listener.handler)
        apps = [one.app for one in self.after.contracts]
        if listener.source is not None and listener.source not in apps:
            yield self._unknown_source(subscriber, apps, old)
            return
        for pattern in listener.patterns:
            yield from self._pattern(subscriber, pattern, old)
        for contract, event in self.after.events():
            if contract.app != self.new.app and _gets(listener, event.name, contract.app):
                yield from self._reads(subscriber, contract.app, event, old)

    def _reads(
        self, subscriber: Subscriber, publisher: str, event: PublishedEvent, old: Listener | None
    ) -> Iterator[Break]:
        gets = old is not None and _gets(old, event.name, publisher)
        before = _differences(event.schema, old) if old is not None and gets else []
        for one in _differences(event.schema, subscriber.listener):
            verdict: Verdict = "before" if one in before else "note" if one.kind is Kind.LOST else "break"
            meant = f" Did you mean {one.near!r}?" if one.near else ""
            yield _difference(
                verdict,
                event.name,
                subscriber.name,
                one,
                f"The app {publisher} publishes it.{meant} Read what it publishes, or ask its team to change it first.",
            )

    def _unknown_source(self, subscriber: Subscriber, apps: list[str], old: Listener | None) -> Break:
        source = subscriber.listener.source or ""
        near = errors.nearest(source, apps, cutoff=TYPO)
        verdict: Verdict = "note"
        if near is not None:
            verdict = "before" if old is not None and old.source == source else "break"
        return Break(
            verdict,
            "source",
            ", ".join(subscriber.listener.patterns),
            "",
            subscriber.name,
            f"The catalogue has no app {source!r}, which source= names",
            f"Did you mean {near!r}?" if near else "Deploy that app, or publish its contract; then check again.",
        )

    def _pattern(self, subscriber: Subscriber, pattern: str, old: Listener | None) -> Iterator[Break]:
        source = subscriber.listener.source
        names = {event.name for one, event in self.after.events() if source in (None, one.app)}
        if any(topic_matches(pattern, name) for name in names):
            return
        near = errors.nearest(pattern, sorted(names), cutoff=TYPO)
        verdict: Verdict = "note"
        if near is not None:
            verdict = "before" if old is not None and pattern in old.patterns and old.source == source else "break"
        else:
            near = errors.nearest(pattern, sorted(names))
        yield Break(
            verdict,
            "pattern",
            pattern,
            "",
            subscriber.name,
            "No app in the catalogue publishes such an event",
            f"Did you mean {near!r}?" if near else "Deploy the app that publishes it; then check again.",
        )


def _gets(listener: Listener, event: str, publisher: str) -> bool:
    return listener.source in (None, publisher) and any(topic_matches(one, event) for one in listener.patterns)


def _differences(written: Schema, listener: Listener) -> list[Difference]:
    return [] if listener.schema is None else differences.differences(written, listener.schema)


_WHAT = {
    Kind.MISSING: "The field is required, but not published",
    Kind.LOST: "The field is read, but not published: the handler gets its default",
    Kind.OPTIONAL: "The field is required, but not always published",
    Kind.UNKNOWN: "The field is published, but the handler's class forbids unknown fields",
}


def _difference(verdict: Verdict, event: str, handler: str, one: Difference, after: str) -> Break:
    what = _WHAT.get(one.kind, f"Published: {one.written}; read: {one.read}")
    return Break(verdict, one.kind.value, event, one.path, handler, what, after)


# --- notes ------------------------------------------------------------------------------------


def _notes(old: PublishedEvent, new: PublishedEvent) -> Iterator[Break]:
    if old.version != new.version:
        yield Break(
            "note",
            "version",
            new.name,
            "",
            "",
            f"Version {old.version} becomes {new.version}",
            "Subscribers see it as Message.version; it changes no body.",
        )
    before, after = _defaults(old.schema), _defaults(new.schema)
    for path in sorted(before.keys() & after.keys()):
        if before[path] != after[path]:
            yield Break(
                "note",
                "default",
                new.name,
                path,
                "",
                f"Its default {before[path]!r} becomes {after[path]!r}",
                "Handlers get the new value.",
            )


def _defaults(schema: Schema) -> dict[str, Any]:
    """The defaults of all classes of a schema, by field; of a class that the body contains, with its name."""
    root = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    return {
        name if title == root else f"{title}.{name}": field["default"]
        for title, part in schema.get("$defs", {}).items()
        if isinstance(part, dict)
        for name, field in part.get("properties", {}).items()
        if isinstance(field, dict) and "default" in field
    }
