"""The broker refuses the publishing connection: no event is dead-lettered for that, and the worker logs the reason."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from lightbus import Lightbus, Message, Retry, errors
from lightbus.worker.health import report
from lightbus.worker.worker import Worker
from tests.bus import QUICK, OrderPlaced, eventually, stranger, take_all
from tests.conformance.conftest import declare_orders
from tests.patience import LIMIT, within
from tests.processes import Program, lightbus
from tests.rabbitmq import Node

pytestmark = pytest.mark.anyio

FILES = {
    "billing.py": """\
import logging
import os
import resource
import threading

from lightbus import Lightbus, Message, Retry

app = Lightbus("billing", retry=Retry(delays=(0.2, 0.2, 0.2)))
leaked = []


class FreesThem(logging.Handler):
    def emit(self, record):
        if "too many open files" in record.getMessage():
            while leaked:
                os.close(leaked.pop())


logging.getLogger("lightbus").addHandler(FreesThem())


@app.on("order.placed")
async def charge(order: dict, message: Message) -> None:
    if message.attempt == 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            while True:
                leaked.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            raise ValueError("the bank is busy") from None
    print("charged at attempt", message.attempt, flush=True)
"""
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def serving(app: Lightbus) -> AsyncIterator[Worker]:
    worker, stop = Worker(app), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.serve, stop)
        await eventually(lambda: worker.started)
        yield worker
        stop.set()


class User:
    """A user of a new virtual host, whose access a test removes and restores."""

    def __init__(self, node: Node, url: str) -> None:
        self.node = node
        self.vhost = url.rpartition("/")[2]
        self.name = f"user-{self.vhost}"
        self.url = node.vhost_url(self.vhost, self.name, "old")
        node.ctl("add_user", self.name, "old")
        self.permit(".*")

    def permit(self, write: str) -> None:
        self.node.ctl("set_permissions", "-p", self.vhost, self.name, ".*", write, ".*")

    def password(self, password: str) -> None:
        self.node.ctl("change_password", self.name, password)

    def limit(self, connections: int) -> None:
        self.node.ctl("set_user_limits", self.name, json.dumps({"max-connections": connections}))

    def limit_vhost(self, connections: int) -> None:
        self.node.ctl("set_vhost_limits", "-p", self.vhost, json.dumps({"max-connections": connections}))


WAYS: dict[str, tuple[Callable[[User], object], Callable[[User], object], str, str]] = {
    "new password": (lambda u: u.password("new"), lambda u: u.password("old"), "user name or password", "LIGHTBUS_URL"),
    "user's limit": (lambda u: u.limit(1), lambda u: u.limit(-1), "connection limit (1) is reached", "set_user_limits"),
    "virtual host's limit": (
        lambda u: u.limit_vhost(0),
        lambda u: u.limit_vhost(-1),
        "connection limit (0) is reached",
        "set_vhost_limits",
    ),
    "permission": (
        lambda u: u.permit(r"^(?!billing\.internal$).*"),
        lambda u: u.permit(".*"),
        "permission missing",
        "set_permissions",
    ),
}


@pytest.fixture
def user(rabbitmq: Node, rabbitmq_url: str) -> Iterator[User]:
    user = User(rabbitmq, rabbitmq_url)
    yield user
    rabbitmq.ctl("delete_user", user.name)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("way", WAYS)
async def test_a_failed_event_waits_while_publishing_is_refused_and_is_retried_afterwards(
    way: str, user: User, rabbitmq_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    refuse, allow, reason, next_step = WAYS[way]
    billing = Lightbus("billing", url=user.url, retry=QUICK, publish_timeout=1)
    attempts: list[int] = []

    @billing.on("order.placed")
    async def charge(order: OrderPlaced, message: Message) -> None:
        attempts.append(message.attempt)
        if message.attempt == 1:
            raise ConnectionError("the bank is busy")

    shop = declare_orders(Lightbus("shop", url=rabbitmq_url))
    with shop:
        async with serving(billing) as worker:
            await eventually(lambda: report(worker).ready)
            await anyio.to_thread.run_sync(refuse, user)
            await shop.publish(OrderPlaced(number=1))
            with caplog.at_level(logging.ERROR, "lightbus"):
                await eventually(lambda: reason in caplog.text and "trying again" in caplog.text)
            assert next_step in caplog.text
            assert "add_vhost" not in caplog.text
            found = await eventually(lambda: next((r for r in [report(worker)] if not r.ready), None))
            assert found.live
            assert reason in " ".join(found.problems)
            assert "nothing can be retried" in " ".join(found.problems)
            assert attempts == [1]
            await anyio.to_thread.run_sync(allow, user)
            await eventually(lambda: attempts, [1, 2])
            await eventually(lambda: report(worker).ready)
    assert take_all(shop, "billing.dead") == []


@pytest.mark.rabbitmq
@pytest.mark.parametrize("way", [way for way in WAYS if way != "permission"])
async def test_a_program_that_could_publish_retries_until_its_timeout_and_names_the_reason(
    way: str, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    refuse, allow, reason, next_step = WAYS[way]
    shop = declare_orders(Lightbus("shop", url=user.url))
    with shop:
        await shop.publish(OrderPlaced(number=1))
    if way == "user's limit":
        user.limit(0)
    else:
        await anyio.to_thread.run_sync(refuse, user)
    with within(6), pytest.raises(errors.PublishUnreachable) as refused:
        await shop.publish(OrderPlaced(number=2), timeout=6)
    text = str(refused.value)
    assert "was not sent within 6 s" in text
    assert reason.replace("(1)", "(0)") in text
    assert next_step in text
    assert "add_vhost" not in text
    async with anyio.create_task_group() as tasks:
        receipts: list[Any] = []

        async def publish() -> None:
            receipts.append(await shop.publish(OrderPlaced(number=3), timeout=LIMIT))

        tasks.start_soon(publish)
        await eventually(lambda: shop.publisher.error is not None)
        assert not receipts
        await anyio.to_thread.run_sync(allow, user)
        await eventually(lambda: len(receipts), 1)
    shop.__exit__(None, None, None)


@pytest.mark.rabbitmq
async def test_a_worker_that_starts_at_a_connection_limit_waits_for_room(
    user: User, caplog: pytest.LogCaptureFixture
) -> None:
    billing = Lightbus("billing", url=user.url)
    billing.on("order.placed")(lambda: None)
    await anyio.to_thread.run_sync(user.limit, 0)
    async with anyio.create_task_group() as tasks:
        worker, stop = Worker(billing), anyio.Event()
        tasks.start_soon(worker.serve, stop)
        await eventually(lambda: "connection limit (0) is reached" in caplog.text)
        await anyio.to_thread.run_sync(user.limit, -1)
        await eventually(lambda: worker.started)
        stop.set()


async def test_an_exchange_that_was_deleted_while_retries_wait_is_declared_again(broker_url: str) -> None:
    billing = Lightbus("billing", url=broker_url, retry=Retry(delays=(0.05, 0.05, 0.05)), publish_timeout=LIMIT)
    attempts: list[int] = []

    @billing.on("order.placed")
    async def charge(order: OrderPlaced, message: Message) -> None:
        if not attempts:
            async with stranger(billing) as channel:
                await anyio.to_thread.run_sync(channel.exchange_delete, "billing.internal")
        attempts.append(message.attempt)
        if message.attempt == 1 and len(attempts) < 2:
            raise ConnectionError("the bank is busy")

    shop = declare_orders(Lightbus("shop", url=broker_url))
    with shop:
        async with serving(billing):
            await shop.publish(OrderPlaced(number=1))
            await eventually(lambda: len(attempts) >= 2)
    assert take_all(billing, "billing.dead") == []


def test_a_worker_without_file_descriptors_keeps_its_failed_events(folder: Path, url: str) -> None:
    # The thread that publishes a contract has descriptors, too, and gives them back.
    with Program("worker", "billing:app", "--no-contract", folder=folder, url=url) as worker:
        worker.wait_for("Ready")
        shop = declare_orders(Lightbus("shop", url=url))
        with shop:
            shop.publish_sync(OrderPlaced(number=1))
        worker.wait_for("too many open files")
        worker.wait_for("charged at attempt 2")
        assert worker.end(signal.SIGTERM) == 0
    assert "No dead letters" in lightbus("dead", "list", "billing:app", folder=folder, url=url).stdout
