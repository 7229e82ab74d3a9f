"""What blocks the event loop of a worker is logged with its name and stack, once, and counted."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import anyio
import pytest

from lightbus import Depends, Lightbus, Message, Next, errors
from lightbus.worker.health import report
from lightbus.worker.worker import Worker
from tests.bus import eventually
from tests.patience import LIMIT
from tests.processes import Program, lightbus

pytestmark = pytest.mark.anyio
BOTH_LOOPS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
AFTER = 0.2
"""Seconds: a small `blocked_after`."""

BUS = """\
import time
from lightbus import Lightbus

app = Lightbus("billing")

@app.event
class Block:
    seconds: float

@app.event
class Paid:
    number: int

@app.on(Block)
async def block(event: Block):
    print("blocking now", flush=True)
    time.sleep(event.seconds)

@app.on(Paid)
async def handle(paid: Paid):
    print("handled", paid.number, flush=True)
"""

FILES = {"billing/bus.py": BUS}


class Paid:
    number: int


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def app(sqlite_url: str) -> Lightbus:
    app = Lightbus("billing", url=sqlite_url)
    app.event("invoice.paid")(Paid)
    return app


@pytest.fixture
def block_until_logged(caplog: pytest.LogCaptureFixture) -> Callable[[], None]:
    """Blocks until the log has a line about it."""

    def block() -> None:
        deadline, before = time.monotonic() + LIMIT, len(blocked(caplog))
        while len(blocked(caplog)) == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return block


def blocked(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "blocked the event loop" in record.getMessage()]


@contextlib.asynccontextmanager
async def serving(app: Lightbus, **options: Any) -> AsyncIterator[Worker]:
    worker, stop = Worker(app, **{"blocked_after": AFTER, **options}), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.serve, stop)
        await eventually(lambda: worker.started)
        yield worker
        stop.set()


async def handle_one(app: Lightbus, worker: Worker, **options: Any) -> None:
    before = worker.consumer.handled
    await app.publish(app.events["invoice.paid"].cls(number=1), **options)
    await eventually(lambda: worker.consumer.handled, before + 1)


@BOTH_LOOPS
async def test_each_block_of_a_handler_is_logged_once_and_counted(
    app: Lightbus, caplog: pytest.LogCaptureFixture, block_until_logged: Callable[[], None]
) -> None:
    @app.on("invoice.paid")
    async def charge() -> None:
        block_until_logged()
        time.sleep(2 * AFTER)  # noqa: ASYNC251  # still the same block

    async with serving(app) as worker:
        await handle_one(app, worker)
        await handle_one(app, worker)
        assert worker.blocked == {"charge": 2}
        event_loop = report(worker).body["event_loop"]
        assert (event_loop["blocked"], event_loop["blocked_by"]) == (2, {"charge": 2})
    first, _ = blocked(caplog)
    assert re.match(
        r"The handler 'charge' on 'invoice\.paid' \(\S+\) in 'billing\.main' has blocked the event loop", first
    )
    assert "for 0.2 s or more: no other task runs meanwhile, and its timeout cannot stop it." in first
    assert "in block\n    " in first
    fields = next(record for record in caplog.records if "blocked the event loop" in record.getMessage()).lightbus  # type: ignore[attr-defined]
    assert (fields["handler"], fields["event"], fields["queue"]) == ("charge", "invoice.paid", "billing.main")


@BOTH_LOOPS
async def test_a_middleware_that_blocks_is_named_with_the_handler_that_it_surrounds(
    app: Lightbus, caplog: pytest.LogCaptureFixture, block_until_logged: Callable[[], None]
) -> None:
    @app.middleware
    async def outer(message: Message, call_next: Next) -> None:
        await call_next()

    @app.middleware
    async def audit(message: Message, call_next: Next) -> None:
        block_until_logged()
        await call_next()

    @app.on("invoice.paid")
    async def charge() -> None: ...

    async with serving(app) as worker:
        await handle_one(app, worker)
    (logged,) = blocked(caplog)
    assert re.match(r"The middleware '\S+\.audit' around handler 'charge' on 'invoice\.paid' ", logged)
    assert "the handler's timeout cannot stop it" in logged
    assert worker.blocked == {"charge": 1}


async def test_a_handler_within_middleware_and_its_dependency_are_the_handlers_own(
    app: Lightbus, caplog: pytest.LogCaptureFixture, block_until_logged: Callable[[], None]
) -> None:
    async def session(message: Message) -> str:
        if message.headers.get("first"):
            block_until_logged()
        return "session"

    @app.middleware
    async def audit(message: Message, call_next: Next) -> None:
        await call_next()

    @app.on("invoice.paid")
    async def charge(opened: Annotated[str, Depends(session)], message: Message) -> None:
        if not message.headers.get("first"):
            block_until_logged()

    async with serving(app) as worker:
        await handle_one(app, worker, headers={"first": True})
        await handle_one(app, worker)
    in_the_dependency, in_the_handler = blocked(caplog)
    assert in_the_dependency.startswith("The handler 'charge' on ")
    assert "in session\n" in in_the_dependency
    assert in_the_handler.startswith("The handler 'charge' on ")
    assert "in charge\n" in in_the_handler


@BOTH_LOOPS
async def test_a_lifespan_that_blocks_is_named_at_its_start_and_its_end(
    app: Lightbus, caplog: pytest.LogCaptureFixture, block_until_logged: Callable[[], None]
) -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
        block_until_logged()
        yield
        block_until_logged()

    app.lifespan = lifespan
    async with serving(app) as worker:
        assert worker.blocked == {"(lifespan)": 1}
    assert worker.blocked == {"(lifespan)": 2}
    for logged in blocked(caplog):
        assert logged.startswith("The lifespan of app 'billing' has blocked the event loop for 0.2 s or more")
        assert "in lifespan\n" in logged


async def test_a_start_after_slow_imports_is_not_a_block(app: Lightbus, caplog: pytest.LogCaptureFixture) -> None:
    while time.thread_time() < 1.5:  # what this thread has used before does not count
        pass

    @contextlib.asynccontextmanager
    async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
        time.sleep(0.3)  # noqa: ASYNC251  # longer than a look takes, shorter than the limit
        yield

    app.lifespan = lifespan
    async with serving(app, blocked_after=1.0) as worker:
        assert worker.blocked == {}
    assert blocked(caplog) == []


@BOTH_LOOPS
async def test_a_task_beside_the_handlers_is_counted_as_other(
    app: Lightbus, caplog: pytest.LogCaptureFixture, block_until_logged: Callable[[], None]
) -> None:
    async with serving(app) as worker:
        block_until_logged()  # this test is such a task
        assert worker.blocked == {"(other)": 1}
    (logged,) = blocked(caplog)
    assert logged.startswith("The code that runs beside the handlers has blocked the event loop")
    assert "test_a_task_beside_the_handlers_is_counted_as_other" in logged


async def test_a_call_that_keeps_pythons_lock_is_logged_when_it_returns(
    app: Lightbus, caplog: pytest.LogCaptureFixture
) -> None:
    size = 1_000_000
    while True:  # `sum` keeps the lock for all of this: no other thread runs meanwhile
        began = time.thread_time()
        sum(range(size))
        if time.thread_time() - began > AFTER:
            break
        size *= 2

    @app.on("invoice.paid")
    async def charge() -> None:
        deadline = time.monotonic() + LIMIT
        while not blocked(caplog):
            assert time.monotonic() < deadline
            sum(range(size))
            time.sleep(AFTER / 8)  # noqa: ASYNC251  # the watch gets to look
            await anyio.sleep(AFTER)

    async with serving(app, blocked_after=AFTER / 2) as worker:
        await handle_one(app, worker)
    assert worker.blocked == {"charge": 1}


async def test_with_0_nothing_is_watched(app: Lightbus) -> None:
    def watches() -> int:
        return sum(thread.name == "lightbus loop watch" for thread in threading.enumerate())

    await eventually(watches, 0)  # those of earlier tests end
    async with serving(app, blocked_after=0):
        assert watches() == 0
    async with serving(app):
        assert watches() == 1
    await eventually(watches, 0)
    with pytest.raises(errors.InvalidOption, match="blocked_after=-1: use seconds, or 0 for never"):
        Worker(app, blocked_after=-1)


# --- lightbus worker --------------------------------------------------------------------------


def publish(folder: Path, url: str, *arguments: str) -> None:
    done = lightbus("publish", "billing.bus:app", *arguments, folder=folder, url=url)
    assert done.returncode == 0, done.stderr


def test_the_worker_logs_it_and_a_stopped_process_is_not_blocked(folder: Path, sqlite_url: str) -> None:
    options = ("--blocked-after", "0.3", "--json-logs")
    with Program("worker", "billing.bus:app", *options, folder=folder, url=sqlite_url) as running:
        running.wait_for("Ready")
        running.signal(signal.SIGSTOP)
        time.sleep(0.7)  # longer than the limit
        running.signal(signal.SIGCONT)
        publish(folder, sqlite_url, "paid", "number=1")
        running.wait_for("handled 1")
        assert "blocked the event loop" not in running.output
        publish(folder, sqlite_url, "block", "seconds=1.5")
        running.wait_for("blocking now")
        line = json.loads(running.wait_for("^.*has blocked the event loop.*$")[0])
        assert running.end(signal.SIGTERM) == 0
    assert (line["level"], line["handler"], line["event"]) == ("warning", "block", "block")
    assert "time.sleep(event.seconds)" in line["message"]
    assert running.output.count("blocked the event loop") == 1


def test_the_default_is_a_second_and_0_turns_it_off() -> None:
    from lightbus.cli.worker import worker
    from lightbus.worker.loop_watch import BLOCKED_AFTER

    (option,) = [one for one in worker.params if one.name == "blocked_after"]
    assert option.default == BLOCKED_AFTER == 1.0
    assert option.type.min == 0  # type: ignore[attr-defined]
