"""The contracts of apps, kept in a stream on the broker."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import amqp.exceptions
import attrs
import pytest

from lightbus import Lightbus, errors
from lightbus.catalog import contract as contracts
from lightbus.catalog import storage
from lightbus.catalog.contract import Contract, contract_of
from lightbus.cli import topology as topology_command
from lightbus.connection.declare import declare
from lightbus.transport import Channel, Connection, Delivery, Publication
from lightbus.wire.topology import Exchange, Topology, catalog_stream, cataloguing
from tests.bus import LIMIT, OrderPlaced, connected, publish_confirmed
from tests.patience import sometimes_within
from tests.rabbitmq import Node

MakeApp = Callable[..., Lightbus]

pytestmark = pytest.mark.usefixtures("patient_catalogue")


@pytest.fixture
def connection(broker_url: str) -> Iterator[Connection]:
    with connected(broker_url) as opened:
        yield opened


def shop_contract(make_app: MakeApp, release: str = "1") -> Contract:
    app = make_app("shop")
    app.event(OrderPlaced)
    return contract_of(app, release)


def billing_contract(make_app: MakeApp) -> Contract:
    app = make_app("billing")
    app.on("order.placed", name="invoice")(lambda: None)
    return contract_of(app)


def put(connection: Connection, exchange: str, body: bytes, properties: dict[str, Any] | None = None) -> None:
    """Publish to the catalogue as an app does, or as an attacker."""
    app = exchange.removesuffix(".internal")
    declare(connection, Topology(queues=(catalog_stream(),)))
    declare(connection, attrs.evolve(cataloguing(app), exchanges=(Exchange(exchange, "direct"),)))
    publish_confirmed(connection, Publication(exchange, "contract", body, properties or {}))


# --- publishing and reading -------------------------------------------------------------------


def test_an_empty_catalogue_has_no_contracts(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # `patient_catalogue`
    broker = make_app("shop").broker

    def seconds() -> float:
        began = time.monotonic()
        found = storage.read(broker)
        assert (found.contracts, found.ignored) == ([], [])
        return time.monotonic() - began

    sometimes_within(4, seconds)  # a broker cannot say that a stream is empty: 2 s without a message


def test_of_apps_that_create_the_catalogue_at_once_each_is_in_it(make_app: MakeApp) -> None:
    """RabbitMQ refuses some of them at first."""
    apps = [make_app(f"shop-{number}") for number in range(8)]
    with ThreadPoolExecutor(len(apps)) as threads:
        for done in [threads.submit(storage.publish, app.broker, contract_of(app)) for app in apps]:
            done.result(LIMIT)
    assert {one.app for one in storage.read(apps[0].broker).contracts} == {app.name for app in apps}


def test_the_newest_contract_of_each_app_is_read_again_and_again(make_app: MakeApp) -> None:
    broker = make_app("shop").broker
    billing, second = billing_contract(make_app), shop_contract(make_app, "2")
    for one in (shop_contract(make_app), billing, second):
        storage.publish(broker, one)
    for _ in range(2):
        found = storage.read(broker)
        assert (found.contracts, found.ignored) == ([billing, second], [])


def test_a_withdrawn_app_is_not_in_the_catalogue_until_it_publishes_again(make_app: MakeApp) -> None:
    broker, shop = make_app("shop").broker, shop_contract(make_app)
    storage.publish(broker, shop)
    storage.withdraw(broker, "shop")
    assert storage.read(broker).contracts == []
    storage.publish(broker, shop)
    assert storage.read(broker).contracts == [shop]


def test_a_contract_does_not_reach_any_queue_of_an_app(make_app: MakeApp) -> None:
    audit = make_app("audit")
    audit.on("#", name="record")(lambda: None)
    with connected(audit) as connection:
        declare(connection, audit.topology())
    storage.publish(audit.broker, shop_contract(make_app))
    storage.publish(audit.broker, contract_of(audit))
    with connected(audit) as connection:
        assert connection.channel().get("audit.main") is None


def test_more_messages_than_are_prefetched_are_read(make_app: MakeApp, connection: Connection) -> None:
    declare(connection, Topology(queues=(catalog_stream(),)))
    declare(connection, Topology(exchanges=cataloguing("shop").exchanges, bindings=cataloguing("shop").bindings))
    shop = contracts.to_json(shop_contract(make_app))
    bodies = [zlib.compress(json.dumps(shop | {"release": str(number)}).encode()) for number in range(2_500)]
    publish_confirmed(
        connection,
        *(Publication("shop.internal", "contract", body, {"content_encoding": "deflate"}) for body in bodies),
    )
    assert [one.release for one in storage.read(make_app("shop").broker).contracts] == ["2499"]


def test_a_contract_that_is_too_large_is_refused(make_app: MakeApp) -> None:
    shop = shop_contract(make_app)
    large = attrs.evolve(shop, release="x" * 1024**2)
    with pytest.raises(
        errors.CatalogError, match=r"The contract of app 'shop' has 1,0\d\d,\d\d\d bytes; the catalogue"
    ):
        storage.publish(make_app("shop").broker, large)


def test_a_contract_that_nobody_could_read_is_refused(make_app: MakeApp) -> None:
    broker, shop = make_app("shop").broker, shop_contract(make_app)
    (event,) = shop.events
    with pytest.raises(errors.CatalogError, match=r"event 'order\.placed': its JSON Schema: Expected"):
        storage.publish(broker, attrs.evolve(shop, events=[attrs.evolve(event, schema={"type": 5})]))
    odd = attrs.evolve(shop, events=[attrs.evolve(event, doc="\ud800")])  # no UTF-8
    storage.publish(broker, odd)
    assert [one.events[0].doc for one in storage.read(broker).contracts] == ["?"]


# --- what does not count ----------------------------------------------------------------------


def test_a_contract_in_the_name_of_another_app_is_ignored_and_shown(make_app: MakeApp, connection: Connection) -> None:
    broker, shop = make_app("shop").broker, shop_contract(make_app)
    storage.publish(broker, shop)
    forged = json.dumps(contracts.to_json(attrs.evolve(shop, release="forged"))).encode()
    put(
        connection, "mallory.internal", forged, {"headers": {"x-exchange": "shop.internal"}, "timestamp": 1_800_000_000}
    )
    put(connection, "mallory.sub.internal", forged)
    found = storage.read(broker)
    assert found.contracts == [shop]
    assert {one.reason for one in found.ignored} == {
        "App 'mallory' has published a contract of app 'shop', which is forged.",
    } | {one.reason for one in found.ignored if "A message of exchange 'mallory.sub.internal'" in one.reason}
    assert {one.writer for one in found.ignored} == {"mallory"}


@pytest.mark.rabbitmq
def test_an_event_that_asks_for_a_copy_to_the_catalogue_is_not_a_contract(rabbitmq_url: str) -> None:
    """A retry is published to the app's internal exchange by the app itself, with the body of another app's event."""
    app = Lightbus("shop", url=rabbitmq_url)
    app.event(OrderPlaced)
    forged = json.dumps(contracts.to_json(contract_of(app))).encode()
    with connected(app) as connection:
        declare(connection, Topology(queues=(catalog_stream(),)))
        declare(connection, cataloguing("shop"))
        headers = {"CC": ["contract"], "x-routing-key": "contract"}
        publish_confirmed(connection, Publication("shop.internal", "retry.1s", forged, {"headers": headers}))
    found = storage.read(app.broker)
    assert found.contracts == []
    assert [one.writer for one in found.ignored] == ["shop"]


@pytest.mark.parametrize(
    ("body", "encoding", "problem"),
    [
        (b"{", "", "cannot be read"),
        (b"[]", "", "not a JSON object"),
        (b"{}", "", "has published a contract of app 'None'"),
        (b'{"app": "shop"}', "", "This is not a contract"),
        (b"\xff\xfe", "deflate", "cannot be read"),
        (zlib.compress(b" " * (2 * 1024**2)), "deflate", "more than 1,048,576 bytes"),
        (b"[" * 100_000, "", "cannot be read"),
    ],
)
def test_a_message_that_is_no_contract_is_ignored_and_shown(
    make_app: MakeApp, connection: Connection, body: bytes, encoding: str, problem: str
) -> None:
    put(connection, "shop.internal", body, {"content_encoding": encoding} if encoding else {})
    found = storage.read(make_app("shop").broker)
    assert found.contracts == []
    (ignored,) = found.ignored
    assert problem in ignored.reason
    assert ignored.writer == "shop"


def test_a_schema_that_cannot_be_read_costs_only_its_own_app(make_app: MakeApp, connection: Connection) -> None:
    broker, shop = make_app("shop").broker, shop_contract(make_app)
    storage.publish(broker, shop)
    for name, schema in (("first", {"type": 5}), ("second", {"items": [[]]})):
        written = contracts.to_json(attrs.evolve(shop, app=name))
        written["events"][0]["schema"] = schema
        put(connection, f"{name}.internal", json.dumps(written).encode())
    found = storage.read(broker)
    assert found.contracts == [shop]
    assert sorted(one.writer for one in found.ignored) == ["first", "second"]
    assert all("event 'order.placed': its JSON Schema: Expected" in one.reason for one in found.ignored)


@pytest.mark.impossible_on_artemis("nobody can bind another exchange to the catalogue")
def test_events_that_somebody_routes_into_the_catalogue_are_ignored(make_app: MakeApp, connection: Connection) -> None:
    broker, shop = make_app("shop").broker, shop_contract(make_app)
    storage.publish(broker, shop)
    declare(connection, Topology(exchanges=(Exchange("noise", "topic"),)))
    connection.channel().queue_bind("lightbus.catalog", "noise", "#")
    publish_confirmed(connection, *(Publication("noise", "contract", b"{}", {}) for _ in range(10)))
    found = storage.read(broker)
    assert found.contracts == [shop]
    assert [one.writer for one in found.ignored] == ["noise"]


# --- streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["get", "queue_purge"])
def test_a_stream_is_read_by_nothing_else(connection: Connection, method: str) -> None:
    declare(connection, Topology(queues=(catalog_stream(),)))
    use = getattr(connection.channel(), method)
    with pytest.raises(amqp.exceptions.AMQPNotImplementedError):
        use("lightbus.catalog")


def test_a_stream_keeps_what_was_read(connection: Connection) -> None:
    declare(connection, Topology(queues=(catalog_stream(),)))
    declare(connection, cataloguing("shop"))
    bodies = [b"%d" % number for number in range(5)]
    publish_confirmed(connection, *(Publication("shop.internal", "contract", body, {}) for body in bodies))
    for _ in range(2):
        found: list[Delivery] = []
        channel = connection.channel()
        channel.read_stream("lightbus.catalog", found.append, seconds=LIMIT)
        channel.close()
        assert [(one.exchange, one.routing_key, one.body) for one in found] == [
            ("shop.internal", "contract", body) for body in bodies
        ]


# --- permissions ------------------------------------------------------------------------------


def restricted_app(rabbitmq: Node, rabbitmq_url: str, permissions: tuple[str, str, str] | None = None) -> Lightbus:
    """billing, with a user that has these permissions; the printed ones if there are none."""
    app = Lightbus("billing", url=rabbitmq_url)
    app.on("order.placed", name="invoice")(lambda: None)
    vhost = rabbitmq_url.rpartition("/")[2]
    rabbitmq.add_users(vhost, {f"billing-{vhost}": permissions or topology_command.rules(app)}, "pw")
    restricted = Lightbus("billing", url=rabbitmq.vhost_url(vhost, f"billing-{vhost}", "pw"))
    restricted.on("order.placed", name="invoice")(lambda: None)
    return restricted


def declare_stream(url: str) -> None:
    """As an administrator does it once."""
    with connected(url) as connection:
        declare(connection, Topology(queues=(catalog_stream(),)))


@pytest.mark.rabbitmq
def test_an_app_with_its_printed_permissions_publishes_and_reads(rabbitmq: Node, rabbitmq_url: str) -> None:
    declare_stream(rabbitmq_url)
    app = restricted_app(rabbitmq, rabbitmq_url)
    own_contract = contract_of(app)
    storage.publish(app.broker, own_contract)
    assert storage.read(app.broker).contracts == [own_contract]


REFUSED: dict[str, tuple[type[Exception], Callable[[Channel], object]]] = {
    "delete": (amqp.exceptions.AccessRefused, lambda channel: channel.queue_delete("lightbus.catalog")),
    "purge": (amqp.exceptions.AMQPNotImplementedError, lambda channel: channel.queue_purge("lightbus.catalog")),
    "declare": (
        amqp.exceptions.AccessRefused,
        lambda channel: channel.queue_declare("lightbus.catalog", arguments=catalog_stream().arguments),
    ),
    "write by the default exchange": (
        amqp.exceptions.AccessRefused,
        lambda channel: channel.publish([Publication("", "lightbus.catalog", b"{}", {})]),
    ),
    "write for another app": (
        amqp.exceptions.AccessRefused,
        lambda channel: channel.publish([Publication("shop.internal", "contract", b"{}", {})]),
    ),
}
"""What no app can do to the catalogue, and the broker's error."""


