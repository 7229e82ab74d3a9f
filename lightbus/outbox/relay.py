"""The relay: sends the rows of an outbox, and deletes each once the broker has confirmed it.

It sends a batch within the transaction in which it has claimed the rows. If it is killed at any point, the transaction
ends without a trace, and the next relay sends the batch again, with the same message ids. So an event is sent at least
once; an `Inbox` removes the duplicates.

The order in which transactions commit is not the order of their ids. So no id is a mark up to which all was sent: the
relay reads from the beginning, again and again (a sweep). In between it may read on where it was: PostgreSQL keeps
deleted rows as long as any transaction is older than the deletion, and reading past many of them takes long.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.message import Receipt
from lightbus.outbox.rows import Row, free_name
from lightbus.outbox.store import Depth, PerLoop, Refused, Store, health
from lightbus.transport import Publication

logger = logging.getLogger("lightbus")

BATCH = 500
"""Rows in one transaction."""
POLL = 0.5
"""Seconds between two looks, where the database does not notify; and the longest that a notification may be late."""
SHARE = 0.05
"""Share of the time, at most, for sweeps, and for measuring the depth."""
FIRST_BACKOFF, LAST_BACKOFF = 0.5, 30.0
"""Seconds until the next try, doubled each time, while the broker or the database does not answer."""
LAST_RETRY = 60.0
"""Seconds between two tries of an event that the broker refuses for now (a full queue)."""
MEASURE = 10.0
"""Seconds between two measurements of the depth."""
PUBLISH_TIMEOUT = 20.0
"""Seconds, at most, for the confirms of a batch: less than `store.LEASE`."""
SETTLE = 30.0
"""Seconds, at most, until the database has noted what was sent. With PUBLISH_TIMEOUT, less than `store.LEASE`."""
REPEAT = 10.0
"""Seconds between two log records about the same trouble."""

_TROUBLE = (errors.PublishTimeout, errors.PublisherRefused, errors.PublisherClosed)
"""It is not the event that could not be sent: all stay in the outbox."""


class Relay:
    """Sends the rows of one outbox. A `Service`: workers run it beside their handlers."""

    def __init__(self, app: Lightbus, store: Store, *, batch: int = BATCH, poll: float = POLL) -> None:
        self.app = app
        self.store = store
        self.name = free_name(app, "outbox")
        self.sent = 0
        """Rows that this relay has sent."""
        self.depth: Depth | None = None
        """As last measured."""
        self.trouble: str | None = None
        """Why nothing can be sent now."""
        self._batch = batch
        self._poll = poll
        self._last = 0
        """The id of the last new row that was read."""
        self._next_sweep = 0.0
        self._swept = False
        """Whether the last read was from the beginning."""
        self._next_measurement = 0.0
        self._next_record = 0.0
        self._next_nack_record = 0.0
        self._turn = PerLoop(anyio.Lock)
        """For one batch at a time: `drain` in a test also waits for what the worker is sending."""
        self._idle: anyio.CancelScope | None = None
        self._news: anyio.Event | None = None

    def health(self) -> Mapping[str, Any]:
        """What `/readyz` shows, and what metrics read. It asks no database: the relay measures as it runs.

        - `error`: why nothing can be sent now, a string; None if it works.
        - `sent`: rows that this relay has sent since it was made.
        - `waiting`: rows that are to be sent, of all relays of this app in this database.
        - `oldest_seconds`: the age of the oldest of them, when it was measured; 0.0 if there is none.
        - `set_aside`: rows that the broker has refused for good.

        The last three are None before the first measurement. They are measured every 10 seconds; while the broker does
        not answer, after each try (at most 50 seconds apart). Counting takes 5 % of the relay's time at most: if it is
        slow, it happens less often. 1,000,000 waiting rows take 1.5 s on PostgreSQL and 1.1 s on MariaDB.
        """
        return {"error": self.trouble, "sent": self.sent, **health(self.depth)}

    # --- as a service

    async def run(self, stopping: anyio.Event) -> None:
        """Send what there is and what comes, until `stopping` is set; then what is left, without waiting for more."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen)
            tasks.start_soon(self._wake_at_end, stopping)
            backoff = FIRST_BACKOFF
            while True:
                ending = stopping.is_set()
                self._news = anyio.Event()
                more, trouble = False, None
                try:
                    try:
                        more = await self.step(sweep=ending)
                    except errors.PublishError:  # the rows grow older
                        await self._measure()
                        raise
                    await self._measure()
                except Exception as error:
                    if not self._is_temporary(error):
                        raise
                    trouble = errors.without_groups(error)
                self._note(trouble)
                if trouble is None:
                    backoff = FIRST_BACKOFF
                    if ending and not more:
                        break
                    if not more:
                        left = self._poll if self._swept else self._next_sweep - time.monotonic()
                        await self._wait(min(left, self._poll), stopping)
                elif ending:
                    break
                else:
                    await self._wait(backoff, stopping, for_news=False)
                    backoff = min(2 * backoff, LAST_BACKOFF)
            tasks.cancel_scope.cancel()

    async def drain(self) -> int:
        """Send what waits now, and return how many rows were sent: for scripts and tests.

        Where this relay also runs in a worker, or in a TestBus, it waits for the batch that is being sent there.

        Raises:
            errors.PublishError: the broker does not take them.
        """
        before = self.sent
        while await self.step(sweep=True):
            pass
        return self.sent - before

    def _is_temporary(self, error: BaseException) -> bool:
        inner = errors.members(error)
        if inner:
            return all(map(self._is_temporary, inner))
        return isinstance(error, errors.LightbusError) or self.store.is_temporary(error)

    async def _wait(self, seconds: float, stopping: anyio.Event, *, for_news: bool = True) -> None:
        if stopping.is_set():  # `_wake_at_end` has nothing to cancel yet
            return
        with anyio.move_on_after(seconds) as self._idle:
            if for_news and self._news is not None:
                await self._news.wait()
            else:
                await anyio.sleep_forever()

    async def _wake_at_end(self, stopping: anyio.Event) -> None:
        await stopping.wait()
        if self._idle is not None:
            self._idle.cancel()

    async def _listen(self) -> None:
        """Wake the relay when rows are committed. Where that is not possible, it looks every `POLL` seconds."""
        backoff = FIRST_BACKOFF
        while True:
            with contextlib.suppress(Exception):  # the database does not answer: the relay itself reports that
                async with contextlib.aclosing(self.store.notifications()) as notifications:
                    async for _ in notifications:
                        backoff = FIRST_BACKOFF
                        if self._news is not None:
                            self._news.set()
                    return
            await anyio.sleep(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF)

    def _note(self, trouble: BaseException | None) -> None:
        if trouble is None:
            if self.trouble is not None:
                logger.info("The outbox in %s is sent again.", self.store.name)
            self.trouble = None
            return
        self.trouble = self.store.describe(trouble)
        now = time.monotonic()
        if now >= self._next_record:
            self._next_record = now + REPEAT
            logger.warning(
                "The outbox in %s is not sent: %s. Its events wait. Trying again.",
                self.store.name,
                self.trouble.rstrip("."),
            )

    def _note_nack(self, row: Row, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._next_nack_record:
            self._next_nack_record = now + REPEAT
            logger.warning(
                "The broker does not take event %r (id %s) now. It waits in the outbox, and is tried again within "
                "%g s: %s",
                row.event,
                row.message_id,
                LAST_RETRY,
                error,
            )

    async def _measure(self) -> None:
        now = time.monotonic()
        if now < self._next_measurement:
            return
        self.depth = await self.store.depth()
        took = time.monotonic() - now
        self._next_measurement = now + max(MEASURE, took / SHARE)

    # --- one batch

    async def step(self, *, sweep: bool = False) -> bool:
        """Send one batch. Returns whether there was one.

        Args:
            sweep: read from the beginning, though the last sweep was a moment ago.

        Raises:
            errors.PublishError: the broker does not take them. They are still in the outbox.
        """
        async with self._turn.get():
            return await self._step(sweep)

    async def _step(self, sweep: bool) -> bool:
        began = time.monotonic()
        self._swept = sweep or began >= self._next_sweep
        async with self.store.claim(self._batch, 0 if self._swept else self._last) as batch:
            if self._swept:
                self._next_sweep = began + (time.monotonic() - began) / SHARE
            rows = batch.rows
            if not rows:
                return False
            sent, refused, trouble = await self._send(rows)
            with anyio.fail_after(SETTLE, shield=True):  # cancelled, all that was confirmed would be sent again
                await batch.settle(sent, refused)
        self._last = max((row.id for row in rows if not row.attempts), default=self._last)
        self.sent += len(sent)
        if trouble is not None:
            self._next_sweep = 0.0
            raise trouble
        return True

    async def _send(self, rows: Sequence[Row]) -> tuple[list[int], dict[int, Refused], Exception | None]:
        """What was sent, what was refused, and why the others were not sent."""
        sent: list[int] = []
        refused: dict[int, Refused] = {}
        trouble: Exception | None = None
        for row, outcome in await self._publish(rows, refused):
            match outcome:
                case Receipt():
                    sent.append(row.id)
                case Exception() if isinstance(outcome, _TROUBLE):
                    trouble = outcome
                case errors.PublishRefused():
                    refused[row.id] = _set_aside(row, f"The broker refuses it: {outcome}")
                case _:  # PublishNacked
                    wait = min(LAST_RETRY, 2.0 ** min(row.attempts, 10))
                    refused[row.id] = Refused(str(outcome), time.time() + wait)
                    self._note_nack(row, outcome)
        return sent, refused, trouble

    async def _publish(self, rows: Sequence[Row], refused: dict[int, Refused]) -> list[tuple[Row, Receipt | Exception]]:
        at_once: list[tuple[Row, Publication]] = []
        later: list[tuple[Row, Publication, int]] = []
        for row in rows:
            try:
                publication, level = row.publication()
            except ValueError as error:  # not written by this version of Lightbus
                refused[row.id] = _set_aside(row, f"Row {row.id} cannot be sent: {error}")
                continue
            if level is None:
                at_once.append((row, publication))
            else:
                later.append((row, publication, level))
        timeout = min(PUBLISH_TIMEOUT, self.app.publish_timeout)
        outcomes: list[tuple[Row, Receipt | Exception]] = []

        async def publish_later(row: Row, publication: Publication, level: int) -> None:
            try:
                outcomes.append(
                    (row, await self.app.publisher.publish(publication, timeout=timeout, delay_level=level))
                )
            except errors.PublishError as error:
                outcomes.append((row, error))

        async with anyio.create_task_group() as tasks:
            for one in later:
                tasks.start_soon(publish_later, *one)
            if at_once:
                results: Sequence[Receipt | Exception]
                try:
                    results = await self.app.publisher.publish_many([one for _, one in at_once], timeout=timeout)
                except errors.PublishManyError as error:
                    results = error.outcomes
                except errors.PublishError as error:
                    results = [error] * len(at_once)
                outcomes += zip([row for row, _ in at_once], results, strict=True)
        return outcomes


def _set_aside(row: Row, why: str) -> Refused:
    logger.error(
        "Event %r (id %s) is set aside in the outbox. %s Next: lightbus outbox list.", row.event, row.message_id, why
    )
    return Refused(why, None)
