"""Two apps as two users of one broker, with the permissions that `lightbus topology permissions` prints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import amqp.exceptions
import anyio
import pytest

from lightbus import Lightbus, Message, Reject, Retry, errors
from lightbus.connection.declare import declare
from lightbus.transport import Channel, Publication
from lightbus.wire.topology import Topology, bus_exchange, publishing
from tests import rabbitmq as nodes
from tests.bus import (
    OrderPlaced,
    connected,
    dead_letters,
    eventually,
    publish_confirmed,
    publish_plainly,
    reason,
    running,
)
from tests.processes import Program, lightbus

pytestmark = [pytest.mark.rabbitmq, pytest.mark.anyio]

PASSWORD = "s3cr3t"

BUS = """\
from lightbus import Lightbus

shop = Lightbus("shop")
billing = Lightbus("billing")

@billing.on("order.*", source="shop")
async def handle(order: dict): ...

@billing.on("order.*", source="shop", queue="slow")
async def handle_slowly(order: dict): ...
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bus.py").write_text(BUS)
    return tmp_path


class Users:
    """A virtual host with a user for `shop` and one for `billing`."""

    def __init__(self, node: nodes.Node, vhost: str) -> None:
        self.node = node
        self.vhost = vhost

    def url(self, app: str) -> str:
        return self.node.vhost_url(self.vhost, f"{app}-{self.vhost}", PASSWORD)


@pytest.fixture
def users(rabbitmq: nodes.Node, rabbitmq_url: str, folder: Path) -> Users:
    vhost = rabbitmq_url.rpartition("/")[2]
    users = Users(rabbitmq, vhost)
    with connected(rabbitmq_url) as connection:  # once, by the administrator
        declare(connection, Topology(exchanges=(bus_exchange(),)))
    permissions = {}
    for app in ("shop", "billing"):
        user = f"{app}-{vhost}"
        permissions[user] = printed(app, user, folder, rabbitmq_url)[-3:]
    rabbitmq.add_users(vhost, permissions, PASSWORD)
    return users


def printed(app: str, user: str, folder: Path, url: str) -> list[str]:
    """The arguments of rabbitmqctl."""
    done = lightbus("topology", "permissions", f"bus:{app}", "--user", user, folder=folder, url=url)
    program, *line = shlex.split(done.stdout)
    assert program == "rabbitmqctl"
    return line


async def test_the_printed_command_sets_the_permissions(users: Users, folder: Path, rabbitmq_url: str) -> None:
    """The other tests set them without rabbitmqctl, which takes seconds."""
    user = f"billing-{users.vhost}"
    before = users.node.ctl("list_user_permissions", user)
    users.node.ctl("clear_permissions", "-p", users.vhost, user)
    assert users.node.ctl("list_user_permissions", user) != before
    users.node.ctl(*printed("billing", user, folder, rabbitmq_url))
    assert users.node.ctl("list_user_permissions", user) == before


async def test_publishing_and_handling_work_with_these_permissions(users: Users) -> None:
    """Publishing, subscribing, source=, a separate queue, retries, dead letters, and delays."""
    shop = Lightbus("shop", url=users.url("shop"))
    shop.event(OrderPlaced)
    billing = Lightbus("billing", url=users.url("billing"), retry=Retry(delays=(0.05,)))
    received: list[tuple[int, int, str]] = []

    @billing.on("order.*", source="shop")
    async def handle(order: OrderPlaced, message: Message) -> None:
        received.append((order.number, message.attempt, message.source))
        if order.number == 2 and message.attempt == 1:
            raise LookupError("once")
        if order.number == 3:
            raise Reject("never")

    @billing.on("order.#", queue="slow")
    async def handle_slowly(order: OrderPlaced) -> None:
        received.append((order.number, 0, "slow"))

    async with running(shop, billing):
        for number in (1, 2, 3):
            assert (await shop.publish(OrderPlaced(number=number))).routed
        await shop.publish(OrderPlaced(number=4), delay=1)
        wanted = [(1, 1, "shop"), (2, 1, "shop"), (2, 2, "shop"), (3, 1, "shop"), (4, 1, "shop")]
        wanted += [(number, 0, "slow") for number in (1, 2, 3, 4)]
        await eventually(lambda: sorted(received), sorted(wanted))
        (dead_letter,) = await dead_letters(billing)
        assert reason(dead_letter) == "lightbus.errors.Reject: never"