@pytest.mark.rabbitmq
def test_an_app_with_its_printed_permissions_can_do_nothing_else(rabbitmq: Node, rabbitmq_url: str) -> None:
    declare_stream(rabbitmq_url)
    app = restricted_app(rabbitmq, rabbitmq_url)
    for what, (error, step) in REFUSED.items():
        with connected(app) as connection:
            try:
                step(connection.channel())
                connection.drain_events(LIMIT)  # the broker answers a publication only if it refuses it
            except error:
                continue
            pytest.fail(f"{what}: nothing was refused")


@pytest.mark.rabbitmq
def test_an_app_without_access_to_the_catalogue_gets_the_next_step(rabbitmq: Node, rabbitmq_url: str) -> None:
    own = r"billing(\..+)?"
    app = restricted_app(rabbitmq, rabbitmq_url, (rf"^{own}$", rf"^({own}|lightbus)$", rf"^({own}|lightbus)$"))
    with pytest.raises(errors.CatalogError, match="does not exist, and this user may not create it"):
        storage.publish(app.broker, contract_of(app))
    declare_stream(rabbitmq_url)
    printed = "Give it the permissions that `lightbus topology permissions` prints"
    with pytest.raises(errors.CatalogError, match=printed):
        storage.publish(app.broker, contract_of(app))
    with pytest.raises(errors.AccessRefused, match="`lightbus topology permissions MODULE:ATTR` prints"):
        storage.read(app.broker)
