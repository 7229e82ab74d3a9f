"""The embedded broker's file over a long time: deleted, replaced, emptied, the clock set. And the folders of `memory://`."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from amqp import exceptions as amqp_errors

from lightbus import Lightbus, Retry
from lightbus.transport.sqlite import clock
from lightbus.transport.sqlite.file import open_files
from lightbus.transport.sqlite.place import locate
from lightbus.transport.sqlite.session import Session
from tests.bus import InBackground, OrderPlaced
from tests.patience import LIMIT, wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bus.db"


@pytest.fixture
def shop(path: Path) -> Iterator[Lightbus]:
    app = Lightbus("shop", url=f"sqlite:///{path}")
    app.event(OrderPlaced)
    yield app
    app.__exit__(None, None, None)


@pytest.fixture
def handled() -> list[int]:
    return []


@pytest.fixture
def billing(path: Path, handled: list[int]) -> Lightbus:
    app = Lightbus("billing", url=f"sqlite:///{path}")

    @app.on("order.placed")
    async def book(order: OrderPlaced) -> None:
        handled.append(order.number)

    return app


# --- deleted, replaced ------------------------------------------------------------------------


def _delete(path: Path) -> None:
    for one in (path, _wal(path), _shm(path)):
        one.unlink(missing_ok=True)  # a connection that sees the first deleted deletes the others


def _delete_the_file_alone(path: Path) -> None:
    path.unlink()


def _delete_log_and_index(path: Path) -> None:
    _wal(path).unlink()
    _shm(path).unlink()


def _delete_the_log(path: Path) -> None:
    _wal(path).unlink()


def _delete_its_index(path: Path) -> None:
    _shm(path).unlink()


def _delete_the_folder(path: Path) -> None:
    shutil.rmtree(path.parent.rename(path.parent.with_name("deleted")))
    path.parent.mkdir()


def _replace_by_a_backup(path: Path) -> None:
    backup = path.with_name("backup.db")
    with contextlib.closing(sqlite3.connect(path)) as database, contextlib.closing(sqlite3.connect(backup)) as copy:
        database.backup(copy)
    backup.replace(path)


def _replace_by_an_older_copy(path: Path) -> None:
    shutil.copy(path, path.with_name("older.db"))  # without the log: a backup must not be made like this
    path.with_name("older.db").replace(path)


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _shm(path: Path) -> Path:
    return path.with_name(path.name + "-shm")


@pytest.mark.parametrize(
    "harm",
    [
        _delete,
        _delete_the_file_alone,
        _delete_log_and_index,
        _delete_the_log,
        _delete_its_index,
        _delete_the_folder,
        _replace_by_a_backup,
        _replace_by_an_older_copy,
    ],
)
def test_clients_notice_a_deleted_or_replaced_file_and_use_the_new_one(
    shop: Lightbus,
    billing: Lightbus,
    path: Path,
    handled: list[int],
    harm: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with InBackground(billing):
        shop.publish_sync(OrderPlaced(number=1))
        wait_until(lambda: handled == [1], "the first is handled")
        harm(path)
        # Publishing uses the new file at once. No queue is bound there until the consumer has noticed.
        numbers = iter(range(2, 1_000_000))
        wait_until(lambda: shop.publish_sync(OrderPlaced(number=next(numbers))).routed, "one is routed")
        last = next(numbers) - 1
        wait_until(lambda: last in handled, "it is handled")
    lost = [record.getMessage() for record in caplog.records if "connection lost" in record.getMessage()]
    assert any(f"{path} was deleted while it was in use" in one for one in lost) or any(
        f"{path} was replaced by another while it was in use" in one
        or f"the embedded broker's {path}, were deleted while it was in use" in one
        for one in lost
    ), caplog.text
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_no_message_is_confirmed_in_a_deleted_file(
    shop: Lightbus, billing: Lightbus, path: Path, handled: list[int]
) -> None:
    with InBackground(billing):
        pass
    with shop:
        assert shop.publish_sync(OrderPlaced(number=1)).routed
        _delete(path)
        assert not shop.publish_sync(OrderPlaced(number=2)).routed  # it is in the new file, where no queue is bound yet
        with InBackground(billing):
            assert shop.publish_sync(OrderPlaced(number=3)).routed
            wait_until(lambda: handled == [3], "the third is handled")


def test_a_file_that_is_replaced_during_a_fork_is_noticed(path: Path) -> None:
    old, new = Session(locate(f"sqlite:///{path}")), path.with_name("new.db")
    Session(locate(f"sqlite:///{new}")).drop()
    for file in [*open_files]:  # as before a fork
        file.let_go()
    new.replace(path)
    with pytest.raises(amqp_errors.RecoverableConnectionError, match="was replaced by another while it was in use"):
        old.refresh()
    assert not old.is_open
    old.drop()


def test_messages_in_a_deleted_write_ahead_log_are_saved(
    shop: Lightbus, billing: Lightbus, path: Path, handled: list[int]
) -> None:
    with InBackground(billing):
        pass
    with shop:
        for number in range(5):
            shop.publish_sync(OrderPlaced(number=number))
        _delete_log_and_index(path)
        shop.publish_sync(OrderPlaced(number=5))
    with InBackground(billing):
        wait_until(lambda: sorted({*handled}) == [0, 1, 2, 3, 4, 5], "all are handled")


# --- the machine's clock ----------------------------------------------------------------------


@pytest.mark.parametrize("step", [-3600.0, 3600.0], ids=["back", "forward"])
def test_delays_and_retries_are_on_time_when_the_machines_clock_is_set(
    shop: Lightbus, path: Path, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    billing, attempts = Lightbus("billing", url=f"sqlite:///{path}", retry=Retry(delays=(2,))), list[float]()

    @billing.on("order.placed")
    async def book(order: OrderPlaced) -> None:
        attempts.append(time.monotonic())
        if len(attempts) == 1:
            raise OSError

    with InBackground(billing):
        began = time.monotonic()
        shop.publish_sync(OrderPlaced(number=1), delay=2)
        _set_clock(monkeypatch, step)
        wait_until(lambda: len(attempts) == 1, "it comes when its delay is over")
        _set_clock(monkeypatch, step)
        wait_until(lambda: len(attempts) == 2, "it comes again when its pause is over")
    assert attempts[0] - began >= 2
    assert attempts[1] - attempts[0] >= 2


def _set_clock(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    before = time.time
    monkeypatch.setattr(time, "time", lambda: before() + step)


@pytest.mark.parametrize("off", [0.0, 2.0, -3600.0], ids=["restarted", "off for a while", "no clock at first"])
def test_after_a_boot_delays_include_the_time_that_the_machine_was_off(
    shop: Lightbus, billing: Lightbus, path: Path, handled: list[int], off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with InBackground(billing):
        pass
    began = time.monotonic()
    shop.publish_sync(OrderPlaced(number=1), delay=3)
    shop.__exit__(None, None, None)
    _boot(monkeypatch, steady=5.0, wall=off)
    with InBackground(billing):
        wait_until(lambda: handled == [1], "it comes when its delay is over")
    assert time.monotonic() - began >= 3 - max(0.0, off)


def _boot(monkeypatch: pytest.MonkeyPatch, *, steady: float, wall: float) -> None:
    """The machine's steady clock starts again. The wall clock has continued in the meantime (or was lost)."""
    began = time.monotonic()
    monkeypatch.setattr(clock, "steady", lambda: steady + time.monotonic() - began)
    monkeypatch.setattr(clock, "clock_domain", lambda: "another boot")
    _set_clock(monkeypatch, wall)


