"""A relative path in a broker's URL means one file, from when the app is made, whatever `os.chdir` does afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from lightbus import Lightbus, errors
from lightbus.connection.dial import BrokerAddresses
from tests.bus import OrderPlaced, eventually, running
from tests.conformance.conftest import declare_orders
from tests.patience import LIMIT, wait_until
from tests.processes import ROOT, Program, lightbus

pytestmark = pytest.mark.anyio

FILES = {
    "billing.py": """\
import os
import tempfile

import attrs

from lightbus import Lightbus, Retry

app = Lightbus("billing", retry=Retry(delays=()))

@attrs.frozen
class InvoiceSent:
    number: int

app.event(InvoiceSent)

@app.on("order.placed")
async def charge(order: dict) -> None:
    os.chdir(tempfile.mkdtemp(dir="."))
    await app.publish(InvoiceSent(number=order["number"]))

@app.on("invoice.sent")
async def archive(invoice: InvoiceSent) -> None:
    if invoice.number == 1:
        raise ValueError("the archive is full")
    print("archived", flush=True)
"""
}

FORKS = """
import os, sys, tempfile
from lightbus import Lightbus

app = Lightbus("shop", url="sqlite:///bus.db")

@app.event
class OrderPlaced:
    number: int

os.chdir(tempfile.mkdtemp())
app.publish_sync(OrderPlaced(number=1))
child = os.fork()
if child == 0:
    os.chdir("/")
    app.publish_sync(OrderPlaced(number=2))
    app.publisher.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
app.publisher.close()
print(*os.listdir())
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test, until it changes it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("by", ["url", "environment"])
async def test_what_is_published_after_a_chdir_is_handled(by: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "sqlite:///bus.db"
    if by == "environment":
        monkeypatch.setenv("LIGHTBUS_URL", url)
    shop = declare_orders(Lightbus("shop", url=url if by == "url" else None))
    billing = Lightbus("billing", url=url if by == "url" else None)
    handled: list[int] = []

    @billing.on("order.placed")
    async def charge(order: OrderPlaced) -> None:
        handled.append(order.number)

    async with running(billing):
        os.chdir(here.parent / "elsewhere")
        assert (await shop.publish(OrderPlaced(number=1))).routed
        await eventually(lambda: handled, [1])
        shop.__exit__(None, None, None)
    assert os.listdir() == []
    assert (here / "bus.db").exists()
    assert shop.broker.masked == f"sqlite:///{here}/bus.db"


async def test_the_folder_is_that_in_which_the_app_was_made_also_where_it_connects_later(here: Path) -> None:
    shop = declare_orders(Lightbus("shop", url="sqlite:///./b%20us.db"))
    os.chdir(here.parent / "elsewhere")
    await shop.publish(OrderPlaced(number=1))
    shop.__exit__(None, None, None)
    assert (here / "b us.db").exists()
    assert os.listdir() == []


def test_files_for_tls_are_those_of_the_folder_in_which_the_app_was_made(here: Path) -> None:
    app = Lightbus("shop", url="amqps://localhost/?cafile=ca.pem&certfile=sub/../me.pem&keyfile=/keys/me.key")
    os.chdir(here.parent / "elsewhere")
    options = app.broker.addresses[0].options
    assert options == {"cafile": f"{here}/ca.pem", "certfile": f"{here}/me.pem", "keyfile": "/keys/me.key"}
    with pytest.raises(errors.TLSRefused, match=f"cafile={here}/ca.pem cannot be read"):
        app.broker.connect("test")


def test_a_folder_whose_name_is_not_utf8_is_found_again(here: Path) -> None:
    folder = here / os.fsdecode(b"caf\xe9 @:?")
    folder.mkdir()
    os.chdir(folder)
    with declare_orders(Lightbus("shop", url="sqlite:///bus.db")) as shop:
        os.chdir("/")
        shop.publish_sync(OrderPlaced(number=1))
    assert (folder / "bus.db").exists()


def test_a_working_directory_that_was_deleted_matters_to_relative_paths_only(here: Path) -> None:
    here.rmdir()
    app = Lightbus("shop", url="sqlite:///bus.db")
    with pytest.raises(errors.InvalidURL, match=r"'bus\.db', relative to the working directory.*Use an absolute path"):
        _ = app.broker
    BrokerAddresses.parse(f"sqlite:///{here.parent}/bus.db").connect("test").close()


@pytest.mark.parametrize("processes", [1, 2])
def test_worker_processes_and_commands_that_start_in_one_folder_share_its_file(folder: Path, processes: int) -> None:
    url = "sqlite:///bus.db"
    options = () if processes == 1 else ("--processes", "2")
    with Program("worker", "billing:app", *options, folder=folder, url=url) as worker:
        worker.wait_for("Ready")
        shop = declare_orders(Lightbus("shop", url=f"sqlite:///{folder}/bus.db"))
        with shop:
            shop.publish_many_sync([OrderPlaced(number=number) for number in (1, 2)])
        worker.wait_for("archived")
        wait_until(
            lambda: "archive" in lightbus("dead", "list", "billing:app", folder=folder, url=url).stdout, "a dead letter"
        )
        assert worker.end(signal.SIGTERM) == 0
    assert [path.relative_to(folder) for path in folder.rglob("bus.db")] == [Path("bus.db")]


def test_a_forked_child_publishes_to_the_same_file(here: Path) -> None:
    url = f"sqlite:///{here}/bus.db"
    billing, handled = Lightbus("billing", url=url), list[int]()
    billing.on("order.placed", name="charge")(lambda order: handled.append(order["number"]))

    async def consume() -> None:
        async with running(billing):
            done = await anyio.run_process(
                [sys.executable, "-c", FORKS],
                cwd=here,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stderr=subprocess.STDOUT,
            )
            assert done.stdout.decode().strip() == ""
            with anyio.fail_after(LIMIT):
                await eventually(lambda: sorted(handled), [1, 2])

    anyio.run(consume)
