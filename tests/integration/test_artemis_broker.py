"""The private broker of the tests: what it keeps, and what `reset` deletes."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightbus.transport.activemq import broker_xml
from tests.artemis import Artemis
from tests.conftest import need_artemis
from tests.patience import LIMIT, wait_until

pytestmark = pytest.mark.artemis


@pytest.fixture(scope="module")
def broker() -> Iterator[Artemis]:
    need_artemis()
    with Artemis() as broker:
        yield broker


def send(broker: Artemis, *addresses: str) -> None:
    from proton import Message
    from proton.utils import BlockingConnection

    connection = BlockingConnection(broker.url(scheme="amqp"), timeout=30, allowed_mechs="PLAIN")
    for address in addresses:
        connection.create_sender(address).send(Message(body=b"x", durable=True))
    connection.close()


def messages(broker: Artemis) -> dict[str, int]:
    """How many messages each queue has that is not a client's temporary one."""
    with broker.management() as management:
        queues = management.listed("listQueues")
    return {one["name"]: int(one["messageCount"]) for one in queues if one["name"].startswith("lightbus.")}


def selector(broker: Artemis, queue: str) -> str:
    with broker.management() as management:
        (found,) = management.call([(f"queue.{queue}", "getFilter", [])])
    return str(found)


def addresses(broker: Artemis) -> set[str]:
    with broker.management() as management:
        found = management.listed("listAddresses")
    return {one["name"] for one in found if one["name"].startswith("lightbus.")}


def test_a_reset_leaves_only_what_the_administrator_has_made(broker: Artemis) -> None:
    send(broker, "lightbus.contract.billing", "lightbus.exchange.billing", "lightbus.delay.billing")
    assert messages(broker) == {"lightbus.catalog": 1, "lightbus.delay.billing": 1}
    broker.reset()
    assert messages(broker) == {"lightbus.catalog": 0}
    assert addresses(broker) == set(broker_xml.FIXED_ADDRESSES)


def test_confirmed_messages_survive_a_kill(broker: Artemis) -> None:
    broker.reset()
    send(broker, "lightbus.contract.billing")
    broker.kill()
    assert not broker.answers()
    broker.start()
    assert messages(broker) == {"lightbus.catalog": 1}


def test_a_selector_in_broker_xml_replaces_that_of_a_queue_for_good(broker: Artemis) -> None:
    """`updateQueue` changes it only until the broker restarts."""
    created = {"name": "billing.main", "address": "lightbus.bus", "routing-type": "MULTICAST", "filter-string": "FALSE"}
    updated = {"name": "billing.main", "filter-string": "JMSType = 'a'"}
    with broker.management() as management:
        for operation, configuration in (("createQueue", created), ("updateQueue", updated)):
            management.call([("broker", operation, [json.dumps(configuration)])])
    assert selector(broker, "billing.main") == "JMSType = 'a'"
    broker.restart()
    assert selector(broker, "billing.main") == "FALSE"
    file = broker.etc / "broker.xml"
    wanted = """JMSType = 'a' OR "m.x-opt-ORIG-ADDRESS" IS NULL"""
    with_queue = broker_xml.queues({"billing.main": wanted})
    file.write_text(file.read_text().replace('<address name="lightbus.bus"><multicast/></address>', with_queue))
    wait_until(lambda: selector(broker, "billing.main") == wanted, "the broker reads broker.xml again")
    broker.restart()
    assert selector(broker, "billing.main") == wanted


def test_a_second_port_has_tls(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    need_artemis()
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    header = b"AMQP\x03\x01\x00\x00"
    with (
        Artemis(tls={"keyStoreType": "PEM", "keyStorePath": tmp_path / "server.pem"}) as broker,
        socket.create_connection(("127.0.0.1", broker.tls_port), timeout=LIMIT) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(header)
        assert secure.recv(8) == header


def test_a_suspended_broker_answers_again_when_it_is_resumed(broker: Artemis) -> None:
    broker.suspend()
    with socket.create_connection(("127.0.0.1", broker.port), timeout=LIMIT) as client:
        client.sendall(b"AMQP\x03\x01\x00\x00")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(8)
    broker.resume()
    assert broker.answers()
