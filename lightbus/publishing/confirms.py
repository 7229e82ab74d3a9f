"""The window of unconfirmed messages: what may be sent next, and which message a confirm, a return or a refusal is for.

Pure: no threads, no sockets, no clock. `connection` holds a lock around `take`, `put_back` and `take_back`, sends what
`take` returns, and passes on what the broker answers.

A signal handler may raise between any two instructions. So `take` and `put_back` leave every message in at least one of
`waiting`, `taken` and `unconfirmed`, and `take_back` collects them again. A message whose confirm is interrupted may be
in none of them: then its caller gets a `PublishTimeout`, which says that the outcome is unknown.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence

import amqp.exceptions
import attrs

from lightbus import errors
from lightbus.connection.loop_reader import Loop, Waiter
from lightbus.transport import Publication

WINDOW = 1000
"""Unconfirmed messages at most: enough to hide the round trip, few enough to publish again after a fault."""
NOT_DELAYED = -1

# The broker closed the channel or connection because of what it received, not because of its own state.
_REFUSALS = (311, 403, 404, 405, 406, 501, 502, 503, 504, 505, 530, 540, 541)
# Of these, the broker's own state may still be the cause, so the first time does not count.
_UNCERTAIN = (404, 541)
_TOO_LARGE = re.compile(r"message size \d+ is larger than configured max size (\d+)")


class PendingPublish:
    """A message without an outcome yet, and the caller that waits for it."""

    __slots__ = (
        "abandoned",
        "delay_level",
        "error",
        "lock",
        "loop",
        "publication",
        "refused_once",
        "returned",
        "sent",
        "waiter",
    )

    def __init__(
        self,
        publication: Publication,
        delay_level: int | None = None,
        *,
        loop: Loop | None = None,
        waiter: Waiter | None = None,
        lock: threading.Lock | None = None,
    ) -> None:
        """
        Args:
            delay_level: the highest level of delayed publishing that must be declared before it is sent.
            loop, waiter: the caller is a task of this event loop, and waits with this.
            lock: the caller is a thread, and waits until this lock, which is held, is released.
        """
        self.publication = publication
        self.delay_level = NOT_DELAYED if delay_level is None else delay_level
        self.loop = loop
        self.waiter = waiter
        self.lock = lock
        self.sent = False
        self.returned = False
        """No queue has received it."""
        self.abandoned = False
        """No caller waits for it: do not send it (again)."""
        self.refused_once = False
        """The broker refused it alone, for a reason that the next attempt may not meet: its exchange was missing."""
        self.error: errors.PublishError | None = None

    def __str__(self) -> str:
        publication = self.publication
        name = publication.properties.get("type") or publication.routing_key
        return f"event {name!r} ({publication.properties['message_id']})"


@attrs.frozen
class Refusal:
    """The broker closed a channel or a connection because of a message; it does not tell which one."""

    size_limit: int | None = None
    """Bodies over this many bytes are refused, where the broker gives a limit."""
    uncertain: bool = False
    """The broker's own state may be the cause: another attempt may succeed."""

    @classmethod
    def of(cls, error: BaseException) -> Refusal | None:
        """None: the error is not about a message."""
        if not isinstance(error, amqp.exceptions.AMQPError) or error.code not in _REFUSALS:
            return None
        too_large = _TOO_LARGE.search(str(error))
        return cls(int(too_large[1]) if too_large else None, error.code in _UNCERTAIN)


