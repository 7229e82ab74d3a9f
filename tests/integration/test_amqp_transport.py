"""The AMQP transport on a real RabbitMQ: the port `lightbus.transport`, and the broker's faults."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import amqp.exceptions
import kombu
import pytest

from lightbus.transport import Delivery, Publication
from lightbus.transport.amqp.connection import CLOSE_TIMEOUT, Connection, Transport
from tests.patience import LIMIT, until_listening, within
from tests.rabbitmq import Node, free_port

pytestmark = pytest.mark.rabbitmq

QUORUM = {"x-queue-type": "quorum"}
PROPERTIES = {
    "content_type": "application/json",
    "content_encoding": "utf-8",
    "headers": {
        "lightbus-version": 1,
        "big": 2**40,
        "text": "ü",
        "flag": True,
        "none": None,
        "deep": {"list": [1, "a"]},
    },
    "delivery_mode": 2,
    "priority": 3,
    "correlation_id": "c-1",
    "reply_to": "nobody",
    "expiration": "60000",
    "message_id": "m-1",
    "timestamp": 1790000000,
    "type": "invoice.paid",
    "user_id": "guest",
    "app_id": "billing",
}


def open_connection(url: str, **options: Any) -> Connection:
    settings = {"heartbeat": 10, "connect_timeout": LIMIT, **options}
    client = kombu.Connection(url, transport=Transport, **settings)
    connection: Connection = client.transport.establish_connection()
    return connection


@pytest.fixture
def connection(rabbitmq_url: str) -> Iterator[Connection]:
    opened = open_connection(rabbitmq_url)
    yield opened
    opened.close()


@pytest.fixture
def channel(connection: Connection) -> Any:
    opened = connection.channel()
    opened.queue_declare("q", durable=True, auto_delete=False, arguments=QUORUM)
    return opened


def until(connection: Connection, done: Callable[[], object], seconds: float = LIMIT) -> None:
    """Drain until the condition holds."""
    deadline = time.monotonic() + seconds
    while not done():
        connection.drain_events(deadline - time.monotonic())


def to_queue(body: bytes, **properties: Any) -> Publication:
    return Publication("", "q", body, properties)


def test_a_message_comes_back_as_it_was_published(connection: Connection, channel: Any) -> None:
    deliveries: list[Delivery] = []
    channel.consume("q", deliveries.append, on_cancel=pytest.fail)
    channel.publish([Publication("", "q", b'{"a": 1}', PROPERTIES), to_queue(b"")])
    until(connection, lambda: len(deliveries) == 2)
    first, second = deliveries
    assert (first.body, first.properties) == (b'{"a": 1}', PROPERTIES)
    assert (first.exchange, first.routing_key, first.redelivered, first.delivery_tag) == ("", "q", False, 1)
    assert (second.body, second.properties, second.delivery_tag) == (b"", {}, 2)
    assert first.channel is channel


def test_py_amqp_reads_what_we_publish(channel: Any, rabbitmq_url: str) -> None:
    channel.confirm_select()
    channel.publish([Publication("", "q", b"x", PROPERTIES)])
    with kombu.Connection(rabbitmq_url) as plain:
        message = None
        while message is None:
            message = plain.default_channel.basic_get("q", no_ack=True)
        read = {**message.properties, "headers": message.headers}
        del read["application_headers"]
        read["headers"].pop("x-delivery-count", None)  # quorum queues add it; from 4.0 on, to redelivered messages
        assert read == PROPERTIES


def test_every_message_is_confirmed_and_an_unroutable_one_is_returned_first(
    connection: Connection, channel: Any
) -> None:
    seen: list[object] = []
    confirmed = 0

    def on_ack(tag: int, multiple: bool) -> None:
        nonlocal confirmed
        confirmed = max(confirmed, tag)
        seen.append(tag)

    channel.on_ack, channel.on_return = on_ack, seen.append
    channel.confirm_select()
    channel.publish([Publication("", "nowhere", b"", {"message_id": "lost"})])
    until(connection, lambda: confirmed == 1)
    assert seen == ["lost", 1]
    channel.publish([to_queue(b"x" * 300, message_id=str(n)) for n in range(5000)])
    until(connection, lambda: confirmed == 5001)


def test_a_full_queue_nacks(connection: Connection, channel: Any) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    channel.queue_declare("full", arguments=arguments)
    outcomes: list[tuple[str, int]] = []
    channel.on_ack = lambda tag, multiple: outcomes.append(("ack", tag))
    channel.on_nack = lambda tag, multiple: outcomes.append(("nack", tag))
    channel.confirm_select()
    for count in (1, 2):
        channel.publish([Publication("", "full", b"", {})])
        until(connection, lambda count=count: len(outcomes) == count)
    assert outcomes == [("ack", 1), ("nack", 2)]


def test_a_body_of_ten_megabytes_arrives_whole(connection: Connection, channel: Any) -> None:
    body = os.urandom(10_000_000)
    deliveries: list[Delivery] = []
    channel.consume("q", deliveries.append, on_cancel=pytest.fail)
    channel.publish([to_queue(b"before"), to_queue(body, message_id="big"), to_queue(b"after")])
    until(connection, lambda: len(deliveries) == 3)
    assert [delivery.body for delivery in deliveries] == [b"before", body, b"after"]


def test_ten_thousand_deliveries_arrive_once_each_and_in_order(connection: Connection, channel: Any) -> None:
    channel.publish([to_queue(str(n).encode(), message_id=str(n)) for n in range(10_000)])
    channel.basic_qos(0, 300, False)
    deliveries: list[Delivery] = []
    channel.consume("q", deliveries.append, on_cancel=pytest.fail)
    bodies: list[bytes] = []
    while len(bodies) < 10_000:
        connection.drain_events(LIMIT)
        bodies += [delivery.body for delivery in deliveries]
        if deliveries:
            channel.basic_ack(deliveries[-1].delivery_tag, multiple=True)
        deliveries.clear()
    assert bodies == [str(n).encode() for n in range(10_000)]


def test_get_takes_one_message_or_none(connection: Connection, channel: Any) -> None:
    assert channel.get("q") is None
    done: list[int] = []
    channel.confirm_select()
    channel.on_ack = lambda tag, multiple: done.append(tag)
    channel.publish([Publication("", "q", b"x", PROPERTIES)])
    until(connection, lambda: done)
    delivery = channel.get("q")
    delivery.properties["headers"].pop("x-delivery-count", None)  # added by quorum queues
    assert (delivery.body, delivery.properties, delivery.routing_key) == (b"x", PROPERTIES, "q")
    channel.basic_nack(delivery.delivery_tag)
    again = None
    while again is None:  # a quorum queue requeues it with a short delay
        again = channel.get("q")
    assert again.redelivered
    assert again.properties["message_id"] == "m-1"
    channel.basic_ack(again.delivery_tag)
    assert channel.queue_declare("q", passive=True).message_count == 0


# --- interrupting -----------------------------------------------------------------------------


def test_an_interrupt_before_or_during_drain_events_ends_it(connection: Connection) -> None:
    connection.interrupt()
    connection.interrupt()
    connection.drain_events(LIMIT)
    with pytest.raises(TimeoutError):  # both interrupts are used up
        connection.drain_events(0)
    timer = threading.Timer(0.2, connection.interrupt)
    timer.start()
    connection.drain_events(LIMIT)
    timer.join()


def test_an_interrupt_during_a_synchronous_method_ends_the_next_drain_events(
    connection: Connection, channel: Any
) -> None:
    connection.interrupt()
    channel.queue_declare("q", passive=True)
    connection.drain_events(LIMIT)


def test_interrupts_from_many_threads_are_never_lost(connection: Connection) -> None:
    handed_over = 0
    threads = 4
    each = 2000
    lock = threading.Lock()

    def work() -> None:
        nonlocal handed_over
        for _ in range(each):
            with lock:
                handed_over += 1
            connection.interrupt()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    while handed_over < threads * each:
        connection.drain_events(LIMIT)  # raises TimeoutError if an interrupt was lost
    for worker in workers:
        worker.join()


def test_an_interrupt_of_a_closed_connection_does_nothing(rabbitmq_url: str) -> None:
    opened = open_connection(rabbitmq_url)
    opened.close()
    opened.interrupt()
    opened.close()


# --- errors of a channel ----------------------------------------------------------------------


def test_a_missing_queue_is_not_found_and_the_channel_stays_closed(connection: Connection) -> None:
    channel = connection.channel()
    with pytest.raises(amqp.exceptions.NotFound, match="no queue 'nothing'"):
        channel.queue_declare("nothing", passive=True)
    for use in (lambda: channel.basic_ack(1), lambda: channel.queue_declare("q"), lambda: channel.get("q")):
        with pytest.raises(amqp.exceptions.RecoverableConnectionError, match="closed"):
            use()
    assert connection.channel().queue_declare("q").queue == "q"


def test_publishing_to_a_missing_exchange_is_not_found(connection: Connection, channel: Any) -> None:
    channel.publish([Publication("nothing", "key", b"", {})])
    with pytest.raises(amqp.exceptions.NotFound, match="no exchange 'nothing'"):
        connection.drain_events(LIMIT)


def test_declaring_with_other_arguments_is_precondition_failed(channel: Any) -> None:
    with pytest.raises(amqp.exceptions.PreconditionFailed, match="inequivalent arg 'x-queue-type'"):
        channel.queue_declare("q", durable=True, auto_delete=False, arguments={"x-queue-type": "classic"})


def test_a_second_exclusive_consumer_is_refused(connection: Connection) -> None:
    channel = connection.channel()
    channel.queue_declare("classic", auto_delete=False)
    channel.consume("classic", print, on_cancel=print, exclusive=True)
    with pytest.raises(amqp.exceptions.AccessRefused, match="in exclusive use"):
        connection.channel().consume("classic", print, on_cancel=print, exclusive=True)


def test_an_unknown_delivery_tag_is_precondition_failed(connection: Connection, channel: Any) -> None:
    channel.basic_ack(17)
    with pytest.raises(amqp.exceptions.PreconditionFailed, match="unknown delivery tag 17"):
        connection.drain_events(LIMIT)


def test_an_internal_exchange_takes_bindings_and_refuses_publishes(connection: Connection, channel: Any) -> None:
    channel.exchange_declare("bus", "topic", durable=True, auto_delete=False, internal=True)
    channel.exchange_declare("billing", "topic", durable=True, auto_delete=False)
    channel.exchange_bind("bus", "billing", "#")
    channel.queue_bind("q", "bus", "invoice.*")
    deliveries: list[Delivery] = []
    channel.consume("q", deliveries.append, on_cancel=pytest.fail)
    channel.publish([Publication("billing", "invoice.paid", b"", {})])
    until(connection, lambda: deliveries)
    assert (deliveries[0].exchange, deliveries[0].routing_key) == ("billing", "invoice.paid")
    channel.publish([Publication("bus", "invoice.paid", b"", {})])
    with pytest.raises(amqp.exceptions.AccessRefused, match="internal exchange"):
        connection.drain_events(LIMIT)


def test_deleting_a_queue_calls_on_cancel(connection: Connection, channel: Any) -> None:
    cancelled: list[str] = []
    tag = channel.consume("q", pytest.fail, on_cancel=cancelled.append)
    connection.channel().queue_delete("q")
    until(connection, lambda: cancelled)
    assert cancelled == [tag]


def test_after_basic_cancel_no_delivery_arrives(connection: Connection, channel: Any) -> None:
    deliveries: list[Delivery] = []
    channel.basic_cancel(channel.consume("q", deliveries.append, on_cancel=pytest.fail))
    channel.publish([to_queue(b"x")])
    while not channel.queue_declare("q", passive=True).message_count:
        pass
    assert deliveries == []


def test_kombus_entities_work_on_the_channel(connection: Connection, channel: Any) -> None:
    kombu.Queue("mine", kombu.Exchange("news", "topic"), "a.#", channel=channel).declare()
    channel.basic_publish(amqp.Message(b"x", message_id="m-2"), "news", "a.b")
    messages: list[Any] = []
    channel.basic_consume("mine", callback=messages.append)
    until(connection, lambda: messages)
    assert (messages[0].body, messages[0].properties["message_id"]) == (b"x", "m-2")


# --- connecting -------------------------------------------------------------------------------


def test_a_port_without_a_listener_is_refused_at_once() -> None:
    with pytest.raises(ConnectionRefusedError):
        open_connection(f"amqp://guest:guest@127.0.0.1:{free_port()}//")


def test_a_peer_that_never_answers_ends_the_handshake_in_time() -> None:
    in_time = pytest.raises(TimeoutError, match=r"handshake within 0\.5 s")
    with socket.create_server(("127.0.0.1", 0)) as silent, within(0.5), in_time:
        open_connection(f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}//", connect_timeout=0.5)


def test_a_peer_that_never_answers_ends_a_tls_handshake_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, within(0.5), pytest.raises(TimeoutError):
        open_connection(f"amqp://g:g@127.0.0.1:{silent.getsockname()[1]}//", connect_timeout=0.5, ssl=True)


def test_wrong_credentials_and_vhosts_are_refused_with_the_brokers_reason(rabbitmq: Node) -> None:
    with pytest.raises(amqp.exceptions.AccessRefused, match="ACCESS_REFUSED"):
        open_connection(rabbitmq.vhost_url("/", password="wrong"))
    with pytest.raises(amqp.exceptions.NotAllowed, match="vhost nothing not found"):
        open_connection(rabbitmq.vhost_url("nothing"))


def test_the_broker_gets_the_clients_name_and_capabilities(rabbitmq: Node, rabbitmq_url: str) -> None:
    opened = open_connection(rabbitmq_url, transport_options={"client_properties": {"connection_name": "billing 1"}})
    assert opened.server_properties["product"] == "RabbitMQ"
    assert opened.frame_max == 131072
    listed = rabbitmq.ctl("list_connections", "client_properties")
    [line] = [line for line in listed.splitlines() if '"billing 1"' in line]
    assert '"product","Lightbus"' in line
    assert '{"connection.blocked",true}' in line
    assert '{"consumer_cancel_notify",true}' in line
    opened.close()


def test_a_forked_child_drops_the_connection_without_ending_it_for_the_parent(
    connection: Connection, channel: Any
) -> None:
    child = os.fork()
    if not child:
        connection.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert channel.queue_declare("q", passive=True).queue == "q"


# --- a broker in trouble ----------------------------------------------------------------------


def test_heartbeats_keep_an_idle_connection_open_and_end_a_silent_one(rabbitmq_node: Callable[[], Node]) -> None:
    node = rabbitmq_node()
    connection = open_connection(node.url, heartbeat=3)

    def tick(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            connection.heartbeat_tick()
            try:
                connection.drain_events(0.5)
            except TimeoutError:
                continue

    tick(10)  # over three times the interval
    assert connection.channel().queue_declare("q").queue == "q"
    node.suspend()
    try:
        with pytest.raises(amqp.exceptions.ConnectionForced, match="heartbeats missed"):
            tick(LIMIT)
        with within(CLOSE_TIMEOUT):
            connection.close()
    finally:
        node.resume()


def test_a_memory_alarm_blocks_and_unblocks(rabbitmq_node: Callable[[], Node]) -> None:
    node = rabbitmq_node()
    connection = open_connection(node.url, transport_options={"write_timeout": 1})
    channel = connection.channel()
    channel.queue_declare("q", durable=True, auto_delete=False, arguments=QUORUM)
    node.ctl("set_vm_memory_high_watermark", "0.000001")
    channel.publish([to_queue(b"x")])
    until(connection, lambda: connection.blocked)
    node.ctl("set_vm_memory_high_watermark", "0.6")
    until(connection, lambda: not connection.blocked)
    node.ctl("set_vm_memory_high_watermark", "0.000001")
    with within(1), pytest.raises(TimeoutError, match="does not read"):
        channel.publish([to_queue(b"x" * 1_000_000)] * 100)
    assert not connection.connected


@pytest.mark.parametrize(("fault", "error"), [("stop", amqp.exceptions.ConnectionForced), ("kill", OSError)])
def test_a_broker_that_ends_is_an_error(rabbitmq_node: Callable[[], Node], fault: str, error: type[Exception]) -> None:
    node = rabbitmq_node()
    connection = open_connection(node.url)
    ending = threading.Thread(target=getattr(node, fault))
    ending.start()
    with pytest.raises(error):
        until(connection, lambda: False)
    connection.close()
    ending.join()


# --- TLS --------------------------------------------------------------------------------------


def test_tls_verifies_the_host_and_transfers_messages(tmp_path: Path, rabbitmq_node: Callable[..., Node]) -> None:
    certificate, key, port = tmp_path / "cert.pem", tmp_path / "key.pem", free_port()
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {certificate} "
        "-addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run(command.split(), check=True, capture_output=True, timeout=LIMIT)
    key.chmod(0o644)
    rabbitmq_node(
        f"listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {certificate}\n"
        f"ssl_options.certfile = {certificate}\nssl_options.keyfile = {key}\n"
    )
    until_listening(port)
    url = f"amqp://guest:guest@127.0.0.1:{port}//"
    with pytest.raises(ssl.SSLCertVerificationError):
        open_connection(url, ssl=True)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        open_connection(url, ssl={"ca_certs": str(certificate), "server_hostname": "elsewhere"})
    connection = open_connection(url, ssl={"ca_certs": str(certificate)})
    channel = connection.channel()
    channel.queue_declare("q", durable=True, auto_delete=False, arguments=QUORUM)
    confirmed: list[int] = []
    deliveries: list[Delivery] = []
    channel.on_ack = lambda tag, multiple: confirmed.append(tag)
    channel.confirm_select()
    channel.consume("q", deliveries.append, on_cancel=pytest.fail, no_ack=True)
    big = os.urandom(5_000_000)
    channel.publish([to_queue(big), *(to_queue(b"x" * 300, message_id=str(n)) for n in range(3000))])
    until(connection, lambda: len(deliveries) == 3001 and max(confirmed, default=0) == 3001)
    assert deliveries[0].body == big
    timer = threading.Timer(0.2, connection.interrupt)
    timer.start()
    until(connection, lambda: not timer.is_alive())
    child = os.fork()
    if not child:
        connection.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert channel.queue_declare("q", passive=True).queue == "q"
    connection.close()
