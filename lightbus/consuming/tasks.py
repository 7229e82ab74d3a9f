"""The tasks in which a worker's handlers run, of all its queues: started here, counted, and ended in good order."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import anyio
import anyio.abc

from lightbus.connection.loop_reader import current_loop
from lightbus.consuming.coroutines import cancel_requests, context_of_callbacks
from lightbus.wire import codec

LAST_COPIES = 2.0
"""Seconds that copies of failed events which are on their way get to be confirmed, when the worker is cancelled."""


class HandlerTasks:
    """One worker's tasks and how far their end has come. Owned by the event loop; made in it."""

    def __init__(self, app: str, group: anyio.abc.TaskGroup) -> None:
        self.group = group
        self.context = context_of_callbacks()
        """Handlers see what the worker's lifespan has set."""
        self.context.run(codec.current_app.set, app)
        self.running = 0
        self.stopping = False
        """No further handler is started."""
        self.over = False
        """Handlers are being cancelled with the worker: what they had in hand is delivered again."""
        self.ended = anyio.Event()
        """The worker has stopped waiting for handlers."""
        self._idle = anyio.Event()
        self._deciding: set[anyio.CancelScope] = set()
        self._soon_from_thread = current_loop().soon_from_thread
        self._cancelled = cancel_requests()
        self._cancelled_before = self._cancelled()

    def start(self, function: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Start one more task, which calls `one_less` at its end."""
        self.running += 1
        self.group.start_soon(function)

    def one_less(self) -> None:
        self.running -= 1
        if self.stopping and not self.running:
            self._idle.set()

    def from_thread(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function soon in the event loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: what was in hand is delivered again
            self._soon_from_thread(self.context.run, function, *arguments)

    def ends(self) -> bool:
        """Whether the worker itself is being cancelled. Ask outside of a slot's own scope."""
        return (
            self.over
            or self._cancelled() > self._cancelled_before  # asyncio cancels all tasks: this one notices first
            or anyio.current_effective_deadline() == -math.inf
        )

    @contextlib.contextmanager
    def deciding(self) -> Generator[None]:
        """Shields a decision. Where the worker is cancelled meanwhile, a copy that is on its way may still be
        confirmed: else the event would come twice.
        """
        with anyio.CancelScope(shield=True) as scope:
            self._deciding.add(scope)
            try:
                yield
            finally:
                self._deciding.discard(scope)

    async def wait_until_idle(self, deadline: float) -> bool:
        """After `stopping`: wait until all handlers have ended, or until the deadline. Returns whether they have."""
        if not self.running:
            self._idle.set()
        with anyio.CancelScope(deadline=deadline):
            await self._idle.wait()
        return not self.running

    def let_go(self) -> None:
        """The worker ends now. Nothing more is decided, except for failures whose copies are on their way."""
        self.stopping = self.over = True
        for scope in self._deciding:
            scope.deadline = anyio.current_time() + LAST_COPIES