class ConfirmWindow:
    """All messages of a publisher that have no outcome yet, in order."""

    def __init__(self, size: int = WINDOW) -> None:
        self.size = size
        self.waiting: deque[PendingPublish] = deque()
        """Not sent yet, or to be sent again. Any thread appends to it."""
        self.taken: list[PendingPublish] = []
        """No longer in `waiting`, and perhaps not in `unconfirmed` yet: not empty only while `take` runs, or after a
        signal handler interrupted it."""
        self.unconfirmed: dict[int, PendingPublish] = {}
        """Taken to be sent, by delivery tag. Tags are in ascending order."""
        self.finished: list[PendingPublish] = []
        """Those with an outcome that their callers do not know yet."""
        self.one_by_one = 0
        """So many messages are sent one at a time: one of them is refused, and it is not known which."""
        self.declared_delay_level = NOT_DELAYED
        self.wanted_delay_level = NOT_DELAYED
        """Higher than the declared one: a message waits for it to be declared."""
        self._next_tag = 1
        self._by_id: dict[str, PendingPublish] = {}
        """The sent ones, since a return names its message by id only."""

    @property
    def busy(self) -> bool:
        """Whether a caller waits for an outcome. From any thread."""
        # Messages move from the first to the last, or back to the first: look in that order, and there again, or one
        # could be missed in between.
        return any(
            not pending.abandoned
            for messages in (self.waiting, self.taken, self.unconfirmed.copy().values(), self.finished, self.waiting)
            for pending in list(messages)
        )

    @property
    def full(self) -> bool:
        return len(self.unconfirmed) >= self.size

    @property
    def stuck(self) -> bool:
        """Whether it is full and the oldest message was abandoned: confirms no longer arrive."""
        return self.full and next(iter(self.unconfirmed.values())).abandoned

    # --- a caller stops waiting

    def abandon(self, pending: PendingPublish) -> None:
        """Its caller no longer waits: do not send it, nor send it again if it is unconfirmed."""
        pending.abandoned = True
        self.withdraw(pending)

    def withdraw(self, pending: PendingPublish) -> bool:
        """Remove it if it is waiting: what an outage stops must not pile up. Returns whether it was."""
        try:
            self.waiting.remove(pending)
        except ValueError:
            return False
        return True

    # --- sending

    def take(self, most: int) -> list[PendingPublish]:
        """Take up to `most` messages that may be sent now, each with its tag."""
        size = 1 if self.one_by_one else self.size
        waiting, unconfirmed, taken = self.waiting, self.unconfirmed, self.taken
        batch: list[PendingPublish] = []
        # A return names its message by id only, so two with one id (as copies for retries have) are not sent together.
        held: list[PendingPublish] = []
        while (room := min(size - len(unconfirmed), most - len(batch), len(waiting))) > 0:
            first = len(taken)
            # In one call: between two, a signal handler may raise, and what was removed would be lost.
            try:
                taken.extend(itertools.islice(iter(waiting.popleft, None), room))
            except IndexError as error:  # one was withdrawn meanwhile
                if errors.is_from_deeper(error):
                    raise
            for pending in taken[first:]:
                if pending.abandoned:
                    self.one_by_one = max(0, self.one_by_one - 1)
                    continue
                message_id = pending.publication.properties["message_id"]
                twin = self._by_id.get(message_id)
                if pending.delay_level > self.wanted_delay_level:
                    self.wanted_delay_level = pending.delay_level
                if pending.delay_level > self.declared_delay_level or (twin is not None and not twin.abandoned):
                    held.append(pending)
                    continue
                unconfirmed[self._next_tag] = pending
                self._next_tag += 1
                pending.sent = True
                self._by_id[message_id] = pending
                batch.append(pending)
        waiting.extendleft(reversed(held))
        taken.clear()
        return batch

    def put_back(self, batch: Sequence[PendingPublish]) -> None:
        """Undo the last `take`: nothing of it was sent."""
        for pending in reversed(batch):
            self._next_tag -= 1
            del self.unconfirmed[self._next_tag]
            del self._by_id[pending.publication.properties["message_id"]]
            pending.sent = False
            self.waiting.appendleft(pending)

    # --- what the broker answers

    def ack(self, tag: int, multiple: bool) -> None:
        self._finish(self._confirmed(tag, multiple))

    def nack(self, tag: int, multiple: bool, look: str = "") -> None:
        """
        Args:
            look: where an operator finds the cause.
        """
        confirmed = self._confirmed(tag, multiple)
        for pending in confirmed:
            pending.error = errors.PublishNacked(
                f"event {pending.publication.routing_key!r} ({pending.publication.properties['message_id']}): the "
                "broker refused it: a bound queue is full, or has no quorum of its nodes. Other queues may have "
                "received it. Publish it again later (the same event, a new id){look and f'; {look}'}."
            )
        self._finish(confirmed)

    def mark_returned(self, message_id: str) -> None:
        """No queue has received it. The broker sends its ack afterwards."""
        pending = self._by_id.get(message_id)
        if pending is not None:
            pending.returned = True

    def refuse(self, pending: PendingPublish, error: errors.PublishError) -> None:
        """It fails with this error. It is neither waiting nor unconfirmed."""
        pending.error = error
        self._finish((pending,))

    def _confirmed(self, tag: int, multiple: bool) -> Sequence[PendingPublish]:
        unconfirmed = self.unconfirmed
        if not multiple:
            pending = unconfirmed.pop(tag, None)
            return () if pending is None else (pending,)
        confirmed = []
        for first in list(unconfirmed):
            if first > tag:
                break
            confirmed.append(unconfirmed.pop(first))
        return confirmed

    def _finish(self, messages: Sequence[PendingPublish]) -> None:
        by_id = self._by_id
        for pending in messages:
            message_id = pending.publication.properties["message_id"]
            if by_id.get(message_id) is pending:
                del by_id[message_id]
            if self.one_by_one:
                self.one_by_one -= 1
            self.finished.append(pending)

    # --- a channel ends

    def begin_channel(self) -> None:
        """Sending goes on on a new channel, which counts tags from 1."""
        self._next_tag = 1
        self._by_id = {}

    def begin_connection(self) -> None:
        """The same on a new connection, perhaps to another broker: levels of delay have to be declared again."""
        self.begin_channel()
        self.declared_delay_level = self.wanted_delay_level = NOT_DELAYED

    def take_back(self, refusal: Refusal | None) -> tuple[int, list[PendingPublish]]:
        """The channel has ended: what is unconfirmed is to be sent again, unless it was abandoned or refused.

        Args:
            refusal: the broker ended it because of a message.

        Returns:
            How many will be sent again, and the refused ones, for which the caller calls `refuse`. If it is not known
            which one was refused, all are sent again one at a time, so that it is alone when it is refused again.
        """
        unconfirmed = list(self.unconfirmed.values())
        if self.taken:  # a signal handler interrupted `take`
            known = {*map(id, unconfirmed), *map(id, self.waiting)}
            unconfirmed += [pending for pending in self.taken if id(pending) not in known]
        refused = [] if refusal is None else self._refused(refusal, unconfirmed)
        again = [pending for pending in unconfirmed if not pending.abandoned and pending not in refused]
        for pending in again:
            pending.returned = False
        self.waiting.extendleft(reversed(again))
        self.taken.clear()  # after that: `busy`, in another thread, finds each message somewhere
        self.unconfirmed.clear()
        return len(again), refused

    def _refused(self, refusal: Refusal, unconfirmed: Sequence[PendingPublish]) -> list[PendingPublish]:
        limit = refusal.size_limit
        if limit is not None:
            return [pending for pending in unconfirmed if len(pending.publication.body) > limit]
        if len(unconfirmed) != 1:
            self.one_by_one = sum(not pending.abandoned for pending in unconfirmed)
            return []
        (alone,) = unconfirmed
        if refusal.uncertain and not alone.refused_once:
            alone.refused_once = True
            self.one_by_one = 1
            return []
        return [alone]

    def fail_delayed(self, new_error: Callable[[], errors.PublishError]) -> None:
        """The wanted level of delay cannot be declared: fail what waits for it."""
        self.wanted_delay_level = self.declared_delay_level
        for pending in list(self.waiting):
            if pending.delay_level > self.declared_delay_level and self.withdraw(pending):
                self.refuse(pending, new_error())

    def fail_all(self, new_error: Callable[[], errors.PublishError]) -> None:
        """Fail every message that has no outcome. `new_error` makes an error for each."""
        stopped = [pending for pending in list(self.waiting) if self.withdraw(pending)]
        stopped += self.unconfirmed.values()
        self.unconfirmed.clear()
        self.one_by_one = 0
        for pending in stopped:
            pending.error = new_error()
        self.finished += stopped
