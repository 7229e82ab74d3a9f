"""The services of an app alone, within its lifespan: what `lightbus relay` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import anyio
import anyio.to_thread

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.service import Service
from lightbus.worker.worker import GRACE, LAST_STEPS, lifespan_of

BEAT = 1.0
"""Seconds between two signs of life of the event loop."""


class ServiceRunner:
    """Runs the services of one app within its lifespan, and consumes nothing."""

    noun = "relay"
    """For the log."""

    def __init__(self, app: Lightbus, *, grace: float = GRACE) -> None:
        self.app = app
        self.grace = grace
        """Seconds that the services get to finish."""
        self.started = False
        self.unfinished: list[str] | None = None
        """The services that were still running at the end of the grace period. None until they have ended."""
        self.beat: float | None = None
        """When the event loop last ran, on the monotonic clock."""
        self._running: list[str] = []

    async def serve(self, stop: anyio.Event, on_started: Callable[[], object] | None = None) -> bool:
        """Run the services until `stop` is set, then let them finish.

        Returns:
            Whether all of them finished within `grace`.

        Raises:
            Exception: what a service or the lifespan has raised.
        """
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._stop_early, stop, tasks.cancel_scope)
                tasks.start_soon(self._beat)
                async with lifespan_of(self.app):
                    await self._run(stop, on_started)
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise errors.without_groups(group) from None
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self.app.publisher.close, LAST_STEPS / 2)
        return not self.unfinished

    async def _run(self, stop: anyio.Event, on_started: Callable[[], object] | None) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                for service in self.app.services:
                    self._running.append(service.name)
                    tasks.start_soon(self._run_one, service, stop, name=service.name)
                self.started = True
                if on_started is not None:
                    on_started()
                await stop.wait()
                tasks.cancel_scope.deadline = anyio.current_time() + self.grace
        except BaseExceptionGroup as group:
            raise errors.without_groups(group) from None
        self.unfinished = [*self._running]

    async def _run_one(self, service: Service, stop: anyio.Event) -> None:
        await service.run(stop)
        self._running.remove(service.name)

    async def _stop_early(self, stop: anyio.Event, starting: anyio.CancelScope) -> None:
        await stop.wait()
        if not self.started:
            self.unfinished = []
            starting.cancel()

    async def _beat(self) -> None:
        while True:
            self.beat = time.monotonic()
            await anyio.sleep(BEAT)

    # --- what the process reports

    def pending(self) -> str:
        return "sending what is left" if self.started else ""

    def in_flight(self) -> list[str]:
        """The names of the running services."""
        return [*self._running]

    def left_behind(self) -> list[str]:
        return []

    def consequence(self, unfinished: Sequence[str]) -> str:
        """The same for any of them."""
        return "What was not sent stays in the outbox."
