"""The values of one process, in prometheus_client's own value class: in memory, or in a file for several processes."""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import Metric, values
from prometheus_client.utils import floatToGoString

from lightbus.telemetry.families import FAMILIES, Family

Value = Any
"""prometheus_client's: `inc(amount)`, `set(value, timestamp)`, `get()`."""


class Histogram:
    """One series of a histogram. An observation costs a third of one of prometheus_client's, since it is added to the
    values in files only with the next `flush`.
    """

    def __init__(self, family: Family, labels: tuple[str, ...]) -> None:
        self._bounds = family.bounds
        self._counts = [0] * (len(family.bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()
        names = (*family.labels, "le")
        self.uppers = [_written(bound) for bound in (*family.bounds, float("inf"))]
        self._buckets = [_value(family, "_bucket", names, (*labels, upper)) for upper in self.uppers]
        self._total = _value(family, "_sum", family.labels, labels)

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, seconds)] += 1
            self._sum += seconds

    def observe_all(self, seconds: Sequence[float]) -> None:
        """Costs an eighth of `observe` for each of them, if there are many."""
        values = sorted(seconds)
        below = [*(bisect_right(values, bound) for bound in self._bounds), len(values)]
        with self._lock:
            for number, count in enumerate(below):
                self._counts[number] += count - (below[number - 1] if number else 0)
            self._sum += sum(values)

    def flush(self) -> None:
        with self._lock:
            counts, self._counts = self._counts, [0] * len(self._counts)
            seconds, self._sum = self._sum, 0.0
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        if seconds:
            self._total.inc(seconds)

    def renew_lock(self) -> None:
        self._lock = threading.Lock()

    def forget(self) -> None:
        """In a forked child: what is not flushed belongs to the parent."""
        self._counts, self._sum = [0] * len(self._counts), 0.0

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """(cumulative counts by upper bound, sum)."""
        total, counts = 0.0, []
        for upper, bucket in zip(self.uppers, self._buckets, strict=True):
            total += bucket.get()
            counts.append((upper, total))
        return counts, self._total.get()


MOST_WAITING = 1000
"""The caller that appends to a `Tally` calls its `flush` when so many wait."""


class Tally:
    """Counts what happens very often, and how long it took. `flush` adds up what is in `waiting`: an append needs no
    lock. With its part of the flush, it costs a seventh of what the counter and the histogram do.
    """

    def __init__(self, counter: Value | None, histogram: Histogram | None) -> None:
        """
        Args:
            counter: None if it is counted elsewhere.
            histogram: None if only the number matters.
        """
        self._counter, self._histogram = counter, histogram
        self.waiting: deque[float] = deque()
        """Seconds."""

    def flush(self) -> None:
        """From any thread."""
        waiting, taken = self.waiting, list[float]()
        with contextlib.suppress(IndexError):  # another thread does the same
            for _ in range(len(waiting)):
                taken.append(waiting.popleft())
        if not taken:
            return
        if self._counter is not None:
            self._counter.inc(len(taken))
        if self._histogram is not None:
            self._histogram.observe_all(taken)


class Series:
    """All series of a process, for one registry."""

    def __init__(self) -> None:
        self._values: dict[Family, dict[tuple[str, ...], Value]] = {family: {} for family in FAMILIES}
        self._histograms: dict[Family, dict[tuple[str, ...], Histogram]] = {family: {} for family in FAMILIES}
        self._tallies: list[Tally] = []
        self._lock = threading.Lock()

    def value(self, family: Family, *labels: str) -> Value:
        """A counter or a gauge; made by the first call."""
        found = self._values[family].get(labels)
        if found is None:
            with self._lock:
                found = self._values[family].get(labels)
                if found is None:
                    found = self._values[family][labels] = _value(family, "", family.labels, labels)
        return found

    def histogram(self, family: Family, *labels: str) -> Histogram:
        with self._lock:
            found = self._histograms[family].get(labels)
            if found is None:
                found = self._histograms[family][labels] = Histogram(family, labels)
        return found

    def tally(self, counter: Value | None, histogram: Histogram | None) -> Tally:
        made = Tally(counter, histogram)
        self._tallies.append(made)
        return made

    def flush(self) -> None:
        for tally in self._tallies.copy():
            tally.flush()
        for histogram in self._all_histograms():
            histogram.flush()

    def renew_locks(self) -> None:
        """In a forked child: another thread of the parent may have held one."""
        self._lock = threading.Lock()
        for histogram in self._all_histograms():
            histogram.renew_lock()

    def forget(self) -> None:
        """In a forked child: what is not flushed belongs to the parent."""
        self._tallies.clear()
        for histogram in self._all_histograms():
            histogram.forget()

    def _all_histograms(self) -> list[Histogram]:
        with self._lock:
            return [one for series in self._histograms.values() for one in series.values()]

    def metrics(self, more: Iterable[tuple[Family, tuple[str, ...], float]] = ()) -> list[Metric]:
        """For an exposition, with the samples that are not kept here."""
        found: dict[Family, Metric] = {}
        with self._lock:
            values = [
                (family, labels, one.get()) for family in FAMILIES for labels, one in self._values[family].items()
            ]
            histograms = [(family, *one) for family in FAMILIES for one in self._histograms[family].items()]
        for family, labels, value in (*values, *more):
            _metric(found, family).add_sample(family.name, dict(zip(family.labels, labels, strict=True)), value)
        for family, labels, histogram in histograms:
            metric, named = _metric(found, family), dict(zip(family.labels, labels, strict=True))
            counts, total = histogram.read()
            for upper, count in counts:
                metric.add_sample(f"{family.name}_bucket", {**named, "le": upper}, count)
            metric.add_sample(f"{family.name}_count", named, counts[-1][1])
            metric.add_sample(f"{family.name}_sum", named, total)
        return [found[family] for family in FAMILIES if family in found]


def _metric(found: dict[Family, Metric], family: Family) -> Metric:
    if family not in found:
        found[family] = describe(family)
    return found[family]


def _written(bound: float) -> str:
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    return text


def describe(family: Family) -> Metric:
    return Metric(family.name.removesuffix("_total"), family.help, family.kind)


def _value(family: Family, suffix: str, names: tuple[str, ...], labels: tuple[str, ...]) -> Value:
    base = family.name.removesuffix("_total")
    make: Any = values.ValueClass
    return make(family.kind, base, family.name + suffix, names, labels, family.help, multiprocess_mode=family.mode)
