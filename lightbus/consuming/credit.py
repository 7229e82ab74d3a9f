"""How many events a consumer may hold: about a second's work, and no more bytes than there is room for. Pure.

A prefetch of 200 gives a burst of slow jobs to the worker that comes first. So a subscription begins with one event,
and grows with what its handlers are seen to settle; `consumer.Consumer` measures and acts.

- Events settled in a second, as measured: so many may be held.
- RabbitMQ returns what is on its way to a consumer that is cancelled, out of order, and counts that towards the
  delivery limit. So a consumer is replaced only while it holds all that it may: then nothing is on its way.
- As many as there are handlers that may run at once, in small steps, while none has ended: two workers that begin
  together get about the same number of long jobs.
- Of large bodies, as many as fit into half of the budget.
"""

from __future__ import annotations

import math
import time

HORIZON = 1.0
"""Seconds of work that a consumer may hold."""
PERIOD = 0.25
"""Seconds of work that are measured at least, unless there is nothing left to do, or much is done, before."""
PACE = 0.025
"""Seconds between two changes of the prefetch: each costs the broker and the connection's thread three requests."""
STEP = 4
"""Events by which it grows while no handler has ended yet (an eighth, where that is more)."""
BUDGET = 64 * 1024 * 1024
"""Bytes of large bodies that a worker process holds, all its queues together. Half of it is planned with; what arrives
above all of it, before the broker knows, is returned to its queue."""
REMEMBERED = 60.0
"""Seconds for which a large body is expected again."""


class Credit:
    """What one queue's consumer may hold now."""

    def __init__(self, most: int, concurrency: int, budget: int = BUDGET) -> None:
        """
        Args:
            most: the prefetch that the user allows.
            concurrency: handlers that may run at once.
            budget: bytes of large bodies that may be held.
        """
        self.most = most
        self.floor = min(concurrency, most)
        self.budget = budget
        self._largest = self._largest_before = 0
        self._remembered_until = -math.inf
        self.begin(1)

    def begin(self, window: int) -> None:
        """A new subscription: one event, until more is known; or what was known before."""
        self.window = window
        """Events that may be held, whatever the size of their bodies."""
        self.given = self.limit(time.monotonic())
        """The prefetch of the present consumer. What an earlier one on the same channel holds does not count there."""
        self._changed = -math.inf
        self._patience = PERIOD
        self._since: float | None = None
        self._settled = 0

    # --- what is seen

    def arrived(self, now: float, settled: int) -> None:
        """Events were handed over, and so many were settled before."""
        if self._since is None:
            self._since, self._settled = now, settled

    def measure(self, now: float, settled: int, held: int) -> None:
        """So many were settled up to now, and so many are held."""
        if self._since is None:
            return
        count, seconds = settled - self._settled, now - self._since
        if held and seconds < PERIOD and count < 3 * self.window:
            return
        able = count / max(seconds, 1e-6) * HORIZON
        self._since, self._settled = (now if held else None), settled
        if able >= min(2 * self.window, self.most):
            self.window = max(self.window, min(self.most, int(able)))
        elif 2 * able < self.window and held > able:
            self.window = min(self.window, max(self.floor, int(able)))

    def large(self, now: float, size: int) -> None:
        """A body of so many bytes has arrived, which is a large one."""
        if now > self._remembered_until:
            self._largest_before = self._largest if now < self._remembered_until + REMEMBERED else 0
            self._largest, self._remembered_until = 0, now + REMEMBERED
        self._largest = max(self._largest, size)

    # --- what follows

    def limit(self, now: float) -> int:
        """Events that may be held, the size of their bodies considered."""
        return min(self.window, self._fitting(now))

    def _fitting(self, now: float) -> int:
        """Events for whose bodies there is room."""
        largest = max(self._largest, self._largest_before)
        if not largest:
            return self.most
        if now > self._remembered_until + REMEMBERED:
            self._largest = self._largest_before = 0
            return self.most
        return max(1, self.budget // 2 // largest)

    def unsteady(self, now: float) -> bool:
        """Whether the next events that arrive may change the prefetch, now or after a pause."""
        return self.window < self.floor or self._worthwhile(self.limit(now), self.given)

    def urgent(self, now: float) -> bool:
        """Whether the prefetch must be lowered at once, since the bodies are too large."""
        return self._fitting(now) < self.given

    def due(self, now: float, held: int) -> bool:
        """Whether the present consumer is to be replaced, as soon as it holds all that it may."""
        return now >= self._changed + PACE and self._due(now, held)

    def next_prefetch(self, now: float, held: int) -> int | None:
        """The prefetch of a consumer that is to replace the present one; None to leave it.

        To be called where the present one holds all that it may, or where it is `urgent`.
        """
        if not self.due(now, held):
            return None
        if self._growing(now, held):
            self.window = max(self.window, min(self.floor, held + max(STEP, held // 8)))
        wanted = self.limit(now)
        # What is held already does not count for a new consumer.
        self.given = max(1, min(wanted, self.most - held) if wanted < self.given else wanted - held)
        self._changed, self._patience = now, PERIOD
        return self.given

    def postpone(self, now: float) -> None:
        """There were not even as many events as the present consumer may hold: a higher prefetch would be of no use."""
        self._changed = now + self._patience
        self._patience = min(2 * self._patience, 16 * PERIOD)

    def next_look(self, now: float, held: int) -> float:
        """Seconds after which `due` is to be asked again, though nothing happens until then."""
        return max(0.0, self._changed + PACE - now) if held and self._due(now, held) else math.inf

    def _due(self, now: float, held: int) -> bool:
        wanted, present = self.limit(now), max(self.given, held)
        return self._growing(now, held) or self._worthwhile(wanted, present)

    def _worthwhile(self, wanted: int, present: int) -> bool:
        """Whether another consumer is to hold less, or may hold much more. What is held already does not count for it,
        so that it may hold less than the present one for a while: worth it only where handlers would be idle.
        """
        if wanted < self.given:
            return True
        more = present if self.given < self.floor else 5 * self.given
        return wanted - present >= max(1, more // 4)

    def _growing(self, now: float, held: int) -> bool:
        """No handler has ended for a while, and more could run: then any increase is worth it."""
        present = max(self.given, held)
        return present < min(self.floor, self._fitting(now)) and self.window < present + max(STEP, present // 4)
