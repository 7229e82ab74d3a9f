"""From runs to figures: medians, ratios paired by round, targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import attrs

METRICS: dict[str, tuple[str, bool]] = {
    "rate": ("events/s", True),
    "cpu_us": ("CPU per event, us", False),
    "added_us": ("added, us", False),
    "p50_ms": ("p50, ms", False),
    "p99_ms": ("p99, ms", False),
    "seconds": ("seconds", False),
    "milliseconds": ("ms", False),
    "cpu_ms": ("CPU, ms", False),
    "rss_mb": ("MB", False),
    "statements": ("statements per event", False),
}
"""Metrics with their heading, and whether higher is better."""


def summarise(case: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each contestant (and group, and part of a run): median, min, max and ratio of each metric.

    A ratio is how many times better the baseline (Lightbus) was in the same round: more events/s, or less CPU.
    """
    runs = case["runs"]
    keys: list[tuple[str, str, str]] = []
    for run in runs:
        for part in run.get("parts") or {"": {}}:
            key = (run["label"], run["group"], part)
            if key not in keys:
                keys.append(key)
    # If a contestant failed in one round, its parts come from another round.
    keys = [key for key in keys if key[2] or not any(key[:2] == other[:2] and other[2] for other in keys)]
    return [_line(case, runs, *key) for key in keys]


def _line(case: dict[str, Any], runs: list[dict[str, Any]], label: str, group: str, part: str) -> dict[str, Any]:
    mine = [run for run in runs if (run["label"], run["group"]) == (label, group)]
    line: dict[str, Any] = {"label": label, "group": group, "part": part, "lacks": mine[0]["lacks"], "metrics": {}}
    line["errors"] = [run["error"] for run in mine if run.get("error")]
    base = {run["round"]: run for run in runs if (run["label"], run["group"]) == (case["baseline"], group)}
    for metric, (_, more_is_better) in METRICS.items():
        values = {run["round"]: run["parts"][part][metric] for run in mine if metric in _part(run, part)}
        if not values:
            continue
        ratios = []
        for number, value in values.items():
            other = _part(base.get(number, {}), part).get(metric)
            if other and value:
                ratios.append(other / value if more_is_better else value / other)
        line["metrics"][metric] = {
            "median": statistics.median(values.values()),
            "min": min(values.values()),
            "max": max(values.values()),
            "rounds": len(values),
            "ratio": statistics.median(ratios) if ratios else None,
        }
    return line


def _part(run: dict[str, Any], part: str) -> dict[str, Any]:
    found: dict[str, Any] = (run.get("parts") or {}).get(part, {})
    return found


# --- targets ----------------------------------------------------------------------------------

Lookup = Callable[[str, str, str], list[float]]


@attrs.frozen
class Target:
    what: str
    goal: str
    case: str
    measured: Callable[[dict[str, list[dict[str, Any]]]], tuple[float, bool] | None]
    unit: str = "x"


def _ratios(case: str, metric: str, *labels: str, group: str = "", part: str = "") -> Callable[..., list[float]]:
    """The ratios of the lines whose label starts with one of these, so also those with the peer's own prefetch."""

    def find(summaries: dict[str, list[dict[str, Any]]]) -> list[float]:
        return [
            line["metrics"][metric]["ratio"]
            for line in summaries.get(case, [])
            if line["label"].startswith(labels)
            and line["group"] == group
            and line["part"] == part
            and line["metrics"].get(metric, {}).get("ratio")
        ]

    return find


def _at_least(times: float, find: Callable[..., list[float]]) -> Callable[..., tuple[float, bool] | None]:
    """The lowest ratio counts."""

    def measured(summaries: dict[str, list[dict[str, Any]]]) -> tuple[float, bool] | None:
        found = find(summaries)
        return (min(found), min(found) >= times) if found else None

    return measured


def _median(
    summaries: dict[str, list[dict[str, Any]]], case: str, metric: str, label: str, group: str = "", part: str = ""
) -> float | None:
    for line in summaries.get(case, []):
        if (line["label"], line["group"], line["part"]) == (label, group, part) and metric in line["metrics"]:
            return float(line["metrics"][metric]["median"])
    return None


def _below(limit: float, *where: str, **more: str) -> Callable[..., tuple[float, bool] | None]:
    def measured(summaries: dict[str, list[dict[str, Any]]]) -> tuple[float, bool] | None:
        value = _median(summaries, *where, **more)  # type: ignore[arg-type]
        return None if value is None else (value, value < limit)

    return measured


