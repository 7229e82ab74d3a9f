"""Runs the programs of the documentation in two terminals, on the embedded broker and on RabbitMQ."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import anyio
import pytest

from lightbus import Lightbus
from lightbus.connection.dial import BrokerAddresses
from tests import rabbitmq as nodes
from tests.patience import LIMIT, wait_until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


class Terminal:
    """A command that runs in docs/examples, and what it prints."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=EXAMPLES,
            env={**os.environ, "LIGHTBUS_URL": url, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.printed = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line

    def shows(self, text: str) -> None:
        """Wait until it is printed."""
        try:
            wait_until(lambda: text in self.printed, repr(text))
        except AssertionError as error:
            raise AssertionError(f"{error} in:\n{self.printed}") from None

    def end(self) -> int:
        """Wait for the end, and return the exit status."""
        status = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        return status

    def stop(self) -> int:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.end()


@pytest.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The broker of all terminals: an embedded one, or RabbitMQ."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/bus.db"
    found: str = request.getfixturevalue("rabbitmq_url")
    return found


@pytest.fixture
def terminal(url: str) -> Iterator[Callable[..., Terminal]]:
    """`terminal("auth.py")` runs it; processes that are still running at the end of the test are stopped."""
    opened: list[Terminal] = []

    def open_one(*arguments: str) -> Terminal:
        opened.append(Terminal(url, *arguments))
        return opened[-1]

    yield open_one
    for one in opened:
        one.process.kill()
        one.process.wait()


def test_the_first_example_of_the_readme_handles_what_it_publishes(terminal: Callable[..., Terminal]) -> None:
    worker = terminal("-m", "lightbus", "worker", "hello:app")
    worker.shows("Ready:")
    assert terminal("-m", "lightbus", "publish", "hello:app", "order.placed", "order_id=7").end() == 0
    worker.shows("Receipt for order 7")
    assert worker.stop() == 0


def test_the_two_apps_of_the_readme_work_as_shown(terminal: Callable[..., Terminal]) -> None:
    early = terminal("auth.py")
    assert early.end() == 0
    assert early.printed == "Confirmed, but not routed: start the worker first.\n"

    listener = terminal("-m", "lightbus", "worker", "welcome:app")
    listener.shows("Ready: 'welcome' waits for events.")
    assert terminal("auth.py").end() == 0
    listener.shows("Welcome, someone@example.com! (user.registered from auth)")
    event = ("auth:app", "user.registered", "user_id=2", "email=someone.else@example.com")
    command = terminal("-m", "lightbus", "publish", *event)
    assert command.end() == 0, command.printed
    assert re.fullmatch(r"Published user.registered [-0-9a-f]{36}: confirmed, routed.\n", command.printed)
    listener.shows("Welcome, someone.else@example.com! (user.registered from auth)")
    assert listener.stop() == 0

    while_down = terminal("auth.py")
    assert while_down.end() == 0
    assert while_down.printed == "Confirmed.\n"
    again = terminal("-m", "lightbus", "worker", "welcome:app")
    again.shows("Welcome, someone@example.com! (user.registered from auth)")
    assert again.stop() == 0


def test_the_banner_in_the_readme_matches_the_worker(terminal: Callable[..., Terminal]) -> None:
    listener = terminal("-m", "lightbus", "worker", "welcome:app")
    listener.shows("Ready:")
    readme = (ROOT / "README.md").read_text()
    for line in listener.printed.splitlines():
        if line.startswith("  broker "):
            continue
        without_time = re.sub(r"^[-0-9]{10} [:.0-9]{12} ", "", line)
        assert without_time in readme, line


@pytest.mark.rabbitmq
def test_an_event_of_a_program_without_lightbus_is_handled(rabbitmq_url: str) -> None:
    pytest.importorskip("pika")
    Terminal(rabbitmq_url, "auth.py").end()  # declares the exchange
    listener = Terminal(rabbitmq_url, "-m", "lightbus", "worker", "welcome:app")
    try:
        listener.shows("Ready:")
        foreign = Terminal(rabbitmq_url, "foreign.py", rabbitmq_url)
        assert foreign.end() == 0, foreign.printed
        listener.shows("Welcome, another@example.com! (user.registered from auth)")
        assert listener.stop() == 0
    finally:
        listener.process.kill()


def test_billing_charges_rejects_and_reports(terminal: Callable[..., Terminal], url: str) -> None:
    shop = Lightbus("shop", url=url)

    @shop.event
    class OrderPlaced:
        order_id: str
        amount: Decimal

    worker = terminal("-m", "lightbus", "worker", "billing:app")
    worker.shows("Ready:")
    with shop:
        shop.publish_many_sync(
            [OrderPlaced(order_id="o-1", amount=Decimal("9.50")), OrderPlaced(order_id="o-2", amount=Decimal(0))]
        )
    worker.shows("'invoice_id': 'o-1'")
    worker.shows("(attempt 1, ")
    worker.shows("Reject: nothing to pay; dead-lettered to billing.dead")
    assert worker.stop() == 0
    assert "invoice.due" not in worker.printed, "that is two weeks away"

    connection = BrokerAddresses.parse(url).connect("test")
    dead = connection.channel().get("billing.dead")
    assert dead is not None
    assert dead.properties["headers"]["lightbus-error-message"] == "nothing to pay"
    connection.close()


@pytest.mark.rabbitmq
def test_the_readmes_permissions_are_enough_and_no_more(rabbitmq: nodes.Node, rabbitmq_url: str) -> None:
    """The line is read from the README, so the documented line is tested."""
    readme = (ROOT / "README.md").read_text()
    line = re.search(r"rabbitmqctl set_permissions --vhost / billing '(.+)' '(.+)' '(.+)'", readme)
    assert line is not None
    vhost = rabbitmq_url.rsplit("/", 1)[1]
    user = f"billing-{vhost}"
    rabbitmq.ctl("add_user", user, "secret")
    rabbitmq.ctl("set_permissions", "--vhost", vhost, user, *line.groups())
    restricted = rabbitmq.vhost_url(vhost, user, "secret")

    async def hears_itself() -> None:
        app = Lightbus("billing", url=restricted)

        @app.event
        class InvoicePaid:
            amount: int

        handled: list[int] = []
        both = anyio.Event()

        @app.on(InvoicePaid)
        async def handle(paid: InvoicePaid) -> None:
            handled.append(paid.amount)
            if len(handled) == 2:
                both.set()

        consumer = app.consumer()
        async with app, anyio.create_task_group() as tasks:
            await tasks.start(consumer.run)
            await app.publish(InvoicePaid(amount=1))
            await app.publish(InvoicePaid(amount=2), delay=1)
            with anyio.fail_after(LIMIT):
                await both.wait()
            await consumer.stop(5)

    with Lightbus("first", url=rabbitmq_url):
        pass
    anyio.run(hears_itself)
