"""What an app can do, with only its own permissions, to have a forged contract of another app read."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import amqp.exceptions
import attrs
import pytest

from lightbus import Lightbus, Retry
from lightbus.catalog import contract as contracts
from lightbus.catalog import storage
from lightbus.catalog.contract import Contract, contract_of
from lightbus.cli import topology as topology_command
from lightbus.connection.declare import declare
from lightbus.transport import Channel, Publication
from lightbus.wire.topology import (
    CATALOG,
    Binding,
    Exchange,
    Topology,
    bus_exchange,
    catalog_stream,
    cataloguing,
    publishing,
)
from tests import rabbitmq as nodes
from tests.bus import connected, publish_confirmed
from tests.processes import lightbus, working

pytestmark = [pytest.mark.rabbitmq, pytest.mark.usefixtures("patient_catalogue")]

PASSWORD = "s3cr3t"
APPS = ("shop", "mallory")

BUS = """\
from lightbus import Lightbus, Retry

app = Lightbus("shop", retry=Retry(delays=(0.05,)))

@app.on("order.placed"{queue})
def charge(order: dict):
    raise ValueError("out of order")
"""


@pytest.fixture
def apps(rabbitmq: nodes.Node, rabbitmq_url: str) -> dict[str, Lightbus]:
    """Each with a user that has the printed permissions. The contract of shop is in the catalogue."""
    vhost = rabbitmq_url.rpartition("/")[2]
    with connected(rabbitmq_url) as connection:
        declare(connection, Topology(exchanges=(bus_exchange(),), queues=(catalog_stream(),)))
    users = {f"{name}-{vhost}": topology_command.rules(Lightbus(name, url=rabbitmq_url)) for name in APPS}
    rabbitmq.add_users(vhost, users, PASSWORD)
    found = {
        name: Lightbus(name, url=rabbitmq.vhost_url(vhost, f"{name}-{vhost}", PASSWORD), retry=Retry(delays=(0.05,)))
        for name in APPS
    }
    storage.publish(found["shop"].broker, genuine(found["shop"]))
    return found


def genuine(shop: Lightbus) -> Contract:
    return attrs.evolve(contract_of(shop, "genuine"), at=1.0)


def forged(shop: Lightbus) -> bytes:
    return json.dumps(contracts.to_json(attrs.evolve(genuine(shop), release="forged"))).encode()


# --- through a worker of the app itself -------------------------------------------------------


def publish_as_mallory(apps: dict[str, Lightbus], headers: dict[str, object]) -> None:
    """An event whose body is a contract of shop."""
    mallory = apps["mallory"]
    with connected(mallory) as connection:
        declare(connection, publishing("mallory"))
        publication = Publication(
            "mallory", "order.placed", forged(apps["shop"]), {"message_id": "m-1", "headers": headers}
        )
        publish_confirmed(connection, publication)


def test_a_failed_event_is_retried_and_dead_lettered_without_becoming_a_contract(
    apps: dict[str, Lightbus], tmp_path: Path
) -> None:
    (tmp_path / "bus.py").write_text(BUS.format(queue=""))
    shop = apps["shop"]
    url = shop.broker.addresses[0].plain
    death = {"queue": "shop.contract", "exchange": "shop.internal", "reason": "rejected", "routing-keys": ["contract"]}
    headers = {"CC": ["contract"], "BCC": ["contract"], "x-death": [death], "lightbus-queue": "shop.contract"}
    with working("bus:app", "--no-contract", folder=tmp_path, url=url) as worker:
        publish_as_mallory(apps, headers)
        worker.wait_for("dead-lettered to")
        assert worker.end(signal.SIGTERM) == 0
    done = lightbus("dead", "retry", "bus:app", "--all", "--trust-origin", folder=tmp_path, url=url)
    assert (done.returncode, done.stdout) == (0, "1 retried.\n"), done.stderr
    assert [one.release for one in storage.read(shop.broker).contracts] == ["genuine"]


def test_a_dead_letter_that_claims_to_come_from_the_catalogue_is_not_retried_there(
    apps: dict[str, Lightbus], tmp_path: Path
) -> None:
    """RabbitMQ 3 merges its record of a death into an x-death header that a publisher has written."""
    (tmp_path / "bus.py").write_text(BUS.format(queue=""))
    shop = apps["shop"]
    url = shop.broker.addresses[0].plain
    death = {"queue": "shop.contract", "exchange": "mallory", "reason": "rejected", "routing-keys": ["order.placed"]}
    with connected(shop) as connection:
        declare(connection, dead_letter_queue())
        properties = {"message_id": "m-1", "headers": {"x-death": [death]}}
        publish_confirmed(connection, Publication("shop.internal", "dead", forged(shop), properties))
    done = lightbus("dead", "retry", "bus:app", "--all", "--trust-origin", folder=tmp_path, url=url)
    assert done.returncode == 1
    assert "1 skipped: their queue shop.contract does not exist." in done.stderr
    assert [one.release for one in storage.read(shop.broker).contracts] == ["genuine"]


def dead_letter_queue() -> Topology:
    app = Lightbus("shop", url="memory://")
    app.on("order.placed", name="charge")(lambda order: None)
    return app.topology()


def test_a_worker_with_a_queue_named_as_the_key_of_contracts_does_not_start(
    apps: dict[str, Lightbus], tmp_path: Path
) -> None:
    """Its retries would come back with that key, and the body of another app's event."""
    (tmp_path / "bus.py").write_text(BUS.format(queue=', queue="contract"'))
    done = lightbus("worker", "bus:app", folder=tmp_path, url=apps["shop"].broker.addresses[0].plain)
    assert done.returncode == 2
    assert "queue='contract' is reserved by Lightbus" in done.stderr
    with connected(apps["shop"]) as connection, pytest.raises(amqp.exceptions.NotFound):
        connection.channel().queue_declare("shop.contract", passive=True)


