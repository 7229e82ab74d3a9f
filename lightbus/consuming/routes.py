"""Which handlers of a queue a delivery is for; and, where there is none, why."""

from __future__ import annotations

from lightbus import errors
from lightbus.consuming.subscription import SubscriptionConfig
from lightbus.handler import Handler
from lightbus.transport import Delivery
from lightbus.wire import codec, topology

REMEMBERED = 10_000
"""Pairs of exchange and routing key; forgotten all at once when there are more."""


class Routes:
    """The handlers of one queue, by what they match. Owned by the event loop."""

    def __init__(self, app: str, config: SubscriptionConfig) -> None:
        self.known: dict[tuple[str, str], tuple[Handler, ...]] = {}
        """The handlers by exchange and routing key, for deliveries that `find` has seen; not for retried copies."""
        self._app = app
        self._config = config
        self._internal = topology.internal_name(app)

    def find(self, delivery: Delivery) -> tuple[Handler, ...]:
        """The handlers for this delivery; none where no handler matches, or which it was for cannot be known."""
        try:
            envelope = codec.read_envelope(self._app, delivery)
        except errors.DecodeError:
            return ()
        if not envelope.verified:
            return ()
        if envelope.handler is not None:
            handler = self._config.handlers.get(envelope.handler)
            return () if handler is None else (handler,)
        handlers = tuple(
            handler for handler in self._config.handlers.values() if handler.matches(envelope.source, envelope.event)
        )
        if delivery.exchange not in ("", self._internal):
            if len(self.known) >= REMEMBERED:
                self.known.clear()
            self.known[delivery.exchange, delivery.routing_key] = handlers
        return handlers

    def why_none(self, delivery: Delivery) -> errors.NoHandler:
        """
        Raises:
            errors.DecodeError: its envelope cannot be read.
        """
        queue, suffix = self._config.name, self._config.suffix
        envelope = codec.read_envelope(self._app, delivery)
        if not envelope.verified:
            return codec.moved_by_hand(self._app, delivery, queue)
        if envelope.handler is not None:
            return errors.NoHandler(
                f"the handler {envelope.handler!r}, whose retry this is, no longer exists. Deploy code that has this "
                "handler, then retry the dead letter."
            )
        of_queue = "" if suffix == topology.MAIN else f" --queue {suffix}"
        return errors.NoHandler(
            f"no handler of {self._app!r} on queue {queue!r} handles {envelope.event!r} from {envelope.source!r}. If "
            f"the handler was removed, remove its binding too: lightbus unbind MODULE:ATTR PATTERN{of_queue} (one "
            f"that matches {envelope.event!r})"
        )

    def meant_for_others(self, delivery: Delivery) -> list[str]:
        """The apps whose event of this name the queue's handlers want, where this one is another app's; else none.

        Each handler names an app with `source=`. Such an app can bind the bus, or another exchange that it may read,
        to its own exchange. Its subscribers then get others' events, by their own bindings.
        """
        handlers = self._config.handlers.values()
        try:
            envelope = codec.read_envelope(self._app, delivery)
        except errors.DecodeError:
            return []
        if (
            not envelope.verified
            or envelope.handler is not None
            or not envelope.source
            or any(handler.source is None for handler in handlers)
        ):
            return []
        named = {handler.source or "" for handler in handlers if handler.matches(handler.source or "", envelope.event)}
        return [] if envelope.source in named else sorted(named)
