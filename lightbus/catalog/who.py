"""Who publishes an event or a field, and who gets or reads it: the answer of `lightbus who`. Pure values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs

from lightbus import errors
from lightbus.catalog import schemas
from lightbus.catalog.catalog import Catalog, Subscriber
from lightbus.catalog.contract import Contract, PublishedEvent
from lightbus.catalog.schemas import Field
from lightbus.pattern import topic_matches


@attrs.frozen
class Publisher:
    """An app that publishes the event."""

    contract: Contract
    event: PublishedEvent
    field: Field | None
    """What its schema says about the field; None if the question is about the whole event."""


@attrs.frozen
class Reader:
    """A handler that gets the event."""

    subscriber: Subscriber
    fields: list[str] | None
    """The fields that it reads; None if it takes the whole body."""
    reads: Literal["yes", "any", "no"]
    """Whether it reads the field. `any`: it takes the whole body, so it may read any field. Without a field: whether it
    takes a payload."""


@attrs.frozen
class Answer:
    """About one event, or one field of it."""

    event: str
    field: str
    """The path of the field; "" for the whole event."""
    publishers: list[Publisher]
    handlers: list[Reader]

    @property
    def name(self) -> str:
        """`order.placed`, or `order.placed, field lines.article`."""
        return f"{self.event}, field {self.field}" if self.field else self.event


def who(catalog: Catalog, question: str) -> list[Answer]:
    """Who publishes, and who gets, an event or a field of it.

    `user.registered.email` can be an event, and a field of the event `user.registered`. The answers have both, the
    event first.

    Args:
        question: the name of an event or a topic pattern, and after a dot the path of a field.

    Raises:
        errors.CatalogError: no app publishes such an event or field, and no handler names it. The message has the name
            that was probably meant.
    """
    words, names = question.split("."), _names(catalog)
    answers: list[Answer] = []
    closest: Answer | None = None
    for length in range(len(words), 0, -1):
        pattern, path = ".".join(words[:length]), words[length:]
        for event in names:
            if topic_matches(pattern, event):
                answer = _answer(catalog, event, path)
                if not path or _exists(answer):
                    answers.append(answer)
                elif closest is None:
                    closest = answer
    if not answers:
        raise errors.CatalogError(_unknown(question, names, closest))
    return answers


def _names(catalog: Catalog) -> list[str]:
    """The names of all events: those that are published, and those that handlers name without a wildcard."""
    named = {pattern for one in catalog.contracts for listener in one.handlers for pattern in listener.patterns}
    exact = (pattern for pattern in named if "*" not in pattern and "#" not in pattern)
    return sorted({*(event.name for _, event in catalog.events()), *exact})


def _answer(catalog: Catalog, event: str, path: list[str]) -> Answer:
    publishers = [
        Publisher(contract, published, schemas.field(published.schema, path) if path else None)
        for contract, published in catalog.publishers(event)
    ]
    apps = {one.contract.app for one in publishers}
    handlers = [
        _reader(subscriber, path)
        for subscriber in catalog.subscribers(event)
        if not apps or subscriber.listener.source in (None, *apps)
    ]
    return Answer(event, ".".join(path), publishers, handlers)


def _reader(subscriber: Subscriber, path: list[str]) -> Reader:
    schema, fields = subscriber.listener.schema, subscriber.listener.fields
    if schema is None:
        return Reader(subscriber, fields, "no")
    if not path:
        return Reader(subscriber, fields, "any" if fields is None else "yes")
    match schemas.field(schema, path).known:
        case "yes":
            return Reader(subscriber, fields, "yes")
        case "open":
            return Reader(subscriber, fields, "any")
        case _:
            return Reader(subscriber, fields, "no")


def _exists(answer: Answer) -> bool:
    """Whether an app publishes the field, or a handler names it."""
    published = any(one.field is not None and one.field.known != "no" for one in answer.publishers)
    return published or any(one.reads == "yes" for one in answer.handlers)


def _unknown(question: str, names: list[str], closest: Answer | None) -> str:
    """The message, with the question that was probably meant.

    Args:
        closest: the answer about an event that exists, where the field does not.
    """
    if not names:
        return f"There is no event {question!r}: no app has published a contract."
    siblings = [] if closest is None else list(dict.fromkeys(one for each in _fields(closest) for one in each.siblings))
    head, _, last = question.rpartition(".")
    if near := errors.nearest(last, siblings):
        meant = f"Did you mean {f'{head}.{near}'!r}?"
    elif near := _near_event(question, names):
        return f"There is no event {question!r}. Did you mean {near!r}?"
    else:
        meant = _listed("Its fields" if closest else "There are", siblings if closest else names)
    if closest is not None:
        return f"{closest.event!r} has no field {closest.field!r}. {meant}"
    wildcard = "*" in question or "#" in question
    return f"{'No event matches' if wildcard else 'There is no event'} {question!r}. {meant}"


def _near_event(question: str, names: list[str]) -> str | None:
    """The question with the name of an event corrected. What follows the name may be a field."""
    words = question.split(".")
    for length in range(len(words), 0, -1):
        head = ".".join(words[:length])
        if head in names:  # then the field is wrong
            return None
        if near := errors.nearest(head, names, cutoff=0.8):
            return ".".join([near, *words[length:]])
    return errors.nearest(question, names)


def _fields(answer: Answer) -> Iterator[Field]:
    return (one.field for one in answer.publishers if one.field is not None)


def _listed(words: str, names: list[str]) -> str:
    shown = ", ".join(names[:10]) + (f", and {len(names) - 10:,} more" if len(names) > 10 else "")
    return f"{words}: {shown or 'none'}."
