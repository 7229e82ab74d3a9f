"""`amqps://` on a real node with certificates of the test's own: who is trusted, and what is said to who is not."""

from __future__ import annotations

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
from tests.bus import OrderPlaced, eventually, running
from tests.conformance.conftest import declare_orders
from tests.patience import LIMIT, until_listening, within
from tests.rabbitmq import Node, free_port

trustme = pytest.importorskip("trustme", reason="the TLS tests make their certificates with trustme: install it")

pytestmark = [pytest.mark.rabbitmq, pytest.mark.anyio]


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
    """A node that takes TLS on a port of its own."""

    node: Node
    port: int
    authority: Authority

    def url(self, *options: str, host: str = "localhost") -> str:
        return f"amqps://guest:guest@{host}:{self.port}/" + ("?" + "&".join(options) if options else "")

    @property
    def trusted(self) -> str:
        return f"cafile={self.authority.file}"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One that the node knows nothing of."""
    return Authority(tmp_path_factory.mktemp("other-authority"))


class Nodes:
    """A node takes seconds to start, so those with the same options are shared by the tests of this module."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.started: dict[str, Secured] = {}

    def get(self, kind: str) -> Secured:
        from tests.conftest import need_rabbitmq

        need_rabbitmq()
        if kind not in self.started:
            certificate, key = self.authority.issue(kind, "localhost", expired=kind == "expired")
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
            self.started[kind] = Secured(node, port, self.authority)
            node.start()
            until_listening(port)
        return self.started[kind]


@pytest.fixture(scope="module")
def nodes(authority: Authority) -> Iterator[Nodes]:
    nodes = Nodes(authority)
    yield nodes
    for secured in nodes.started.values():
        secured.node.close()


def refused(url: str) -> str:
    """What is said to who is not let in, by everything that connects."""
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
    assert "guest:guest" not in words + str(by_publishing.value)
    return words


async def heard(url: str) -> None:
    """An event goes out, and comes in, over this URL."""
    shop, billing = declare_orders(Lightbus("shop", url=url)), Lightbus("billing", url=url)
    numbers: list[int] = []

    @billing.on("order.placed")
    async def note(order: OrderPlaced) -> None:
        numbers.append(order.number)

    async with running(shop, billing) as bus:
        (consumer,) = bus.consumers["billing"]
        await shop.publish(OrderPlaced(number=1))
        # A TLS layer may hold back what it has read of a socket that shows nothing more to whoever watches it.
        await eventually(lambda: consumer.read_by_loop and shop.publisher.read_by_loop)
        await shop.publish_many([OrderPlaced(number=n, note="x" * 50_000) for n in range(2, 40)])
        await shop.publish_many([OrderPlaced(number=n) for n in range(40, 2000)])
        await eventually(lambda: sorted(numbers), [*range(1, 2000)])
        await eventually(lambda: consumer.read_by_loop)
    for app in (shop, billing):
        await anyio.to_thread.run_sync(app.__exit__, None, None, None)


async def test_events_go_over_tls_where_the_authority_is_known(nodes: Nodes) -> None:
    node = nodes.get("plain")
    await heard(node.url(node.trusted))
    assert "TLS" in await anyio.to_thread.run_sync(lambda: _protocols(node))


async def test_the_next_address_of_a_name_is_verified_by_that_name(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = nodes.get("plain")
    lookup = socket.getaddrinfo

    def resolve(host: str, *arguments: Any, **options: Any) -> list[Any]:
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "localhost" else [host]
        return [found for one in hosts for found in lookup(one, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.create_server(("127.0.0.2", node.port)):  # takes connections, and never says hello
        await heard(node.url(node.trusted, "connect_timeout=2"))


def _protocols(secured: Secured) -> str:
    app = declare_orders(Lightbus("shop", url=secured.url(secured.trusted)))
    with app:
        listed: str = secured.node.ctl("list_connections", "ssl", "ssl_protocol")
        assert "true" in listed
        return listed.replace("tls", "TLS")


def test_an_unknown_authority_is_refused(nodes: Nodes, other_authority: Authority) -> None:
    node = nodes.get("plain")
    words = refused(node.url(f"cafile={other_authority.file}"))
    assert "CERTIFICATE_VERIFY_FAILED" in words
    assert "?cafile=" in words


def test_the_systems_authorities_count_where_none_is_named(nodes: Nodes) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in refused(nodes.get("plain").url())


def test_a_certificate_for_another_host_is_refused(nodes: Nodes) -> None:
    node = nodes.get("plain")
    words = refused(node.url(node.trusted, host="127.0.0.1"))
    assert "127.0.0.1" in words
    assert "Check that the host name matches the certificate" in words


def test_an_expired_certificate_is_refused(nodes: Nodes) -> None:
    node = nodes.get("expired")
    assert "certificate has expired" in refused(node.url(node.trusted))


async def test_a_client_certificate_lets_in(nodes: Nodes, authority: Authority) -> None:
    node = nodes.get("client")
    certificate, key = authority.issue("good-client", "billing.example")
    await heard(node.url(node.trusted, f"certfile={certificate}", f"keyfile={key}"))


def test_without_a_client_certificate_nobody_gets_in(nodes: Nodes) -> None:
    node = nodes.get("client")
    assert "?certfile=" in refused(node.url(node.trusted)) or "certfile=" in refused(node.url(node.trusted))


def test_a_client_certificate_of_an_unknown_authority_is_refused(nodes: Nodes, other_authority: Authority) -> None:
    node = nodes.get("client")
    certificate, key = other_authority.issue("bad-client", "billing.example")
    assert "certfile=" in refused(node.url(node.trusted, f"certfile={certificate}", f"keyfile={key}"))


@pytest.mark.parametrize("option", ["cafile", "certfile", "keyfile"])
def test_a_file_that_is_not_there_is_named(nodes: Nodes, authority: Authority, option: str) -> None:
    node = nodes.get("client")
    certificate, key = authority.issue("named-client", "billing.example")
    files = {"cafile": authority.file, "certfile": certificate, "keyfile": key, option: Path("/nowhere/at-all.pem")}
    words = refused(node.url(*(f"{name}={path}" for name, path in files.items())))
    assert "/nowhere/at-all.pem" in words


def test_a_port_without_tls_is_refused(nodes: Nodes) -> None:
    node = nodes.get("plain")
    words = refused(f"amqps://guest:guest@localhost:{node.node.port}/?{node.trusted}")
    assert "the server does not speak TLS" in words
    assert "5671 for amqps:// and 5672 for amqp://" in words


def test_plain_amqp_to_a_tls_port_is_an_error_and_no_hang(nodes: Nodes) -> None:
    node = nodes.get("plain")
    app = declare_orders(Lightbus("shop", url=f"amqp://guest:guest@localhost:{node.port}/", publish_timeout=8))
    with within(8), pytest.raises(errors.BrokerError), app:
        pass
    app.__exit__(None, None, None)


def test_a_worker_that_is_not_let_in_says_why(nodes: Nodes, other_authority: Authority, tmp_path: Path) -> None:
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
