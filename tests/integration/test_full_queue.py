"""A queue that is full because of a policy rejects due retries; they arrive once it accepts messages again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from lightbus import Lightbus, Retry
from lightbus.connection.declare import declare
from lightbus.transport import Publication
from tests.bus import connected, publish_confirmed, take_all
from tests.patience import wait_until
from tests.rabbitmq import Node

pytestmark = pytest.mark.rabbitmq

CONFIRM_TIMEOUT = "dead_letter_worker_publisher_confirm_timeout"
FULL, ROOMY = '{"max-length": 1}', '{"max-length": 1000000}'
DUE = 20


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node()
    (node.folder / "advanced.config").write_text(f"[{{rabbit, [{{{CONFIRM_TIMEOUT}, 1000}}]}}].")
    with node:
        yield node


def limit(node: Node, policy: str) -> None:
    node.ctl("set_policy", "limit", r"^billing\.main$", policy, "--apply-to", "queues")


def fill(node: Node) -> Lightbus:
    """An app whose queue is full, and whose retries were rejected."""
    app = Lightbus("billing", url=node.url, retry=Retry(delays=(1,)))

    @app.on("invoice.*")
    def charge() -> None: ...

    limit(node, FULL)
    with connected(app) as connection:
        declare(connection, app.topology())
    take_all(app, "billing.main")
    # The broker notifies its own publisher, too, only after the queue is full.
    for _ in range(3):
        with connected(app) as connection:
            connection.channel().publish([Publication("billing.internal", "main", b"first", {}, mandatory=False)])
            connection.channel().queue_declare("billing.main", passive=True)
    wait_until(lambda: ready(app, "billing.main") >= 1, "a full queue")
    with connected(app) as connection:
        publish_confirmed(connection, *[Publication("billing.internal", "retry.1s", b"due", {})] * DUE)
    wait_until(lambda: ready(app, "billing.retry.1s") == 0, "retries that are due")
    assert not all_due(app)
    return app


def ready(app: Lightbus, queue: str) -> int:
    with connected(app) as connection:
        return int(connection.channel().queue_declare(queue, passive=True).message_count)


def all_due(app: Lightbus) -> bool:
    """Whether all retries are in the main queue, or more."""
    return ready(app, "billing.main") >= DUE


def has_all_due(app: Lightbus, got: list[bytes]) -> bool:
    got += [delivery.body for delivery in take_all(app, "billing.main")]
    return got.count(b"due") == DUE


def test_retries_arrive_once_consumers_have_made_room(node: Node) -> None:
    app = fill(node)
    got: list[bytes] = []
    wait_until(lambda: has_all_due(app, got), "all retries")


def test_retries_arrive_once_the_limit_is_raised(node: Node) -> None:
    app = fill(node)
    limit(node, ROOMY)
    got: list[bytes] = []
    wait_until(lambda: has_all_due(app, got), "all retries")


def test_retries_arrive_once_the_policy_is_cleared_but_on_old_nodes_only_with_another_limit(node: Node) -> None:
    app = fill(node)
    node.ctl("clear_policy", "limit")
    if node.ctl("version").startswith("3.10."):
        time.sleep(3)  # three times as long as it takes RabbitMQ to try again
        assert not all_due(app)
        limit(node, ROOMY)
    got: list[bytes] = []
    wait_until(lambda: has_all_due(app, got), "all retries")


def test_rabbitmq_tries_again_after_180_seconds_by_default(rabbitmq: Node) -> None:
    assert "{ok,180000}" in rabbitmq.ctl("eval", f"application:get_env(rabbit, {CONFIRM_TIMEOUT}).")