def _reader_share(own_prefetch: bool) -> Callable[..., tuple[float, bool] | None]:
    """Both ratios compare with Lightbus at the common prefetch, so their quotient is Lightbus over the reader."""

    def measured(summaries: dict[str, list[dict[str, Any]]]) -> tuple[float, bool] | None:
        reader = _ratios("consume", "rate", "the limit:")(summaries)
        own = _ratios("consume", "rate", "Lightbus, its own prefetch")(summaries) if own_prefetch else [1.0]
        if not reader or not own:
            return None
        return reader[0] / own[0], reader[0] / own[0] >= 0.6

    return measured


def _embedded(summaries: dict[str, list[dict[str, Any]]]) -> tuple[float, bool] | None:
    what = "publish and handle, two processes"
    here = _median(summaries, "embedded", "rate", what, "0 waiting")
    rabbitmq = _median(summaries, "embedded", "rate", f"on RabbitMQ: {what}", "0 waiting")
    if here is None or rabbitmq is None:
        return None
    return here, here >= 5000 * min(1.0, rabbitmq / 8000)


def _dispatch(summaries: dict[str, list[dict[str, Any]]]) -> tuple[float, bool] | None:
    found = _ratios("handlers", "cpu_us", "1,000 handlers, one class")(summaries)
    return (found[0], found[0] <= 1.3) if found else None


def _lowest_relay_rate(summaries: dict[str, list[dict[str, Any]]]) -> tuple[float, bool] | None:
    """Of `publish_many` in the same round: with every number of rows, and beside an older transaction."""
    relays = [line for line in summaries.get("outbox", []) if line["group"] == "relay" and line["label"] != MANY]
    many = _median(summaries, "outbox", "rate", MANY, "relay")
    rates = [line["metrics"]["rate"]["median"] for line in relays if "rate" in line["metrics"]]
    if many is None or not rates or len(rates) < len(relays):
        return None
    lowest = min(rates)
    return lowest, lowest >= 5000 * min(1.0, many / 15000)


def _over(
    metric: str, one: tuple[str, str, str], other: tuple[str, str, str], limit: float, *, less: bool = False
) -> Callable[..., tuple[float, bool] | None]:
    """One median over another, or less it, of lines (label, group, part) of the case `outbox`."""

    def measured(summaries: dict[str, list[dict[str, Any]]]) -> tuple[float, bool] | None:
        first, second = (_median(summaries, "outbox", metric, *line) for line in (one, other))
        if first is None or not second:
            return None
        value = first - second if less else first / second
        return value, value <= limit + 0.005

    return measured


MANY = "publish_many"
ADDED = "with outbox.add"
ONE_ORDER = "1 order per transaction"
OLDER = "beside an older transaction"

