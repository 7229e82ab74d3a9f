"""On RabbitMQ, the broker's user decides what the page shows and does: here, an app's own user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lightbus import Lightbus
from lightbus.catalog import storage
from lightbus.catalog.contract import contract_of
from lightbus.cli import topology as topology_command
from lightbus.connection.declare import declare
from lightbus.transport import Publication
from lightbus.wire.topology import Topology, bus_exchange, catalog_stream
from tests import rabbitmq as nodes
from tests.browser import Browser
from tests.bus import connected, publish_confirmed
from tests.integration.test_dead import app_of, put_dead_letters, ready
from tests.patience import wait_until
from tests.web.conftest import ask, serving

pytestmark = pytest.mark.rabbitmq

BILLING = """\
from lightbus import Lightbus

app = Lightbus("billing")
app.on("invoice.*", name="charge")(lambda body: None)
app.on("invoice.*", name="close", queue="closed")(lambda body: None)
"""


@pytest.fixture
def own_url(rabbitmq: nodes.Node, rabbitmq_url: str, tmp_path: Path) -> str:
    """Of billing's user, which has the printed permissions. Billing has two dead letters, audit has one."""
    (tmp_path / "billing.py").write_text(BILLING)
    vhost = urlsplit(rabbitmq_url).path[1:]
    put_dead_letters(rabbitmq_url, 2)
    audit = Lightbus("audit", url=rabbitmq_url)
    audit.on("#", name="note")(lambda body: None)
    with connected(rabbitmq_url) as connection:
        declare(connection, Topology(exchanges=(bus_exchange(),), queues=(catalog_stream(),)))
        declare(connection, audit.topology())
        publish_confirmed(connection, Publication("audit.internal", "dead", b"{}", {}))
    storage.publish(audit.broker, contract_of(audit))
    rabbitmq.add_users(vhost, {f"billing-{vhost}": topology_command.rules(app_of(rabbitmq_url))}, "s3cr3t")
    return rabbitmq.vhost_url(vhost, f"billing-{vhost}", "s3cr3t")


@pytest.fixture
def address(own_url: str, tmp_path: Path) -> Iterator[str]:
    with serving("billing:app", "--allow-actions", folder=tmp_path, url=own_url) as one:
        yield one


def test_an_apps_own_user_retries_its_dead_letters_and_no_others(
    address: str, own_url: str, rabbitmq_url: str, chromium: Browser
) -> None:
    assert "1 app, 0 events" in ask(address).text
    chromium.visit(f"{address}/dead/billing")
    chromium.evaluate("document.querySelector('input[name=letter]').click()")
    chromium.click("Retry selected …")
    chromium.click("Retry now")
    assert "1 of 1 retried." in chromium.text()
    counts = "billing.main", "billing.dead"
    wait_until(lambda: [ready(rabbitmq_url, queue) for queue in counts] == [1, 1], "one is back, and one is left")

    others = ask(f"{address}/dead/audit")
    assert others.status == 503
    assert "permission missing" in others.text
    assert "s3cr3t" not in others.text

    assert "0 events within 3 s." in ask(f"{address}/tail?collect=1").text


def test_without_the_app_its_user_is_told_how_to_see_live_events(own_url: str, tmp_path: Path) -> None:
    with serving(folder=tmp_path, url=own_url) as address:
        page = ask(f"{address}/tail?collect=1")
        assert "permission missing" in page.text
        assert "An app&#39;s own user can start: lightbus web MODULE:ATTR." in page.text
        assert "lightbus web MODULE:ATTR" in ask(f"{address}/tail/events").text
