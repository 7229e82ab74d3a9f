"""docs/howto/outbox.md: what the page promises beside its example."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from lightbus import Lightbus
from lightbus.outbox import Inbox, Outbox, Relay, metadata, statements
from lightbus.outbox.rows import Row
from lightbus.testing import TestBus
from tests.integrations.example import EXAMPLES
from tests.patience import LIMIT, wait_until
from tests.postgres import Postgres
from tests.processes import ROOT, environment

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@attrs.frozen
class Placed:
    number: int


def shop_with(engine: sa.Engine) -> tuple[Lightbus, Outbox]:
    metadata.create_all(engine)
    app = Lightbus("shop")
    app.event("order.placed")(Placed)
    return app, Outbox(app, engine)


async def test_a_sync_session_that_blocks_the_event_loop_does_not_wait_for_the_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    app, outbox = shop_with(engine)
    claim, locked, resume = statements.claim, threading.Event(), threading.Event()

    def hold(*args: Any) -> list[Row]:
        rows = claim(*args)
        locked.set()
        resume.wait(LIMIT)
        return rows

    monkeypatch.setattr(statements, "claim", hold)
    async with TestBus(app) as bus:
        await anyio.to_thread.run_sync(locked.wait, LIMIT)
        resume.set()
        with Session(engine) as session, session.begin():
            outbox.add(session, Placed(number=1))
        await outbox.relay.drain()
        assert bus.published(Placed) == [Placed(number=1)]
    engine.dispose()


async def test_drain_waits_for_the_batch_that_the_relay_of_the_testbus_is_sending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    app, outbox = shop_with(engine)
    relay = outbox.relay
    assert isinstance(relay, Relay)
    entered, release, drained = anyio.Event(), anyio.Event(), False
    async with TestBus(app) as bus:
        publish_many = app.publisher.publish_many

        async def slowly(*args: Any, **options: Any) -> Any:
            entered.set()
            await release.wait()
            return await publish_many(*args, **options)

        monkeypatch.setattr(app.publisher, "publish_many", slowly)
        with Session(engine) as session, session.begin():
            outbox.add(session, Placed(number=1))
        await entered.wait()
        with anyio.move_on_after(0.5):
            await relay.drain()
            drained = True
        assert not drained
        release.set()
        await relay.drain()
        assert bus.published(Placed) == [Placed(number=1)]
    engine.dispose()


# --- on PostgreSQL


def as_user(url: str, name: str, *grants: str) -> sa.Engine:
    """An engine of a new user with these privileges."""
    admin = sa.create_engine(url)
    with admin.begin() as connection:
        for statement in (f"CREATE USER {name}", *(f"GRANT {grant} TO {name}" for grant in grants)):
            connection.exec_driver_sql(statement)
    admin.dispose()
    return sa.create_engine(url.replace("postgres@", f"{name}@"))


@pytest.fixture
def users(postgres_url: str, postgres: Postgres) -> Iterator[dict[str, sa.Engine]]:
    """Users with the privileges that docs/operations.md lists."""
    owner = sa.create_engine(postgres_url)
    metadata.create_all(owner)
    found = {
        name: as_user(postgres_url, name, *grants)
        for name, grants in {
            "adds": ("SELECT, INSERT ON lightbus_outbox", "USAGE ON SEQUENCE lightbus_outbox_id_seq"),
            "relays": ("SELECT, UPDATE, DELETE ON lightbus_outbox",),
            "handles": ("SELECT, INSERT, DELETE ON lightbus_inbox",),
        }.items()
    }
    yield found
    with owner.begin() as connection:
        for name, engine in found.items():
            engine.dispose()
            connection.exec_driver_sql(f"DROP OWNED BY {name}")
            connection.exec_driver_sql(f"DROP USER {name}")
    owner.dispose()


@pytest.mark.postgres
async def test_the_permissions_of_the_page_are_enough(users: dict[str, sa.Engine]) -> None:
    app = Lightbus("shop")
    app.event("order.placed")(Placed)
    outbox = Outbox(app, users["relays"])
    inbox = Inbox(app, sessionmaker(users["handles"]), keep=timedelta(microseconds=1))
    handled: list[int] = []

    @app.on(Placed, inbox=inbox)
    def handle(placed: Placed) -> None:
        handled.append(placed.number)

    async with TestBus(app) as bus:
        with Session(users["adds"]) as session, session.begin():
            outbox.add(session, Placed(number=1))
        with users["adds"].begin() as connection:
            outbox.add(connection, Placed(number=2))
        await outbox.relay.drain()
        await outbox.relay.store.depth()
        await bus.drain()
        assert sorted(handled) == [1, 2]
        assert await inbox.sweep() == 2


@pytest.mark.postgres
async def test_without_the_trigger_the_relay_finds_rows_by_looking(postgres_url: str) -> None:
    engine = sa.create_engine(postgres_url)
    app, outbox = shop_with(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER lightbus_outbox_notify ON lightbus_outbox")
    async with TestBus(app) as bus:
        for number in range(3):
            with engine.begin() as connection:
                outbox.add(connection, Placed(number=number))
            sent = partial(lambda one: one in bus.published(Placed), Placed(number=number))
            await anyio.to_thread.run_sync(wait_until, sent, "it is sent")
    engine.dispose()


@pytest.mark.postgres
async def test_a_million_ids_take_about_220_mb(postgres_url: str) -> None:
    engine = sa.create_engine(postgres_url)
    metadata.create_all(engine)
    count = 50_000
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO lightbus_inbox SELECT 'billing.bill', gen_random_uuid()::text, 1.79e9 + n / 100.0 "
            f"FROM generate_series(1, {count}) n"
        )
        size: Any = connection.exec_driver_sql("SELECT pg_total_relation_size('lightbus_inbox')").scalar_one()
    engine.dispose()
    assert 190 < size / count < 250


@pytest.mark.postgres
async def test_an_async_connection_adds_with_run_sync(postgres: Postgres, postgres_url: str) -> None:
    engine = create_async_engine(postgres_url.replace("+psycopg", "+asyncpg"))
    app = Lightbus("shop")
    app.event("order.placed")(Placed)
    outbox = Outbox(app, engine)
    async with TestBus(app) as bus:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.run_sync(outbox.add, Placed(number=1))
        await outbox.relay.drain()
        assert bus.published(Placed) == [Placed(number=1)]
    await engine.dispose()


# --- docs/howto/from-celery.md


async def test_the_replacement_of_delay_on_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/shop.db")
    monkeypatch.syspath_prepend(EXAMPLES / "migration")
    module: Any = importlib.import_module("after_celery_commit")
    module.Base.metadata.create_all(module.engine)
    metadata.create_all(module.engine)
    async with TestBus(module.app) as bus:
        module.place_order(1, "a@example.com")
        with pytest.raises(IntegrityError):
            module.place_order(1, "b@example.com")  # rolled back, with its event
        await module.outbox.relay.drain()
        assert [one.email for one in bus.published(module.OrderPlaced)] == ["a@example.com"]
    module.engine.dispose()


# --- Alembic


def fragments(name: str) -> list[str]:
    """The blocks of a page of docs/howto that are not in a file."""
    text = (ROOT / "docs" / "howto" / f"{name}.md").read_text()
    return re.findall(r"^<!-- fragment -->\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.postgres
def test_alembic_creates_the_tables_and_the_trigger(postgres_url: str, tmp_path: Path) -> None:
    def alembic(*arguments: str) -> None:
        command = [sys.executable, "-m", "alembic", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    target, upgrade = fragments("outbox")
    alembic("init", "migrations")
    settings = tmp_path / "alembic.ini"
    settings.write_text(re.sub("(?m)^sqlalchemy.url = .*$", f"sqlalchemy.url = {postgres_url}", settings.read_text()))
    env = tmp_path / "migrations" / "env.py"
    base = "from sqlalchemy.orm import DeclarativeBase\n\nclass Base(DeclarativeBase): ...\n"
    assert "target_metadata = None\n" in env.read_text()
    env.write_text(env.read_text().replace("target_metadata = None\n", base + target))
    alembic("revision", "--autogenerate", "-m", "outbox")
    [revision] = (tmp_path / "migrations" / "versions").glob("*_outbox.py")
    by_hand = upgrade[upgrade.index("    op.execute") :]
    assert "# ### end Alembic commands ###\n" in revision.read_text()
    revision.write_text(revision.read_text().replace("end Alembic commands ###\n", f"end ###\n{by_hand}", 1))
    alembic("upgrade", "head")
    alembic("check")  # nothing differs

    engine = sa.create_engine(postgres_url)
    assert {"lightbus_outbox", "lightbus_inbox"} <= {*sa.inspect(engine).get_table_names()}
    query = "SELECT pg_get_triggerdef(oid), pg_get_functiondef(tgfoid) FROM pg_trigger WHERE tgname = '{}'"
    by_migration = definitions(engine, query.format("lightbus_outbox_notify"))
    with engine.begin() as connection:
        metadata.drop_all(connection)
        metadata.create_all(connection)
    assert by_migration == definitions(engine, query.format("lightbus_outbox_notify"))
    engine.dispose()


def definitions(engine: sa.Engine, query: str) -> list[list[str]]:
    """Without their whitespace."""
    with engine.connect() as connection:
        found = [[" ".join(str(text).split()) for text in row] for row in connection.exec_driver_sql(query)]
    assert found
    return found