async def test_the_commands_work_with_these_permissions(users: Users, folder: Path) -> None:
    url = users.url("billing")
    billing = Lightbus("billing", url=url)
    billing.on("order.*", source="shop", name="handle")(lambda body: None)
    billing.on("order.*", source="shop", name="handle_slowly", queue="slow")(lambda body: None)
    with connected(users.url("shop")) as connection:
        declare(connection, publishing("shop"))
    with connected(url) as connection:
        declare(connection, billing.topology())
        headers = {"lightbus-error-type": "KeyError", "lightbus-queue": "billing.main"}
        properties = {"headers": headers, "message_id": "m-1"}
        publish_confirmed(connection, Publication("billing.internal", "dead", b"{}", properties))
    done = lightbus("doctor", "bus:billing", folder=folder, url=url)
    assert "Declaring, binding, publishing, confirms and reading work." in done.stdout, done.stdout
    assert " 0 failed" in f" {done.stdout.splitlines()[-1]}", done.stdout
    done = lightbus("topology", "bus:billing", "--live", folder=folder, url=url)
    assert "All exchanges and queues exist as declared." in done.stdout, done.stdout
    with Program("tail", "bus:billing", folder=folder, url=url) as tail:
        tail.wait_for("Listening for #")
    nameless = lightbus("tail", "--timeout", "60", folder=folder, url=url)
    assert nameless.returncode == 1
    assert "An app's own user can use: lightbus tail MODULE:ATTR." in nameless.stderr
    assert lightbus("dead", "retry", "bus:billing", "--all", folder=folder, url=url).stdout == "1 retried.\n"
    assert lightbus("unbind", "bus:billing", "order.gone", folder=folder, url=url).returncode == 0
    for command in (
        ["doctor", "bus:billing"],
        ["dead", "list", "bus:billing"],
        ["topology", "permissions", "bus:billing"],
    ):
        done = lightbus(*command, folder=folder, url=url)
        assert PASSWORD not in done.stdout + done.stderr


async def test_each_user_is_refused_everything_else(users: Users) -> None:
    shop = Lightbus("shop", url=users.url("shop"))
    shop.on("order.*")(lambda body: None)
    billing = Lightbus("billing", url=users.url("billing"))
    billing.on("order.*")(lambda body: None)
    for app in (shop, billing):
        with connected(app) as connection:
            declare(connection, app.topology())

    def publish_to(exchange: str) -> Any:
        return lambda channel: publish_plainly(channel, exchange, "order.placed", b"{}")

    refused = {
        "publish as the other": publish_to("billing"),
        "publish to the bus exchange": publish_to("lightbus"),
        "publish to the other's internal exchange": publish_to("billing.internal"),
        "publish through the default exchange": publish_to(""),
        "consume the other's queue": lambda channel: channel.consume("billing.main", print, on_cancel=print),
        "get from the other's queue": lambda channel: channel.get("billing.main"),
        "get from the other's dead letters": lambda channel: channel.get("billing.dead"),
        "purge the other's queue": lambda channel: channel.queue_purge("billing.main"),
        "delete the other's queue": lambda channel: channel.queue_delete("billing.main"),
        "bind the other's queue": lambda channel: channel.queue_bind("billing.main", "shop", "#"),
        "bind the other's exchange to its own": lambda channel: channel.exchange_bind("billing", "shop", "#"),
        "declare a queue in the other's name": lambda channel: channel.queue_declare("billing.more"),
        "declare a queue of another prefix": lambda channel: channel.queue_declare("shopx"),
        "delete the bus exchange": lambda channel: channel.exchange_delete("lightbus"),
        "dead-letter into the other's exchange": lambda channel: channel.queue_declare(
            "shop.trick", arguments={"x-dead-letter-exchange": "billing"}
        ),
        "dead-letter into the default exchange": lambda channel: channel.queue_declare(
            "shop.trick", arguments={"x-dead-letter-exchange": ""}
        ),
        "an alternate exchange of the other's": lambda channel: channel.exchange_declare(
            "shop.trick", "topic", durable=True, auto_delete=False, arguments={"alternate-exchange": "billing"}
        ),
    }
    allowed = [what for what, attempt in refused.items() if not _is_refused(shop, attempt)]
    assert allowed == []


