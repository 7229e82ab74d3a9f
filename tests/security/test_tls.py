"""`amqps://` and `activemqs://` on real brokers, with certificates made by the test: what is trusted, and the errors if
it is not.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest

from lightbus import Lightbus, errors
from tests.artemis import Artemis
from tests.bus import OrderPlaced, eventually, running
from tests.conformance.conftest import declare_orders
from tests.conftest import need_artemis, need_rabbitmq
from tests.patience import LIMIT, until_listening, within
from tests.rabbitmq import Node, free_port

trustme = pytest.importorskip("trustme", reason="the TLS tests make their certificates with trustme: install it")

pytestmark = [pytest.mark.anyio]


@attrs.frozen
class Authority:
    """A certificate authority, and the files with its certificates."""

    folder: Path
    ca: object = attrs.field(factory=trustme.CA)

    @property
    def file(self) -> Path:
        path = self.folder / "ca.pem"
        if not path.exists():
            self.ca.cert_pem.write_to_path(path)  # type: ignore[attr-defined]
        return path

    def issue(self, name: str, *hosts: str, expired: bool = False) -> tuple[Path, Path]:
        """A certificate and its key."""
        now = datetime.now(UTC)
        end = now - timedelta(days=1) if expired else now + timedelta(days=1)
        leaf = self.ca.issue_cert(*hosts, not_before=now - timedelta(days=2), not_after=end)  # type: ignore[attr-defined]
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        leaf.private_key_pem.write_to_path(key)
        for number, pem in enumerate(leaf.cert_chain_pems):
            pem.write_to_path(certificate, append=number > 0)
        return certificate, key


@attrs.frozen
class Secured:
    """A broker with a separate port for TLS."""

    node: Node | Artemis
    port: int
    authority: Authority

    def url(self, *options: str, host: str = "localhost", port: int | None = None, scheme: str = "") -> str:
        kind, login = ("amqp", "guest:guest") if isinstance(self.node, Node) else ("activemq", "admin:admin")
        query = "?" + "&".join(options) if options else ""
        return f"{scheme or kind + 's'}://{login}@{host}:{port or self.port}/{query}"

    @property
    def plain_url(self) -> str:
        """Of the port with TLS, without TLS."""
        return self.url(scheme="amqp" if isinstance(self.node, Node) else "activemq")

    @property
    def trusted(self) -> str:
        return f"cafile={self.authority.file}"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the node does not trust."""
    return Authority(tmp_path_factory.mktemp("other-authority"))


class Nodes:
    """Nodes take seconds to start, so the tests of this module share those with the same options."""

    def __init__(self, broker: str, authority: Authority) -> None:
        self.broker = broker
        self.authority = authority
        self.started: dict[str, Secured] = {}

    def get(self, kind: str) -> Secured:
        if kind not in self.started:
            certificate, key = self.authority.issue(kind, "localhost", expired=kind == "expired")
            start = self._start_artemis if self.broker == "artemis" else self._start_rabbitmq
            self.started[kind] = start(kind, certificate, key)
        return self.started[kind]

    def _start_artemis(self, kind: str, certificate: Path, key: Path) -> Secured:
        both = key.with_name(f"{kind}-both.pem")
        both.write_text(key.read_text() + certificate.read_text())
        options: dict[str, object] = {"keyStoreType": "PEM", "keyStorePath": both}
        if kind == "client":
            options |= {"needClientAuth": "true", "trustStoreType": "PEMCA", "trustStorePath": self.authority.file}
        broker = Artemis(tls=options)
        secured = Secured(broker, broker.tls_port, self.authority)
        broker.start()
        until_listening(broker.tls_port)
        return secured

    def _start_rabbitmq(self, kind: str, certificate: Path, key: Path) -> Secured:
        port = free_port()
        config = (
            f"listeners.ssl.1 = 127.0.0.1:{port}\n"
            f"ssl_options.cacertfile = {self.authority.file}\n"
            f"ssl_options.certfile = {certificate}\n"
            f"ssl_options.keyfile = {key}\n"
            f"ssl_options.verify = {'verify_peer' if kind == 'client' else 'verify_none'}\n"
            f"ssl_options.fail_if_no_peer_cert = {'true' if kind == 'client' else 'false'}\n"
        )
        node = Node(config)
        node.start()
        until_listening(port)
        return Secured(node, port, self.authority)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
        pytest.param("artemis", marks=pytest.mark.artemis),
    ],
)
def nodes(authority: Authority, request: pytest.FixtureRequest) -> Iterator[Nodes]:
    if request.param == "artemis":
        need_artemis()
    else:
        need_rabbitmq()
    nodes = Nodes(request.param, authority)
    yield nodes
    for secured in nodes.started.values():
        secured.node.close()


def refused(url: str) -> str:
    """The error of a refused connection, in everything that connects."""
    app = declare_orders(Lightbus("shop", url=url, publish_timeout=LIMIT))
    app.on("order.placed")(lambda: None)
    with pytest.raises(errors.TLSRefused) as by_connecting, app:
        pass
    with pytest.raises(errors.PublishRefused) as by_publishing:
        app.publish_sync(OrderPlaced(number=1))
    assert isinstance(by_publishing.value.__cause__, errors.TLSRefused)
    with pytest.raises((errors.TLSRefused, ExceptionGroup)) as by_consuming:
        anyio.run(app.consumer().run)
    assert "TLSRefused" in repr(by_consuming.value)
    app.__exit__(None, None, None)
    words = str(by_connecting.value)
    assert not re.search("guest:guest|admin:admin", words + str(by_publishing.value))
    return words


