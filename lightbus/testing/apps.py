"""The apps of one TestBus: which events and handlers they have, and that no other app is used by mistake."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

from lightbus import app as app_module
from lightbus import errors
from lightbus import event as events
from lightbus.app import Lightbus
from lightbus.event import EventType
from lightbus.handler import Handler
from lightbus.pattern import topic_matches
from lightbus.testing.messages import hide_lightbus_errors, hint, shown
from lightbus.testing.records import Published, R
from lightbus.wire import topology

__tracebackhide__ = hide_lightbus_errors

Target = str | type[Any] | Callable[..., Any] | None
"""How a test names handlers: by name, function, event class, event name or topic pattern. None: all of them."""

_in_use: weakref.WeakKeyDictionary[Lightbus, object] = weakref.WeakKeyDictionary()
"""The TestBus of each app that is in one."""
_claiming = threading.Lock()


class Apps:
    """The apps of one TestBus.

    Raises:
        errors.TestBusError: no app, a value that is not an app, or two apps of the same name.
    """

    def __init__(self, apps: Sequence[object]) -> None:
        self.all = _checked(apps)

    def __str__(self) -> str:
        names = [repr(app.name) for app in self.all]
        return f"app {names[0]}" if len(names) == 1 else f"the apps {', '.join(names)}"

    # --- events and handlers

    def get(self, name: str) -> Lightbus | None:
        return next((app for app in self.all if app.name == name), None)

    def handlers(self) -> list[tuple[Lightbus, Handler]]:
        return [(app, handler) for app in self.all for handler in app.handlers.values()]

    def patterns(self) -> list[str]:
        """All patterns that handlers subscribe to, sorted."""
        return sorted({pattern for _, handler in self.handlers() for pattern in handler.patterns})

    def event_names(self) -> set[str]:
        """The events that the apps declare, and those that they subscribe to by a full name."""
        return {name for app in self.all for name in app.events} | {one for one in self.patterns() if not _is_wild(one)}

    def queues(self) -> tuple[list[str], list[str]]:
        """The names of the queues that the apps consume, and of their retry queues."""
        queues = [queue for app in self.all for queue in app.consumed_queues()]
        retrying = [f"{one.app}.{topology.retry_key(one.suffix, delay)}" for one in queues for delay in one.delays]
        return [one.name for one in queues], retrying

    def declared(self, cls: type[Any]) -> EventType:
        """
        Raises:
            errors.UnknownEvent: none of the apps has declared it.
        """
        event_type = events.event_type_of(cls)
        for app in self.all:
            if event_type is not None and app.events.get(event_type.name) == event_type:
                return event_type
        twins = [app.events[event_type.name].cls for app in self.all if event_type and event_type.name in app.events]
        if event_type is None:
            why = "it is not an event class: decorate it with @app.event"
        elif twins:
            why = f"that declares {twins[0].__module__}.{twins[0].__qualname__}, another class. Import it from there"
        else:
            why = "it was declared on another app. Pass that app to the TestBus as well"
        raise errors.UnknownEvent(f"{cls.__module__}.{cls.__qualname__} is not declared on {self}: {why}.")

    def event_type(self, event: str, source: str) -> EventType:
        """What the app `source` publishes as `event`; of an app that is not in the test, a dict.

        Raises:
            errors.UnknownEvent: no handler in the test handles it, or its app in the test has not declared it.
        """
        app = self.get(source)
        if app is not None and event not in app.events:
            raise errors.UnknownEvent(f"{event!r} is not declared on app {source!r}. {app.suggestion(event)}")
        handlers = [handler for _, handler in self.handlers()]
        if not any(handler.matches(source, event) for handler in handlers):
            only = sorted({one.source for one in handlers if one.source and one.matches(one.source, event)})
            if only:
                advice = f"It is handled from {' and '.join(map(repr, only))} only: source={only[0]!r}."
            elif near := errors.nearest(event, self.patterns()):
                advice = f"Did you mean {near!r}?"
            else:
                advice = f"They handle: {', '.join(self.patterns()) or 'nothing'}."
            raise errors.UnknownEvent(f"No handler of {self} handles {event!r} from {source!r}. {advice}")
        return EventType(event, 1, dict) if app is None else app.events[event]

    # --- choosing records

    def chosen_events(self, records: Sequence[Published], event: str | type[Any]) -> list[Any]:
        """The payloads of an event class, or of the events that a name or topic pattern matches.

        Raises:
            errors.UnknownEvent: no app declares it, and none published it.
        """
        if isinstance(event, type):
            event_type = self.declared(event)
            return [one.payload for one in records if one.event == event_type.name and isinstance(one.payload, event)]
        chosen = [one.payload for one in records if topic_matches(event, one.event)]
        if not chosen and not self._is_known(event):
            known = sorted({*self.event_names(), *(one.event for one in records)})
            raise errors.UnknownEvent(f"No event {event!r} is declared on {self}. {hint(event, known)}")
        return chosen

    def chosen(self, records: Sequence[R], target: Target, method: str) -> list[R]:
        """The records of the handlers or events that a test names.

        Args:
            method: the method of TestBus that the test called, for the error.

        Raises:
            errors.TestBusError, errors.UnknownEvent: no app has such a handler or event.
        """
        if target is None:
            return list(records)
        if isinstance(target, type):
            name = self.declared(target).name
            return [one for one in records if one.event == name]
        if isinstance(target, str):
            handlers = {handler.name for _, handler in self.handlers()}
            if target in handlers:
                return [one for one in records if one.handler == target]
            chosen = [one for one in records if topic_matches(target, one.event)]
            if not chosen and not self._is_known(target):
                known = sorted({*handlers, *self.event_names()})
                raise errors.TestBusError(
                    f"bus.{method}({target!r}): {self} has no such handler or event. {hint(target, known)}"
                )
            return chosen
        names = {(app.name, handler.name) for app, handler in self.handlers() if handler.function == target}
        if not names:
            raise errors.TestBusError(
                f"bus.{method}({shown(target)}): that is not a handler of {self}. "
                f"{hint(getattr(target, '__name__', ''), sorted({one.name for _, one in self.handlers()}))}"
            )
        return [one for one in records if (getattr(one, "app", None), one.handler) in names]

    def _is_known(self, target: str) -> bool:
        return _is_wild(target) or target in self.event_names()

    # --- one TestBus at a time

    @contextlib.contextmanager
    def claimed(self, bus: object) -> Generator[None]:
        """Within this block the apps belong to `bus`, and any other app refuses to use its own broker.

        Raises:
            errors.TestBusError: one of the apps is already in a TestBus.
        """
        with _claiming:
            for app in self.all:
                if app in _in_use:
                    raise errors.TestBusError(
                        f"app {app.name!r} is already in a TestBus ({_in_use[app]!r}), and can be in only one at a "
                        "time. Exit that one first, or pass all apps of the test to one: TestBus(app, other_app)."
                    )
            _in_use.update(dict.fromkeys(self.all, bus))
            app_module.refuse_outsider = _refuse_outsider
        try:
            yield
        finally:
            with _claiming:
                for app in self.all:
                    del _in_use[app]
                if not _in_use:
                    app_module.refuse_outsider = None


def _refuse_outsider(app: Lightbus) -> None:
    """
    Raises:
        errors.TestBusError: always. The app's own broker may be the one in production.
    """
    running = ", ".join(sorted({repr(bus) for bus in _in_use.values()}))
    raise errors.TestBusError(
        f"app {app.name!r} is not in the test ({running}), and would use its own broker. Pass it to the TestBus as "
        "well; or, if that is intended, connect it first: `async with app:`."
    )


def _is_wild(pattern: str) -> bool:
    return "*" in pattern or "#" in pattern


def _checked(apps: Sequence[object]) -> tuple[Lightbus, ...]:
    checked: dict[str, Lightbus] = {}
    for app in apps:
        if not isinstance(app, Lightbus):
            raise errors.TestBusError(
                f"TestBus takes Lightbus apps, not {app!r}. Import the app: from billing.bus import app"
            )
        if checked.setdefault(app.name, app) is not app:
            raise errors.TestBusError(
                f"TestBus was given two apps called {app.name!r}, which would be the same app on a broker. "
                "Give them different names."
            )
    if not checked:
        raise errors.TestBusError("TestBus needs at least one app: TestBus(app).")
    return tuple(checked.values())
