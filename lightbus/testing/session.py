"""`Session`: what exists while a TestBus runs, from enter to exit."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from typing import Any

import anyio.from_thread

from lightbus.connection.declare import declare
from lightbus.connection.dial import BrokerAddresses
from lightbus.outcome import Observe
from lightbus.publishing.observed import ObservedPublisher
from lightbus.testing.apps import Apps
from lightbus.testing.host import Host
from lightbus.testing.messages import hide_lightbus_errors
from lightbus.testing.recorder import Recorder
from lightbus.transport.sqlite.control import TestControl
from lightbus.transport.sqlite.place import forget_memory
from lightbus.wire.topology import QueueType
from lightbus.worker.worker import Worker

__tracebackhide__ = hide_lightbus_errors

GRACE = 1.0
"""Seconds that running handlers get to end when the TestBus ends. Events that were not drained are discarded."""

_numbers = itertools.count(1)


class Session:
    """An embedded broker (`memory://`) with everything declared, the apps' publishers, and their workers.

    Raises:
        errors.TestBusError: one of the apps is already in a TestBus.
    """

    def __init__(self, apps: Apps, recorder: Recorder, bus: object, *, lifespan: bool, timeout: float) -> None:
        self.apps = apps
        self.recorder = recorder
        self.publishers: dict[str, ObservedPublisher] = {}
        """By app, also apps that are not in the test (see `TestBus.publish`)."""
        self.host: Host | None = None
        """None until the workers start."""
        self._lifespan = lifespan
        self._timeout = timeout
        self._portal: anyio.from_thread.BlockingPortal | None = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(apps.claimed(bus))
            name = f"test-{os.getpid()}-{next(_numbers)}"
            self.broker = BrokerAddresses.parse(f"memory://{name}")
            stack.callback(forget_memory, name)
            self.control = TestControl(f"memory://{name}")
            stack.callback(self.control.close)
            connection = self.broker.connect("lightbus testing")
            for app in apps.all:
                declare(connection, app.topology())
            connection.close()
            stack.callback(self._close_publishers)
            for app in apps.all:
                stack.enter_context(app.observed_by(recorder.observe))
                observe = app.observer
                assert observe is not None
                publisher = self._make_publisher(app.name, app.publish_timeout, app.queue_type, observe)
                stack.enter_context(app.redirected(self.broker, publisher))
            self._stack = stack.pop_all()

    def override(self, dependency: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        """Until the end, in the apps that have this dependency.

        Raises:
            errors.InvalidDependency: none of them has it, or the replacement cannot be used.
        """
        using = [app for app in self.apps.all if app.depends_on(dependency)]
        for app in using or self.apps.all[:1]:  # its error says which dependencies there are
            self._stack.enter_context(app.override(dependency, replacement))

    def close(self) -> None:
        """Give the apps back their own brokers, and discard this one."""
        self._stack.close()

    # --- publishers

    def publisher_of(self, source: str) -> ObservedPublisher:
        """The publisher of an app, also of one that is not in the test."""
        return self.publishers.get(source) or self._make_publisher(
            source, self._timeout, "quorum", self.recorder.observe
        )

    def _make_publisher(self, app: str, timeout: float, queue_type: QueueType, observe: Observe) -> ObservedPublisher:
        self.publishers[app] = publisher = ObservedPublisher(
            app, self.broker, timeout=timeout, queue_type=queue_type, observe=observe
        )
        return publisher

    def _close_publishers(self) -> None:
        for publisher in self.publishers.values():
            publisher.close(GRACE)

    # --- workers

    async def ensure_started(self) -> None:
        """Start the workers in this event loop, unless they run already.

        Raises:
            BaseException: whatever a lifespan raised at its start.
        """
        if self.host is None:
            self.host = Host([Worker(app, lifespan=self._lifespan, grace=GRACE) for app in self.apps.all])
            await self.host.start()

    async def stop(self) -> None:
        host, self.host = self.host, None
        if host is not None:
            await host.end(self._timeout + GRACE)

    def start_in_thread(self, backend: str) -> None:
        """Start the workers in an event loop in another thread, for tests without one."""
        self._portal = self._stack.enter_context(anyio.from_thread.start_blocking_portal(backend))
        self._portal.call(self.ensure_started)

    def stop_in_thread(self) -> None:
        portal, self._portal = self._portal, None
        if portal is not None:
            portal.call(self.stop)