TARGETS = (
    Target(
        "consume, async handler: CPU per event, against FastStream",
        "1/12 at most",
        "consume",
        _at_least(12, _ratios("consume", "cpu_us", "FastStream")),
    ),
    Target(
        "... against bare aio-pika", "1/6 at most", "consume", _at_least(6, _ratios("consume", "cpu_us", "aio-pika"))
    ),
    Target("... against Celery", "1/6 at most", "consume", _at_least(6, _ratios("consume", "cpu_us", "Celery"))),
    Target(
        "consume: events/s, against FastStream",
        "at least 5x",
        "consume",
        _at_least(5, _ratios("consume", "rate", "FastStream")),
    ),
    Target("... against aio-pika", "at least 3x", "consume", _at_least(3, _ratios("consume", "rate", "aio-pika"))),
    Target("... against the byte reader, which does not ack", "at least 0.6x", "consume", _reader_share(False)),
    Target("... the same with its own prefetch of 200", "at least 0.6x", "consume", _reader_share(True)),
    *(
        target
        for part, limit in (("one empty middleware", 3), ("one `Depends` on an async generator", 10))
        for target in (
            Target(
                f"{part}: CPU added per event",
                f"below {limit} us",
                "consume-middleware",
                _below(limit, "consume-middleware", "added_us", "Lightbus", part=part),
                "us",
            ),
            Target(
                "... against FastStream",
                "1/10 at most",
                "consume-middleware",
                _at_least(10, _ratios("consume-middleware", "added_us", "FastStream", part=part)),
            ),
        )
    ),
    Target(
        "Prometheus metrics: CPU added per event",
        "at most 3 us",
        "telemetry",
        _below(3, "telemetry", "added_us", "Lightbus", part="Prometheus metrics"),
        "us",
    ),
    Target(
        "... against FastStream",
        "1/10 at most",
        "telemetry",
        _at_least(10, _ratios("telemetry", "added_us", "FastStream", part="Prometheus metrics")),
    ),
    Target(
        "OpenTelemetry spans: CPU added per event",
        "at most 40 us",
        "telemetry",
        _below(40, "telemetry", "added_us", "Lightbus", part="OpenTelemetry spans"),
        "us",
    ),
    Target(
        "sync handler: CPU per event, against Celery threads",
        "1/3 at most",
        "consume-sync",
        _at_least(3, _ratios("consume-sync", "cpu_us", "Celery")),
    ),
    Target(
        "... against Dramatiq",
        "1/3 at most",
        "consume-sync",
        _at_least(3, _ratios("consume-sync", "cpu_us", "Dramatiq")),
    ),
    Target(
        "publish, 500 in flight: events/s, against FastStream",
        "at least 2.5x",
        "publish-500",
        _at_least(2.5, _ratios("publish-500", "rate", "FastStream")),
    ),
    Target(
        "... CPU per event, against FastStream",
        "1/4 at most",
        "publish-500",
        _at_least(4, _ratios("publish-500", "cpu_us", "FastStream")),
    ),
    Target(
        "publish, one by one: events/s, against FastStream",
        "at least 1x",
        "publish-one",
        _at_least(1, _ratios("publish-one", "rate", "FastStream")),
    ),
    Target(
        "... against aio-pika", "at least 1x", "publish-one", _at_least(1, _ratios("publish-one", "rate", "aio-pika"))
    ),
    Target(
        "latency p50 at 200 events/s, against FastStream",
        "not above",
        "latency",
        _at_least(1, _ratios("latency", "p50_ms", "FastStream", part="200 events/s")),
    ),
    Target("import", "below 150 ms", "import", _below(150, "import", "milliseconds", "Lightbus"), "ms"),
    Target(
        "cold start to consuming", "below 0.7 s", "cold-start", _below(0.7, "cold-start", "seconds", "Lightbus"), "s"
    ),
    Target("memory at rest", "below 45 MB", "memory", _below(45, "memory", "rss_mb", "Lightbus", part="at rest"), "MB"),
    Target(
        "embedded, publish and handle across processes",
        "at least 5,000/s (proportionally less if RabbitMQ is below 8,000/s)",
        "embedded",
        _embedded,
        "/s",
    ),
    Target("1,000 handlers: dispatch, CPU per event, against one handler", "1.3x at most", "handlers", _dispatch),
    Target(
        "outbox.add, 10 orders per transaction: CPU beside the INSERT",
        "30 us at most",
        "outbox",
        _below(30, "outbox", "added_us", "10 orders per transaction", group="add", part=ADDED),
        "us",
    ),
    Target(
        "... statements added per event, 1 order per transaction",
        "1 at most",
        "outbox",
        _over("statements", (ONE_ORDER, "add", ADDED), (ONE_ORDER, "add", "the order only"), 1, less=True),
        "",
    ),
    Target(
        "relay, PostgreSQL to RabbitMQ: the lowest rate",
        "at least 5,000/s (proportionally less if publish_many is below 15,000/s)",
        "outbox",
        _lowest_relay_rate,
        "/s",
    ),
    Target(
        "... 1,000,000 rows waiting: rate of 1,000 waiting over it",
        "1.25x at most",
        "outbox",
        _over("rate", ("1,000 waiting", "relay", ""), ("1,000,000 waiting", "relay", ""), 1.25),
    ),
    Target(
        "... an older transaction: rate without dead rows over that with 200,000",
        "1.25x at most",
        "outbox",
        _over("rate", (OLDER, "relay", "no dead rows"), (OLDER, "relay", "200,000 dead rows"), 1.25),
    ),
    Target(
        "inbox: statements added per event",
        "1 at most",
        "outbox",
        _over("statements", ("inbox", "inbox", ""), ("own session", "inbox", ""), 1, less=True),
        "",
    ),
    *(
        Target(
            f"Artemis, {what}: events/s, against qpid-proton's blocking client",
            "at least 3x",
            "activemq",
            _at_least(3, _ratios("activemq", "rate", "qpid-proton", group=group)),
        )
        for group, what in (("publish", "publish, 500 in flight"), ("consume", "consume"))
    ),
)


def targets(summaries: dict[str, list[dict[str, Any]]]) -> Iterable[tuple[Target, str, str]]:
    """Each target with the measured value and the verdict."""
    for target in TARGETS:
        found = target.measured(summaries)
        if found is None:
            yield target, "-", "not measured"
            continue
        value, reached = found
        shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        if target.goal.startswith("1/"):
            shown = f"1/{value:.1f}"
            yield target, shown, "reached" if reached else "**not reached**"
        else:
            yield (
                target,
                f"{shown}{'' if target.unit in ('x', '/s', '') else ' '}{target.unit}",
                "reached" if reached else "**not reached**",
            )