def _is_refused(app: Lightbus, attempt: Any) -> bool:
    with connected(app) as connection:
        channel: Channel = connection.channel()
        try:
            attempt(channel)
        except amqp.exceptions.AccessRefused:
            return True
        return False


async def test_the_source_of_an_event_cannot_be_forged(users: Users) -> None:
    """An event of billing has the source billing, whatever its properties and headers are."""
    shop = Lightbus("shop", url=users.url("shop"))
    sources: list[str] = []

    @shop.on("money.moved")
    async def hear_money(body: dict[str, Any], message: Message) -> None:
        sources.append(message.source)

    billing = Lightbus("billing", url=users.url("billing"))
    async with running(shop, billing):
        with connected(billing) as connection:
            channel = connection.channel()
            forged: list[dict[str, Any]] = [
                {"app_id": "bank", "type": "bank.event"},
                {"headers": {"lightbus-source": "bank", "lightbus-routing-key": "money.moved", "lightbus-attempt": 3}},
                {"headers": {"lightbus-source": "bank", "lightbus-handler": "hear_money", "CC": ["money.moved"]}},
            ]
            for properties in forged:
                publish_plainly(channel, "billing", "money.moved", b"{}", properties)
        await eventually(lambda: sources, ["billing"] * 3)


async def test_a_worker_waits_for_the_app_that_it_subscribes_to(users: Users, caplog: pytest.LogCaptureFixture) -> None:
    """billing's user may subscribe to shop's events, but not declare its exchange. shop declares it at its start."""
    billing = Lightbus("billing", url=users.url("billing"))
    billing.on("order.*", source="shop")(lambda body: None)
    consumer = billing.consumer()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consumer.run)
        await eventually(lambda: "The exchange is created when 'shop' first starts. Trying again." in caplog.text)
        with connected(users.url("shop")) as connection:
            declare(connection, publishing("shop"))
        await eventually(lambda: consumer.connected)
        await consumer.stop(1)


async def test_a_missing_permission_is_reported_when_a_worker_starts(users: Users, rabbitmq_url: str) -> None:
    with connected(rabbitmq_url) as connection:
        for app in ("shop", "third"):
            declare(connection, publishing(app))
    billing = Lightbus("billing", url=users.url("billing"))
    billing.on("a.b", source="third", name="other")(lambda body: None)
    with pytest.raises(errors.AccessRefused) as raised:
        await billing.consumer().run()
    assert "access to exchange 'third'" in str(raised.value)
    assert PASSWORD not in str(raised.value)


async def test_source_does_not_give_access_to_the_queues_of_that_app(users: Users) -> None:
    shop, billing = (Lightbus(name, url=users.url(name)) for name in ("shop", "billing"))
    shop.on("order.*", queue="slow")(lambda body: None)
    with connected(shop) as connection:
        declare(connection, shop.topology())
    with connected(billing) as connection:  # what source= needs is allowed
        channel = connection.channel()
        channel.queue_declare("billing.main", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        channel.queue_bind("billing.main", "shop", "order.#")
    names = [queue.name for queue in shop.topology().queues]
    assert {"shop.main", "shop.slow", "shop.dead"} < set(names)
    for name in names:
        assert _is_refused(billing, lambda channel, name=name: channel.get(name)), name
        assert _is_refused(billing, lambda channel, name=name: channel.queue_purge(name)), name
