"""Which acks to send: contiguous delivery tags are settled with one `multiple` ack. Pure."""

from __future__ import annotations

from collections.abc import Iterable


class Settlements:
    """The settled and unsettled deliveries of one channel.

    `basic.ack(tag, multiple)` must name a tag that is itself unsettled on the broker, else the channel is closed
    (406 unknown delivery tag). So what was acked one by one is remembered until the tags below it are settled too.
    """

    def __init__(self, hold: int) -> None:
        """
        Args:
            hold: so many out-of-order acks at most wait for the tags before them; more are sent one by one.
        """
        self.hold = hold
        self._first_unsettled = 1
        self._done: set[int] = set()
        self._sent: set[int] = set()

    def settle(self, tags: Iterable[int]) -> None:
        """These deliveries are done: an ack may be sent."""
        self._done.update(tags)

    def already_sent(self, tag: int) -> None:
        """This one was settled on the broker by other means (a reject)."""
        self._sent.add(tag)

    @property
    def waiting(self) -> int:
        return len(self._done)

    @property
    def sent(self) -> int:
        """How many deliveries are settled on the broker."""
        return self._first_unsettled - 1 + len(self._sent)

    def sent_after(self, tag: int) -> int:
        """How many of the deliveries after this one are settled on the broker."""
        in_order = max(0, self._first_unsettled - 1 - tag)
        return in_order + sum(sent > tag for sent in self._sent)

    def take(self, *, all_of_them: bool = False) -> list[tuple[int, bool]]:
        """The acks to send now, as (delivery tag, multiple)."""
        acks: list[tuple[int, bool]] = []
        last = None
        count = 0
        tag = self._first_unsettled
        done, sent = self._done, self._sent
        while True:
            if tag in done:
                done.discard(tag)
                last = tag
                count += 1
            elif tag in sent:
                sent.discard(tag)
            else:
                break
            tag += 1
        self._first_unsettled = tag
        if last is not None:
            acks.append((last, count > 1))
        if done and (all_of_them or len(done) > self.hold):
            acks += [(late, False) for late in sorted(done)]
            sent |= done
            done.clear()
        return acks