# --- its size ---------------------------------------------------------------------------------


def test_the_file_shrinks_after_a_backlog(shop: Lightbus, billing: Lightbus, path: Path, handled: list[int]) -> None:
    with InBackground(billing):
        pass
    with shop:
        shop.publish_many_sync([OrderPlaced(number=number, note="x" * 10_000) for number in range(3000)])
    full = os.path.getsize(path)
    assert full > 25_000_000
    with InBackground(billing):
        wait_until(lambda: len(handled) == 3000, "all are handled")
        wait_until(lambda: os.path.getsize(path) < 6_000_000, "the file is small again")


# --- the folders of memory:// -----------------------------------------------------------------

USES_MEMORY = """
import multiprocessing, os, signal, sys
from lightbus.transport.sqlite.connection import Connection

def use():
    connection = Connection("memory://here")
    connection.channel().queue_declare("q")
    assert any(name.startswith("lightbus-memory-") for name in os.listdir(os.environ["TMPDIR"]))
    return connection
"""


@contextlib.contextmanager
def _started(folder: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs this code. It is killed at the end of the block, or after LIMIT seconds."""
    with subprocess.Popen(
        [sys.executable, "-c", USES_MEMORY + textwrap.dedent(code)],
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        guard = threading.Timer(LIMIT, process.kill)
        guard.start()
        try:
            yield process
        finally:
            guard.cancel()
            process.kill()


def _run(folder: Path, code: str) -> int:
    with _started(folder, code) as process:
        process.communicate()
    return process.returncode


def _left(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if one.name.startswith("lightbus-memory-")]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        pytest.param("use()", 0, id="ends"),
        pytest.param("use(); sys.exit(3)", 3, id="exits"),
        pytest.param(
            """
            child = multiprocessing.get_context("fork").Process(target=use)
            child.start()
            child.join()
            sys.exit(child.exitcode)
            """,
            0,
            id="has a child of multiprocessing",
        ),
    ],
)
def test_a_process_removes_its_memory_brokers_at_its_end(tmp_path: Path, code: str, status: int) -> None:
    assert _run(tmp_path, code) == status
    assert _left(tmp_path) == []


def test_a_child_that_uses_many_memory_brokers_has_one_function_for_its_end(tmp_path: Path) -> None:
    many = """
    from multiprocessing import util
    from lightbus.transport.sqlite.place import forget_memory

    def use_many():
        before = len(util._finalizer_registry)
        for _ in range(50):
            use().close()
            forget_memory("here")
        print(len(util._finalizer_registry) - before, flush=True)

    use().close()
    child = multiprocessing.get_context("fork").Process(target=use_many)
    child.start()
    child.join()
    """
    with _started(tmp_path, many) as process:
        output, _ = process.communicate()
    assert output == "1\n"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("use(); os._exit(0)", id="os._exit"),
        pytest.param("use(); os.kill(os.getpid(), signal.SIGKILL)", id="killed"),
        pytest.param("use(); os.kill(os.getpid(), signal.SIGTERM)", id="terminated"),
        pytest.param(
            """
            pid = os.fork()
            if pid == 0:
                use()
                os._exit(0)
            os.waitpid(pid, 0)
            """,
            id="forked child",
        ),
    ],
)
def test_the_next_process_removes_the_memory_brokers_of_a_process_that_was_killed(tmp_path: Path, code: str) -> None:
    _run(tmp_path, code)
    assert len(_left(tmp_path)) == 1
    assert _run(tmp_path, "use()") == 0
    assert _left(tmp_path) == []


def test_the_memory_brokers_of_a_living_process_are_kept(tmp_path: Path) -> None:
    lives_on = """
    connection = use()
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    print("ready", flush=True)
    input()
    print(connection.channel().queue_declare("q", passive=True).queue)
    """
    with _started(tmp_path, lives_on) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert _run(tmp_path, "use()") == 0
        assert len(_left(tmp_path)) == 1
        output, _ = process.communicate("go on\n")
    assert output == "q\n"
    assert _left(tmp_path) == []