async def assert_delivers(url: str) -> None:
    """An event is published and handled over this URL."""
    shop, billing = declare_orders(Lightbus("shop", url=url)), Lightbus("billing", url=url)
    numbers: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        numbers.append(order.number)

    async with running(shop, billing) as bus:
        (consumer,) = bus.consumers["billing"]
        await shop.publish(OrderPlaced(number=1))
        # The TLS layer may hold data that it has read, although the socket itself has nothing more to read.
        await eventually(lambda: consumer.read_by_loop and shop.publisher.read_by_loop)
        await shop.publish_many([OrderPlaced(number=n, note="x" * 50_000) for n in range(2, 40)])
        await shop.publish_many([OrderPlaced(number=n) for n in range(40, 2000)])
        await eventually(lambda: sorted(numbers), [*range(1, 2000)])
        await eventually(lambda: consumer.read_by_loop)
    for app in (shop, billing):
        await anyio.to_thread.run_sync(app.__exit__, None, None, None)


async def test_events_are_sent_over_tls_if_the_authority_is_trusted(nodes: Nodes) -> None:
    node = nodes.get("plain")
    await assert_delivers(node.url(node.trusted))
    if isinstance(node.node, Node):
        assert "TLS" in await anyio.to_thread.run_sync(_protocols, node.node, node.url(node.trusted))


async def test_the_next_address_of_a_name_is_verified_by_that_name(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = nodes.get("plain")
    lookup = socket.getaddrinfo

    def resolve(host: str, *arguments: Any, **options: Any) -> list[Any]:
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "localhost" else [host]
        return [found for one in hosts for found in lookup(one, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.create_server(("127.0.0.2", node.port)):  # accepts connections, but never answers
        await assert_delivers(node.url(node.trusted, "connect_timeout=2"))


def _protocols(node: Node, url: str) -> str:
    app = declare_orders(Lightbus("shop", url=url))
    with app:
        listed: str = node.ctl("list_connections", "ssl", "ssl_protocol")
        assert "true" in listed
        return listed.replace("tls", "TLS")


def test_an_unknown_authority_is_refused(nodes: Nodes, other_authority: Authority) -> None:
    node = nodes.get("plain")
    words = refused(node.url(f"cafile={other_authority.file}"))
    assert "CERTIFICATE_VERIFY_FAILED" in words
    assert "?cafile=" in words


def test_without_cafile_the_systems_authorities_are_trusted(nodes: Nodes) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in refused(nodes.get("plain").url())


def test_a_certificate_for_another_host_is_refused(nodes: Nodes) -> None:
    node = nodes.get("plain")
    words = refused(node.url(node.trusted, host="127.0.0.1"))
    assert "127.0.0.1" in words
    assert "Check that the host name matches the certificate" in words


def test_an_expired_certificate_is_refused(nodes: Nodes) -> None:
    node = nodes.get("expired")
    assert "certificate has expired" in refused(node.url(node.trusted))


async def test_a_client_certificate_is_accepted(nodes: Nodes, authority: Authority) -> None:
    node = nodes.get("client")
    certificate, key = authority.issue("good-client", "billing.example")
    await assert_delivers(node.url(node.trusted, f"certfile={certificate}", f"keyfile={key}"))


def test_without_a_client_certificate_the_connection_is_refused(nodes: Nodes) -> None:
    node = nodes.get("client")
    assert "?certfile=" in refused(node.url(node.trusted)) or "certfile=" in refused(node.url(node.trusted))


def test_a_client_certificate_of_an_unknown_authority_is_refused(nodes: Nodes, other_authority: Authority) -> None:
    node = nodes.get("client")
    certificate, key = other_authority.issue("bad-client", "billing.example")
    assert "certfile=" in refused(node.url(node.trusted, f"certfile={certificate}", f"keyfile={key}"))


@pytest.mark.parametrize("option", ["cafile", "certfile", "keyfile"])
def test_a_missing_file_is_named(nodes: Nodes, authority: Authority, option: str) -> None:
    node = nodes.get("client")
    certificate, key = authority.issue("named-client", "billing.example")
    files = {"cafile": authority.file, "certfile": certificate, "keyfile": key, option: Path("/nowhere/at-all.pem")}
    words = refused(node.url(*(f"{name}={path}" for name, path in files.items())))
    assert "/nowhere/at-all.pem" in words


def test_a_port_without_tls_is_refused(nodes: Nodes) -> None:
    node = nodes.get("plain")
    if nodes.broker == "artemis":  # which waits for more, instead of an answer
        app = declare_orders(Lightbus("shop", url=node.url(node.trusted, "connect_timeout=1", port=node.node.port)))
        with pytest.raises(errors.BrokerUnreachable, match="no answer in time"):
            app.broker.connect("tests")
        return
    words = refused(node.url(node.trusted, port=node.node.port))
    assert "the server does not speak TLS" in words
    assert "5671 for amqps:// and 5672 for amqp://" in words


def test_plain_amqp_to_a_tls_port_fails_without_hanging(nodes: Nodes) -> None:
    node = nodes.get("plain")
    app = declare_orders(Lightbus("shop", url=node.plain_url, publish_timeout=8))
    with within(8), pytest.raises(errors.BrokerError), app:
        pass
    app.__exit__(None, None, None)


def test_a_refused_worker_logs_the_reason(nodes: Nodes, other_authority: Authority, tmp_path: Path) -> None:
    node = nodes.get("plain")
    url = node.url(f"cafile={other_authority.file}")
    (tmp_path / "wary.py").write_text("from lightbus import Lightbus\napp = Lightbus('wary')\n")
    done = subprocess.run(
        [sys.executable, "-m", "lightbus", "worker", "wary:app"],
        cwd=tmp_path,
        env={"LIGHTBUS_URL": url, "PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "TLS failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert "guest:guest" not in done.stderr
