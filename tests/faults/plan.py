"""The scenarios, with the parameters of a full run and of a short run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import attrs

from tests.faults import outbox_scenarios, scenarios
from tests.faults.order_scene import OrderRow
from tests.faults.scene import Row
from tests.faults.stage import Stage

Result = Row | OrderRow
Play = Callable[[Stage], Result]


@attrs.frozen
class Planned:
    name: str
    full: Play
    short: Play | None
    """None: it takes too long for `make test`."""
    rabbitmq: bool = True
    artemis: bool = False
    postgres: bool = False


def _planned(scenario: Callable[..., Result], full: dict[str, object], short: dict[str, object] | None) -> Planned:
    fixed = "-".join(str(value) for key, value in full.items() if key in ("how", "prefetch", "workers"))
    name = f"{scenario.__name__}-{fixed}" if fixed else scenario.__name__
    quick = None if short is None else partial(scenario, **short)
    with_outbox = scenario.__module__ == outbox_scenarios.__name__
    on_artemis = full.get("broker") == "artemis"
    if with_outbox:
        name = f"outbox-{name}"
    if on_artemis:
        name = f"artemis-{name}"
    return Planned(
        name,
        partial(scenario, **full),
        quick,
        rabbitmq=not on_artemis and not scenario.__name__.startswith("embedded"),
        artemis=on_artemis,
        postgres=with_outbox,
    )


PLAN = [
    _planned(scenarios.worker_killed, {"times": 20}, {"times": 2}),
    _planned(scenarios.counting_processes_killed, {"times": 10, "events": 100_000}, {"times": 2, "events": 2000}),
    _planned(scenarios.worker_stopped, {"times": 5}, {"times": 1}),
    _planned(scenarios.serve_cancelled, {"times": 5}, {"times": 1}),
    _planned(scenarios.worker_frozen, {"times": 3}, {"times": 1}),
    _planned(scenarios.loop_blocked, {"times": 3}, {"times": 1}),
    # The queue's own limit is 20; in the short run, a policy lowers it.
    _planned(scenarios.handler_crashes, {"prefetch": 200}, {"prefetch": 200, "limit": 3}),
    _planned(scenarios.handler_crashes, {"prefetch": 200, "workers": 2}, {"prefetch": 200, "workers": 2, "limit": 6}),
    _planned(scenarios.handler_crashes, {"prefetch": 1}, None),
    _planned(scenarios.broker_killed, {"times": 5}, {"times": 1}),
    _planned(scenarios.broker_absent_at_start, {}, {}),
    _planned(scenarios.broker_away, {"seconds": 60}, {"seconds": 1}),
    _planned(scenarios.memory_alarm, {"backlog": 1000}, {"backlog": 200}),
    _planned(scenarios.queue_deleted, {"times": 5}, {"times": 1}),
    _planned(scenarios.retry_queue_deleted, {"times": 5}, {"times": 1}),
    _planned(scenarios.exchange_deleted, {"times": 5}, {"times": 1}),
    _planned(scenarios.channel_closed, {"times": 5}, {"times": 1}),
    _planned(scenarios.consumer_timeout, {"seconds": 60}, {"seconds": 2}),
    _planned(
        scenarios.publishing_refused, {"how": "new password", "events": 100}, {"how": "new password", "events": 40}
    ),
    _planned(
        scenarios.publishing_refused,
        {"how": "connection limit", "events": 100},
        {"how": "connection limit", "events": 40},
    ),
    _planned(scenarios.one_node_fails, {"how": "hangs", "times": 5}, {"how": "hangs", "times": 1}),
    _planned(scenarios.one_node_fails, {"how": "refuses", "times": 5}, {"how": "refuses", "times": 1}),
    _planned(scenarios.connection_broken, {"how": "cut", "times": 10}, {"how": "cut", "times": 1}),
    _planned(scenarios.connection_broken, {"how": "stall", "times": 3}, {"how": "stall", "times": 1}),
    _planned(scenarios.connection_broken, {"how": "truncate", "times": 10}, {"how": "truncate", "times": 2}),
    _planned(scenarios.connection_slow, {"seconds": 10}, {"seconds": 1}),
    _planned(scenarios.publishers_fork, {"events": 500}, {"events": 20}),
    _planned(scenarios.publishers_exit, {"times": 10, "events": 200}, {"times": 1, "events": 50}),
    _planned(scenarios.publishers_interrupted, {"times": 3000}, {"times": 200}),
    _planned(scenarios.strange_messages, {"times": 25}, {"times": 3}),
    _planned(scenarios.threads_publish, {"times": 3}, {"times": 1}),
    _planned(scenarios.embedded_killed, {"times": 100}, {"times": 8}),
    _planned(scenarios.embedded_handler_crashes, {"workers": 1}, {"workers": 1, "earlier": 17}),
    _planned(scenarios.embedded_handler_crashes, {"workers": 2}, {"workers": 2, "earlier": 17}),
    _planned(scenarios.embedded_disk_full, {}, {}),
    _planned(scenarios.embedded_file_unusable, {"how": "read-only"}, {"how": "read-only"}),
    _planned(scenarios.embedded_file_unusable, {"how": "corrupted"}, {"how": "corrupted"}),
    _planned(scenarios.embedded_file_unusable, {"how": "of another version"}, {"how": "of another version"}),
    *(
        _planned(scenario, {**given, "orders": 10_000}, None if short is None else {**given, **short})
        for scenario, given, short in (
            (outbox_scenarios.relay_killed, {"how": "psycopg", "times": 20}, {"times": 2, "orders": 300}),
            (outbox_scenarios.inbox_worker_killed, {"how": "psycopg", "times": 20}, {"times": 1, "orders": 300}),
            (outbox_scenarios.inbox_worker_killed, {"how": "asyncpg", "times": 20}, {"times": 1, "orders": 300}),
            (outbox_scenarios.broker_killed_with_outbox, {"times": 5}, None),
            (outbox_scenarios.database_killed, {"how": "psycopg", "times": 5}, None),
            (outbox_scenarios.database_killed, {"how": "asyncpg", "times": 5}, {"times": 1, "orders": 300}),
            (outbox_scenarios.commit_cut, {"how": "psycopg", "times": 18}, {"times": 6, "orders": 300}),
            (outbox_scenarios.commit_cut, {"how": "asyncpg", "times": 18}, None),
            (outbox_scenarios.connections_ended, {"times": 10}, None),
            (outbox_scenarios.relays_share, {"relays": 3}, {"relays": 2, "orders": 1000}),
            (outbox_scenarios.late_commit, {"times": 20}, {"times": 2, "orders": 300}),
            (outbox_scenarios.placer_killed, {"times": 20}, {"times": 2, "orders": 300}),
            (outbox_scenarios.handlers_deadlock, {"how": "psycopg"}, {"orders": 300}),
            (outbox_scenarios.claim_of_a_dead_worker, {"times": 6}, {"times": 1, "orders": 300}),
            (outbox_scenarios.clock_jumps, {"times": 12}, {"times": 2, "orders": 300}),
        )
    ),
    *(
        _planned(scenario, {**full, "broker": "artemis"}, {**short, "broker": "artemis"})
        for scenario, full, short in (
            (scenarios.worker_killed, {"times": 20, "events": 10_000}, {"times": 2}),
            (scenarios.worker_stopped, {"times": 5}, {"times": 1}),
            (scenarios.handler_crashes, {"prefetch": 200}, {"prefetch": 200, "earlier": 17}),
            (
                scenarios.handler_crashes,
                {"prefetch": 200, "workers": 2},
                {"prefetch": 200, "workers": 2, "earlier": 17},
            ),
            (scenarios.broker_killed, {"times": 5, "events": 10_000}, {"times": 1}),
            (scenarios.broker_absent_at_start, {}, {}),
            (scenarios.broker_away, {"seconds": 60}, {"seconds": 1}),
            (
                scenarios.connection_broken,
                {"how": "cut", "times": 10, "events": 10_000},
                {"how": "cut", "times": 1},
            ),
            (scenarios.connection_broken, {"how": "stall", "times": 3}, {"how": "stall", "times": 1}),
            (scenarios.connection_broken, {"how": "truncate", "times": 10}, {"how": "truncate", "times": 2}),
            (scenarios.publishers_fork, {"events": 500}, {"events": 20}),
            (scenarios.threads_publish, {"times": 3}, {"times": 1}),
            # Last: the broker has another acceptor.
            (scenarios.worker_frozen, {"times": 3}, {"times": 1}),
        )
    ),
    # Last: three nodes replace the single node.
    _planned(scenarios.cluster_nodes_killed, {"rounds": 2}, None),
]