# --- by bindings and exchanges ----------------------------------------------------------------

REFUSED: dict[str, Callable[[Channel], object]] = {
    "bind its exchange": lambda channel: channel.queue_bind(CATALOG, "shop.internal", "x"),
    "unbind its exchange": lambda channel: channel.queue_unbind(CATALOG, "shop.internal", "contract"),
    "bind an own exchange to its exchange": lambda channel: channel.exchange_bind(
        "shop.internal", "mallory.internal", "contract"
    ),
    "bind its exchange to an own exchange": lambda channel: channel.exchange_bind(
        "mallory.internal", "shop.internal", "contract"
    ),
    "dead-letter to its exchange": lambda channel: channel.queue_declare(
        "mallory.trick", arguments={"x-dead-letter-exchange": "shop.internal", "x-dead-letter-routing-key": "contract"}
    ),
    "an alternate exchange": lambda channel: channel.exchange_declare(
        "mallory.trick", "direct", arguments={"alternate-exchange": "shop.internal"}
    ),
    "declare an exchange of a similar name": lambda channel: channel.exchange_declare("shop.x.internal", "direct"),
    "delete the stream": lambda channel: channel.queue_delete(CATALOG),
}
"""What mallory tries with the exchange of shop's contracts."""


@pytest.mark.parametrize("step", REFUSED)
def test_no_app_can_route_to_the_exchange_of_another_apps_contracts(apps: dict[str, Lightbus], step: str) -> None:
    with connected(apps["mallory"]) as connection:
        declare(connection, cataloguing("mallory"))
        with pytest.raises(amqp.exceptions.AccessRefused):
            REFUSED[step](connection.channel())


def test_a_contract_through_an_own_exchange_is_shown_as_forged(apps: dict[str, Lightbus]) -> None:
    names = ("mallory.internal", "mallory.shop.internal", "mallory.x")
    with connected(apps["mallory"]) as connection:
        for name in names:
            bound = Topology(
                exchanges=(Exchange(name, "direct"),), bindings=(Binding(name, CATALOG, "contract", to_queue=True),)
            )
            declare(connection, bound)
            properties = {"app_id": "shop", "headers": {"x-exchange": "shop.internal"}}
            publish_confirmed(connection, Publication(name, "contract", forged(apps["shop"]), properties))
    found = storage.read(apps["shop"].broker)
    assert [(one.app, one.release) for one in found.contracts] == [("shop", "genuine")]
    (ignored,) = found.ignored  # the last one of each writer
    assert (ignored.writer, ignored.reason) == (
        "mallory",
        "App 'mallory' has published a contract of app 'shop', which is forged.",
    )


class Name(str):
    """A key that a dict can have twice."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def test_a_forged_offset_does_not_end_the_reading(apps: dict[str, Lightbus]) -> None:
    """RabbitMQ sets the header with a message's place in the stream, but leaves a second one of this name as it is."""
    mallory, shop = apps["mallory"], apps["shop"]
    with connected(mallory) as connection:
        declare(connection, cataloguing("mallory"))
        filling = Publication("mallory.internal", "contract", b"{}", {})  # more than is read at once
        publish_confirmed(connection, *[filling] * 2_500)
        storage.publish(shop.broker, attrs.evolve(genuine(shop), release="newest"))
        headers = {Name("x-stream-offset"): 0, Name("x-stream-offset"): 1}
        publish_confirmed(connection, Publication("mallory.internal", "contract", b"{}", {"headers": headers}))
    assert [one.release for one in storage.read(shop.broker).contracts] == ["newest"]
