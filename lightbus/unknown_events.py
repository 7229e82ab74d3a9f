"""The error for a publish of something that the app has not declared, with what was probably meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightbus import errors
from lightbus import event as events
from lightbus.event import EventType

SHOWN = 10
"""The most events that one error lists."""


def unknown_event(
    app: str, declared: Mapping[str, EventType], given: object, not_loaded: Sequence[str] = ()
) -> errors.UnknownEvent:
    """
    Args:
        declared: the app's events, by name.
        given: what was published instead of an instance of one of them.
        not_loaded: modules that may declare more events, and are not imported.
    """
    if isinstance(given, type):
        return errors.UnknownEvent(f"{given.__name__} is a class. Publish an instance of it: {given.__name__}(...).")
    if isinstance(given, str) and given in declared:
        name = declared[given].cls.__name__
        return errors.UnknownEvent(f"{given!r} is only the event's name. Publish an instance of it: {name}(...).")
    if isinstance(given, str):
        return errors.UnknownEvent(
            f"{given!r} is not declared on app {app!r}. {suggestion(declared, given, not_loaded)}"
        )
    cls = type(given)
    if events.event_type_of(cls) is not None:
        return errors.UnknownEvent(
            f"{cls.__name__} is an event of another app, and {app!r} can publish only its own events. "
            f"Publish it with that app, or give {app!r} its own event: @app.event."
        )
    if cls.__module__ == "builtins" and declared:
        known = ", ".join(f"{one.cls.__name__}(...)" for one in list(declared.values())[:SHOWN])
        return errors.UnknownEvent(f"A {cls.__name__} is not an event. Publish an instance of one of: {known}.")
    hint = suggestion(declared, events.default_name(cls.__name__), not_loaded)
    return errors.UnknownEvent(f"{cls.__name__} is not declared on app {app!r}. {hint}")


def suggestion(declared: Mapping[str, EventType], name: str, not_loaded: Sequence[str] = ()) -> str:
    """A hint for an unknown event name: the most similar one, or the modules that may declare it."""
    if not_loaded:
        return _import_it(declared, name, not_loaded)
    if not declared:
        return "It declares no events yet: decorate a class with @app.event."
    near = errors.nearest(name, declared, cutoff=0.7)
    if near:
        return f"Did you mean {near!r} ({declared[near].cls.__name__})?"
    return f"Decorate its class with @app.event, or publish one of: {', '.join(sorted(declared)[:SHOWN])}."


def _import_it(declared: Mapping[str, EventType], name: str, not_loaded: Sequence[str]) -> str:
    near = errors.nearest(name, declared, cutoff=0.7)
    meant = f"Did you mean {near!r} ({declared[near].cls.__name__})? " if near else ""
    return (
        f"{meant}If a module of include= declares it ({', '.join(not_loaded[:SHOWN])}): publishing does not import "
        "these. Import that module where you publish, or declare the event in a module that you import anyway."
    )
