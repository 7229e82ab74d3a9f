"""The inbox: what a handler does to the database happens once, however often its event is delivered."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import anyio
import anyio.to_thread
import attrs
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from lightbus import Depends, Lightbus, Message, Outcome, Retry, errors
from lightbus.outbox import Inbox, Outbox, sweep
from lightbus.outbox import inbox as inboxes
from lightbus.worker.worker import serve
from tests.bus import Bus, OrderPlaced, dead_letters, declare, eventually, publish_plainly, reason, running, stranger
from tests.databases import Database, checked_out, dispose, entries, lost_connections_reported
from tests.patience import LIMIT

pytestmark = pytest.mark.anyio

QUICK = Retry(delays=(0.01, 0.02, 0.05, 0.1, 0.2))
LONG = 3600.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@attrs.frozen
class Billing:
    """An app whose handlers have an inbox, and an app that publishes."""

    app: Lightbus
    shop: Lightbus
    database: Database
    engine: Any
    inbox: Inbox
    outcomes: list[Outcome]
    url: str

    def on(self, work: Callable[[Any, Message], Any], **options: Any) -> None:
        """A handler of the database's kind, which inserts an entry, and then calls `work(session, message)`. It awaits
        what that returns, if the handler is async.
        """
        if self.database.is_async:

            async def bill(order: OrderPlaced, session: AsyncSession, message: Message) -> None:
                await session.execute(sa.insert(entries).values(name=f"order {order.number}"))
                returned = work(session, message)
                if returned is not None:
                    await returned
        else:

            def bill(order: OrderPlaced, session: Session, message: Message) -> None:  # type: ignore[misc]
                session.execute(sa.insert(entries).values(name=f"order {order.number}"))
                work(session, message)

        self.app.on("order.placed", inbox=self.inbox, **options)(bill)

    def kinds(self) -> list[str]:
        return [one.kind for one in self.outcomes if one.message.event == "order.placed"]

    async def publish(self, number: int, id: str | None = None) -> None:
        await self.shop.publish(OrderPlaced(number=number), id=id)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[Bus]:
        async with running(self.shop, self.app) as bus:
            yield bus


@contextlib.asynccontextmanager
async def open_billing(database: Database, **options: Any) -> AsyncGenerator[Billing]:
    url = f"memory://{uuid.uuid4().hex}"
    shop, app = Lightbus("shop", url=url), Lightbus("billing", url=url, retry=QUICK)
    shop.event(OrderPlaced)
    outcomes: list[Outcome] = []
    app.observe(outcomes.append)
    engine = database.engine(**options)
    yield Billing(app, shop, database, engine, Inbox(app, database.sessions(engine)), outcomes, url)
    await eventually(lambda: checked_out(engine), 0)
    await dispose(engine)


@pytest.fixture
async def billing(database: Database) -> AsyncGenerator[Billing]:
    async with open_billing(database) as billing:
        yield billing


def nothing(session: Any, message: Message) -> None:
    """What a handler does that only inserts its entry."""


# --- duplicates -------------------------------------------------------------------------------


async def test_a_duplicate_is_skipped(billing: Billing) -> None:
    billing.on(nothing)
    async with billing.running():
        await billing.publish(1, id="a")
        await eventually(billing.kinds, ["handled"])
        await billing.publish(1, id="a")
        await eventually(billing.kinds, ["handled", "skipped"])
        await billing.publish(1, id="b")
        await eventually(billing.kinds, ["handled", "skipped", "handled"])
    assert billing.database.entries() == ["order 1", "order 1"]
    assert billing.database.handled() == [("billing.bill", "a"), ("billing.bill", "b")]


async def test_of_duplicates_at_the_same_time_one_is_handled(billing: Billing) -> None:
    """Two workers have them at once: the second one waits for the transaction of the first."""
    begun = 0

    def work(session: Any, message: Message) -> Any:
        nonlocal begun
        begun += 1
        return anyio.sleep(0.01) if billing.database.is_async else time.sleep(0.01)

    billing.on(work)
    async with running(billing.shop, billing.app, billing.app):
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                for _ in range(4):
                    tasks.start_soon(billing.publish, number, f"id-{number}")
        await eventually(lambda: len([kind for kind in billing.kinds() if kind in ("handled", "skipped")]), 40)
    assert billing.kinds().count("handled") == 10
    assert billing.database.entries() == sorted(f"order {number}" for number in range(10))
    assert begun >= 10


async def test_each_handler_has_its_own_inbox(billing: Billing) -> None:
    billing.on(nothing)
    billing.on(nothing, name="audit")
    async with billing.running():
        for _ in range(2):
            await billing.publish(1, id="a")
        await eventually(lambda: sorted(billing.kinds()), ["handled", "handled", "skipped", "skipped"])
    assert billing.database.handled() == [("billing.audit", "a"), ("billing.bill", "a")]
    assert billing.database.entries() == ["order 1", "order 1"]


async def test_two_apps_share_a_database(billing: Billing) -> None:
    shipping = Lightbus("shipping", url=billing.url)
    inbox = Inbox(shipping, billing.database.sessions(billing.engine), keep=timedelta(hours=1))
    other = attrs.evolve(billing, app=shipping, inbox=inbox)
    billing.on(nothing)
    other.on(nothing)
    async with running(billing.shop, billing.app, shipping):
        await billing.publish(1, id="a")
        await eventually(lambda: len(billing.database.handled()), 2)
    assert billing.database.handled() == [("billing.bill", "a"), ("shipping.bill", "a")]
    billing.database.execute("UPDATE lightbus_inbox SET handled_at = handled_at - 7200")
    assert await inbox.sweep() == 1  # not the one that the other app keeps longer
    assert billing.database.handled() == [("billing.bill", "a")]
    await billing.publish(2)


@pytest.mark.parametrize("message_id", [None, "a\0b\x07"])
async def test_a_message_of_another_program_is_handled(billing: Billing, message_id: str | None) -> None:
    """It has no id, or one with characters that a database refuses."""
    billing.on(nothing)
    async with billing.running(), stranger(billing.shop) as channel:
        properties: dict[str, Any] = {} if message_id is None else {"message_id": message_id}
        for _ in range(2):
            await anyio.to_thread.run_sync(
                publish_plainly, channel, "shop", "order.placed", b'{"number": 1}', dict(properties)
            )
        await eventually(lambda: sorted(billing.kinds()), ["handled", "handled" if message_id is None else "skipped"])


# --- failures ---------------------------------------------------------------------------------


async def test_a_failed_attempt_leaves_nothing_and_its_retry_is_handled(billing: Billing) -> None:
    seen: list[Any] = []

    def work(session: Any, message: Message) -> Any:
        seen.append((not billing.database.is_sqlite and billing.database.handled(), message.attempt))
        if len(seen) < 3:
            raise LookupError("no such customer")

    billing.on(work)
    async with billing.running():
        await billing.publish(1, id="a")
        await eventually(billing.kinds, ["retried", "retried", "handled"])
        await billing.publish(1, id="a")
        await eventually(lambda: billing.kinds()[3:], ["skipped"])
    assert [attempt for _, attempt in seen] == [1, 2, 3]
    assert not any(handled for handled, _ in seen)
    assert billing.database.entries() == ["order 1"]


async def test_a_dead_letter_that_is_sent_again_is_handled(billing: Billing) -> None:
    fails = [True] * 6

    def work(session: Any, message: Message) -> Any:
        if fails:
            fails.pop()
            raise LookupError("no such customer")

    billing.on(work)
    async with billing.running():
        await billing.publish(1, id="a")
        await eventually(lambda: billing.kinds()[-1:], ["dead"])
        assert billing.database.handled() == []
        await billing.publish(1, id="a")
        await eventually(lambda: billing.kinds()[-1:], ["handled"])
    assert billing.database.entries() == ["order 1"]


async def test_a_handler_that_exceeds_its_timeout_leaves_nothing(billing: Billing) -> None:
    if not billing.database.is_async:
        pytest.skip("a sync handler runs on in its thread; its retry then waits for its transaction")
    seen = 0

    async def sleep_at_first() -> None:
        nonlocal seen
        seen += 1
        if seen < 3:
            await anyio.sleep(LONG)

    billing.on(lambda session, message: sleep_at_first(), timeout=0.3, retry=Retry(delays=(0.05,) * 100))
    async with billing.running():
        await billing.publish(1, id="a")
        await eventually(lambda: billing.kinds()[-1:], ["handled"])
        assert billing.kinds().count("retried") >= 2
        await eventually(lambda: checked_out(billing.engine), 0)
    assert billing.database.entries() == ["order 1"]


async def test_a_sync_handler_that_exceeds_its_timeout_is_not_done_twice(billing: Billing) -> None:
    if billing.database.is_async:
        pytest.skip("an async handler is cancelled")
    goes_on, begun = threading.Event(), 0

    def work(session: Any, message: Message) -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            assert goes_on.wait(LONG)

    billing.on(work, timeout=0.3, retry=Retry(delays=(0.05,) * 100))
    async with billing.running():
        await billing.publish(1, id="a")
        await eventually(lambda: billing.kinds()[:1], ["retried"])
        goes_on.set()
        await eventually(lambda: "skipped" in billing.kinds())
    assert begun == 1
    assert billing.database.entries() == ["order 1"]


async def test_a_worker_that_is_cancelled_leaves_nothing(billing: Billing) -> None:
    """Sooner and later after its handler has begun."""
    if not billing.database.is_async:
        pytest.skip("a sync handler is not cancelled")
    begun = anyio.Event()

    async def begin() -> None:
        begun.set()
        await anyio.sleep(0.005)

    billing.on(lambda session, message: begin())
    await declare(billing.shop, billing.app)
    with lost_connections_reported():
        async with billing.shop:
            for number in range(25):
                begun = anyio.Event()
                await billing.publish(number, id=f"id-{number}")
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(serve, billing.app)
                    with anyio.fail_after(LIMIT):
                        await begun.wait()
                    await anyio.sleep(0.0005 * number)
                    tasks.cancel_scope.cancel()
                await eventually(lambda: checked_out(billing.engine), 0)
                # A server may still commit what it got just before the connection was closed.
                await eventually(lambda: len(billing.database.entries()) - len(billing.database.handled()), 0)
        async with billing.running():
            await eventually(lambda: len(billing.database.handled()), 25)
    assert billing.database.entries() == sorted(f"order {number}" for number in range(25))


async def test_a_commit_that_fails_leaves_nothing(billing: Billing) -> None:
    if not billing.database.is_postgres:
        pytest.skip("needs a constraint that is checked at the commit")
    billing.database.execute("ALTER TABLE entries ADD UNIQUE (name) DEFERRABLE INITIALLY DEFERRED")
    billing.database.execute("INSERT INTO entries VALUES ('order 1')")
    billing.on(nothing)
    async with billing.running():
        await billing.publish(1, id="a")
        await eventually(lambda: "retried" in billing.kinds())
        assert billing.database.handled() == []
        billing.database.execute("DELETE FROM entries")
        await eventually(lambda: billing.kinds()[-1:], ["handled"])
    assert {*billing.kinds()} == {"retried", "handled"}
    assert billing.database.entries() == ["order 1"]


async def test_a_deadlock_is_tried_again(billing: Billing) -> None:
    """Two handlers update the same two rows, in the opposite order: the database ends one of them."""
    if billing.database.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    billing.database.execute("CREATE TABLE stock (id int PRIMARY KEY, sold int)")
    billing.database.execute("INSERT INTO stock VALUES (1, 0), (2, 0)")
    met = {"a": threading.Event(), "b": threading.Event()}
    update = sa.text("UPDATE stock SET sold = sold + 1 WHERE id = :id")

    def work(session: Session, message: Message) -> None:
        mine, other = ("a", "b") if message.id == "a" else ("b", "a")
        first = 1 if mine == "a" else 2
        session.execute(update, {"id": first})
        met[mine].set()
        if message.attempt == 1:
            assert met[other].wait(60)
        session.execute(update, {"id": 3 - first})

    async def work_async(session: AsyncSession, message: Message) -> None:
        mine, other = ("a", "b") if message.id == "a" else ("b", "a")
        first = 1 if mine == "a" else 2
        await session.execute(update, {"id": first})
        met[mine].set()
        if message.attempt == 1:
            await eventually(met[other].is_set)
        await session.execute(update, {"id": 3 - first})

    billing.on(work_async if billing.database.is_async else work)
    async with billing.running():
        await billing.publish(1, id="a")
        await billing.publish(2, id="b")
        await eventually(lambda: billing.kinds().count("handled"), 2)
    assert "retried" in billing.kinds()
    assert "deadlock" in str(next(one.error for one in billing.outcomes if one.kind == "retried")).lower()
    assert billing.database.rows("SELECT id, sold FROM stock ORDER BY id") == [(1, 2), (2, 2)]


async def test_a_handler_cannot_end_the_transaction(billing: Billing) -> None:
    """It would do a part twice, or never."""
    billing.on(lambda session, message: session.commit(), retry=Retry.none())
    billing.on(lambda session, message: session.rollback(), retry=Retry.none(), name="undo")
    async with billing.running():
        await billing.publish(1, id="a")
        letters = await dead_letters(billing.app, 2)
    assert all("do not work in a handler with inbox=" in reason(one) for one in letters)
    assert billing.database.entries() == []
    assert billing.database.handled() == []


async def test_a_handler_may_undo_a_part(billing: Billing) -> None:
    def work(session: Session, message: Message) -> None:
        with contextlib.suppress(LookupError), session.begin_nested():
            session.execute(sa.insert(entries).values(name="undone"))
            raise LookupError

    async def work_async(session: AsyncSession, message: Message) -> None:
        with contextlib.suppress(LookupError):
            async with session.begin_nested():
                await session.execute(sa.insert(entries).values(name="undone"))
                raise LookupError

    billing.on(work_async if billing.database.is_async else work)
    async with billing.running():
        await billing.publish(1, id="a")
        await eventually(billing.kinds, ["handled"])
    assert billing.database.entries() == ["order 1"]


# --- the session ------------------------------------------------------------------------------


async def test_a_dependency_gets_the_session_of_the_transaction(billing: Billing) -> None:
    inbox, seen = billing.inbox, list[Any]()

    if billing.database.is_async:

        async def customer(session: Annotated[AsyncSession, Depends(inbox.session)]) -> str:
            seen.append(session)
            await session.execute(sa.insert(entries).values(name="customer"))
            return "Ada"

        @billing.app.on("order.placed", inbox=inbox)
        async def bill(session: AsyncSession, order: OrderPlaced, name: Annotated[str, Depends(customer)]) -> None:
            seen.append(session)

        @billing.app.on("order.placed", inbox=inbox)
        async def without(order: OrderPlaced) -> None:
            seen.append(inbox.session())
    else:

        def customer_sync(session: Annotated[Session, Depends(inbox.session)]) -> str:
            seen.append(session)
            session.execute(sa.insert(entries).values(name="customer"))
            return "Ada"

        @billing.app.on("order.placed", inbox=inbox, name="bill")
        def bill_sync(session: Session, order: OrderPlaced, name: Annotated[str, Depends(customer_sync)]) -> None:
            seen.append(session)

        @billing.app.on("order.placed", inbox=inbox, name="without")
        def without_sync(order: OrderPlaced) -> None:
            seen.append(inbox.session())

    async with billing.running():
        for _ in range(2):
            await billing.publish(1, id="a")
        await eventually(lambda: sorted(billing.kinds()), ["handled", "handled", "skipped", "skipped"])
    assert len(seen) == 3
    assert len({id(one) for one in seen}) == 2
    assert billing.database.entries() == ["customer"]
    assert billing.database.handled() == [("billing.bill", "a"), ("billing.without", "a")]
    with pytest.raises(errors.DependencyError, match="this inbox has no session here"):
        inbox.session()


async def test_the_session_of_another_inbox_is_refused(billing: Billing) -> None:
    """It would be a session of another database, or of another transaction."""
    other = Inbox(billing.app, billing.database.sessions(billing.engine))
    billing.on(lambda session, message: other.session() and None, retry=Retry.none())
    async with billing.running():
        await billing.publish(1)
        await eventually(billing.kinds, ["dead"])
    assert "this inbox has no session here" in str(billing.outcomes[-1].error)
    assert billing.database.entries() == []


async def test_events_that_a_handler_adds_to_the_outbox_commit_with_it(billing: Billing) -> None:
    @billing.app.event("invoice.sent")
    @attrs.frozen(kw_only=True)
    class InvoiceSent:
        number: int

    outbox = Outbox(billing.app, billing.engine)
    attempts = 0

    def work(session: Any, message: Message) -> Any:
        nonlocal attempts
        attempts += 1
        outbox.add(session, InvoiceSent(number=1))
        if attempts < 3:
            raise LookupError("no such customer")

    billing.on(work)
    async with billing.running():
        for _ in range(3):
            await billing.publish(1, id="a")
        await eventually(lambda: sorted(billing.kinds())[:3], ["handled", "retried", "retried"])
        await eventually(lambda: billing.kinds().count("skipped"), 2)
        assert billing.database.waiting() == 1
        assert await outbox.relay.drain() == 1


async def test_middleware_sees_that_a_duplicate_is_skipped(billing: Billing) -> None:
    entered: list[str] = []

    class Middleware:
        async def handle(self, message: Message, call_next: Any) -> None:
            entered.append(message.id)
            await call_next()

        def handle_sync(self, message: Message, call_next: Any) -> None:
            entered.append(message.id)
            call_next()

    billing.app.middleware(Middleware())
    billing.on(nothing)
    async with billing.running():
        for _ in range(2):
            await billing.publish(1, id="a")
        await eventually(lambda: sorted(billing.kinds()), ["handled", "skipped"])
    assert [one for one in entered if one == "a"] == ["a", "a"]


async def test_an_inbox_costs_one_statement(billing: Billing) -> None:
    statements: list[str] = []
    engine = getattr(billing.engine, "sync_engine", billing.engine)

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("SELECT"):  # MariaDB's driver asks on its first connection
            statements.append(statement.replace("INSERT IGNORE", "INSERT"))

    billing.on(nothing)
    async with billing.running():
        await billing.publish(1, id="a")
        await eventually(billing.kinds, ["handled"])
        assert [one.split()[2] for one in statements if one.startswith("INSERT")] == ["lightbus_inbox", "entries"]
        assert len(statements) == 2
        statements.clear()
        await billing.publish(1, id="a")
        await eventually(billing.kinds, ["handled", "skipped"])
        assert len(statements) == 1


# --- the sweep --------------------------------------------------------------------------------


async def test_a_sweep_deletes_what_is_older_than_keep(billing: Billing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inboxes, "SWEPT", 7)
    now, week = time.time(), 7 * 86_400
    insert = "INSERT INTO lightbus_inbox VALUES ('billing.bill', :id, :at)"
    for number in range(30):
        billing.database.execute(insert, id=f"old-{number}", at=now - week - 60 - number // 4)  # some are as old
    for number in range(3):
        billing.database.execute(insert, id=f"new-{number}", at=now - week + 600)
    assert await billing.inbox.sweep() == 30
    assert [one for _, one in billing.database.handled()] == ["new-0", "new-1", "new-2"]
    assert billing.inbox.deleted == 30
    assert await billing.inbox.sweep() == 0


async def test_a_worker_sweeps_and_a_sweep_that_fails_does_not_end_it(
    billing: Billing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sweep, "FIRST_SWEEP", 0.01)
    monkeypatch.setattr(sweep, "SWEEP", 0.01)
    insert = "INSERT INTO lightbus_inbox VALUES ('billing.bill', 'a', 0)"
    billing.database.execute(insert)
    stopping = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(billing.inbox.run, stopping)
        await eventually(lambda: billing.inbox.deleted, 1)
        billing.database.execute("ALTER TABLE lightbus_inbox RENAME TO elsewhere")
        await eventually(lambda: billing.inbox.trouble)
        assert billing.inbox.health()["error"] == billing.inbox.trouble
        billing.database.execute("ALTER TABLE elsewhere RENAME TO lightbus_inbox")
        await eventually(lambda: billing.inbox.trouble, None)
        billing.database.execute(insert)
        await eventually(lambda: billing.inbox.deleted, 2)
        stopping.set()
    assert "could not be swept" in caplog.text


# --- declarations -----------------------------------------------------------------------------


@pytest.fixture
def app() -> Lightbus:
    return Lightbus("billing", url=f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def both(app: Lightbus, tmp_path: Path) -> tuple[Inbox, Inbox]:
    """For sync handlers, for async handlers."""
    address = f"{tmp_path}/data.db"
    return (
        Inbox(app, sessionmaker(sa.create_engine(f"sqlite:///{address}"))),
        Inbox(app, async_sessionmaker(create_async_engine(f"sqlite+aiosqlite:///{address}"))),
    )


def test_a_handler_of_the_wrong_kind_is_refused(app: Lightbus, both: tuple[Inbox, Inbox]) -> None:
    for_sync, for_async = both

    async def waits(order: dict[str, Any], session: AsyncSession) -> None: ...

    def runs(order: dict[str, Any], session: Session) -> None: ...

    async def waits_for_sync(order: dict[str, Any], session: Session) -> None: ...

    def runs_async(order: dict[str, Any], session: AsyncSession) -> None: ...

    async def waits_only(order: dict[str, Any]) -> None: ...

    for function, inbox, message in (
        (waits, for_sync, "is async, and the sessions of its inbox are not"),
        (waits_only, for_sync, "is async, and the sessions of its inbox are not"),
        (waits_for_sync, for_sync, "is async, and the sessions of its inbox are not"),
        (runs, for_async, "is a sync function, and the sessions of its inbox are async"),
        (
            waits_for_sync,
            for_async,
            "'session' is annotated with Session, and the sessions of the inbox are",
        ),
        (runs_async, for_sync, "'session' is annotated with AsyncSession, and the sessions of the inbox are"),
    ):
        with pytest.raises(errors.InvalidHandler, match=message):
            app.on("order.placed", inbox=inbox)(function)
    app.on("order.placed", inbox=for_sync)(runs)
    app.on("order.placed", inbox=for_async)(waits)


def test_an_inbox_of_another_app_is_refused(both: tuple[Inbox, Inbox]) -> None:
    shop = Lightbus("shop", url="memory://shop")
    with pytest.raises(errors.InvalidHandler, match=r"inbox= is of app 'billing'\. Pass one that was made for 'shop'"):
        shop.on("order.placed", inbox=both[0])(lambda order: None)


@pytest.mark.parametrize("inbox", ["x", Inbox, 3, object()])
def test_what_is_no_inbox_is_refused(app: Lightbus, inbox: Any) -> None:
    with pytest.raises(errors.InvalidOption, match=r"handler 'bill' of app 'billing': inbox=.* is not an inbox"):
        app.on("order.placed", inbox=inbox, name="bill")(lambda order: None)


def test_what_an_inbox_cannot_use_is_refused(app: Lightbus, tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/data.db")
    sessions = sessionmaker(engine)
    for wrong in (engine, Session, "sqlite://", None):
        with pytest.raises(errors.InvalidOption, match="is not a sessionmaker"):
            Inbox(app, wrong)  # type: ignore[arg-type]
    for keep in (0, -1, timedelta(0), "7 days", None):
        with pytest.raises(errors.InvalidOption, match="keep="):
            Inbox(app, sessions, keep=keep)  # type: ignore[arg-type]
    oracle = sa.create_engine("oracle://", module=mock.MagicMock(paramstyle="named", version="8.3"))
    with pytest.raises(errors.InvalidOption, match=r"does not know the database 'oracle'\. It knows postgresql"):
        Inbox(app, sessionmaker(oracle))
    assert app.services == []
    late = sessionmaker()
    inbox = Inbox(app, late)
    late.configure(bind=oracle)
    with pytest.raises(errors.DependencyError, match="does not know the database 'oracle'"):
        inbox.around(app.handlers[_handler(app, inbox)]).function(None)


def _handler(app: Lightbus, inbox: Inbox) -> str:
    app.on("order.placed", inbox=inbox, name="bill")(lambda order: None)
    return "bill"
