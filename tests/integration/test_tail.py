"""`lightbus tail` shows live events, and never blocks publishers."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import amqp.exceptions
import pytest

from lightbus import Lightbus
from lightbus.cli.tail.conditions import Condition
from lightbus.connection.declare import declare
from lightbus.connection.dial import BrokerAddresses
from lightbus.tail import HELD, QUEUE_LIMIT, Tail, Taken
from lightbus.transport import Channel, Publication
from lightbus.wire.topology import publishing
from tests import rabbitmq as nodes
from tests.bus import connected, publish_confirmed, publish_plainly
from tests.odd import ODD_PROPERTIES, odd_properties, publish_raw
from tests.patience import until_stopped
from tests.processes import LIGHTBUS, LIMIT, Program, environment, lightbus, wait_until

BUS = """\
from decimal import Decimal
from lightbus import Lightbus

app = Lightbus("billing")

@app.event("invoice.paid", version=2)
class InvoicePaid:
    number: int
    amount: Decimal = Decimal("9.50")
    note: str = ""
"""


FILES = {"bus.py": BUS}


def tail(*arguments: str, folder: Path, url: str, **options: Any) -> Program:
    """A running `lightbus tail`, which has subscribed already."""
    program = Program("tail", *arguments, folder=folder, url=url, **options)
    program.wait_for("Listening for ")
    return program


@contextlib.contextmanager
def publishing_to(url: str, *apps: str) -> Iterator[Channel]:
    """A channel to publish on, after the exchanges of these apps were declared and bound to the bus."""
    with connected(url) as connection:
        for app in apps:
            declare(connection, publishing(app))
        yield connection.channel()


@contextlib.contextmanager
def running_tail(url: str, *patterns: str) -> Iterator[Tail]:
    one = Tail(BrokerAddresses.parse(url), patterns or ("#",))
    one.ensure_started()
    try:
        wait_until(lambda: one.epoch > 0, "it has subscribed")
        yield one
    finally:
        one.stop(LIMIT)


def take(one: Tail) -> Taken:
    taken = one.take(LIMIT)
    assert taken is not None
    return taken


# --- what is shown ----------------------------------------------------------------------------


def test_live_events_are_shown_until_it_is_stopped(folder: Path, url: str) -> None:
    with tail("bus:app", folder=folder, url=url) as one:
        done = lightbus(
            "publish", "bus:app", "invoice.paid", "number=7", "--header", "tenant=acme", folder=folder, url=url
        )
        assert "confirmed, routed." in done.stdout
        found = one.wait_for(r"^\d\d:\d\d:\d\d\.\d{3}  invoice\.paid  from billing  version 2  ([0-9a-f-]{36})$")
        assert found[1] in done.stdout
        one.wait_for("^  tenant: acme$")
        one.wait_for(r'^  \{"amount": "9\.50", "note": "", "number": 7\}$')
        assert one.end(signal.SIGINT) == 0
        assert one.lines[-1] == "1 shown."
        assert "\x1b" not in one.output  # not a terminal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_at_once_while_no_events_arrive(folder: Path, sqlite_url: str, number: signal.Signals) -> None:
    with tail(folder=folder, url=sqlite_url) as one:
        assert one.end(number) == 0
        assert one.lines[1:] == ["0 shown."]


def test_patterns_source_and_where_select_events(folder: Path, url: str) -> None:
    options = ["--source", "shop", "--where", "user.name=A*", "--where", "lines.0!=2", "--json"]
    with (
        tail("order.*", "user.#", *options, folder=folder, url=url) as one,
        publishing_to(url, "shop", "auth") as channel,
    ):
        for app, event, body in (
            ("shop", "order.placed", b'{"user": {"name": "Bob"}, "lines": [1], "n": 1}'),
            ("shop", "invoice.paid", b'{"user": {"name": "Ann"}, "lines": [1], "n": 2}'),
            ("auth", "order.placed", b'{"user": {"name": "Ann"}, "lines": [1], "n": 3}'),
            ("shop", "order.placed", b'{"user": {"name": "Ann"}, "lines": [2], "n": 4}'),
            ("shop", "order.placed", b"no JSON"),
            ("shop", "user", b'{"user": {"name": "Ann"}, "lines": [1], "n": 5}'),
            ("shop", "order.placed", b'{"user": {"name": "Ada"}, "n": 6}'),
        ):
            publish_plainly(channel, app, event, body)
        one.wait_for('"n":6')
        assert one.end(signal.SIGTERM) == 0
        shown = [json.loads(line) for line in one.lines[1:-1]]
        assert [(line["event"], line["payload"]["n"]) for line in shown] == [("user", 5), ("order.placed", 6)]
        assert one.lines[-1] == "2 shown of 5 that passed."


@pytest.mark.parametrize(
    ("condition", "payload", "fits"),
    [
        ("a=1", {"a": 1}, True),
        ("a=1.0", {"a": 1}, True),
        ("a=1", {"a": "1"}, True),
        ("a=9.50", {"a": 9.5}, True),
        ("a=true", {"a": True}, True),
        ("a=1", {"a": True}, False),
        ("a=null", {"a": None}, True),
        ("a=", {"a": ""}, True),
        ("a=*", {"b": 1}, False),
        ("a!=1", {"b": 1}, True),
        ("a!=1", {"a": 1}, False),
        ("a=[1,2]", {"a": [1, 2]}, False),  # a character class, as in a shell
        ("a=x=y", {"a": "x=y"}, True),
        ("a.b.1=ä?", {"a": {"b": [0, "äö"]}}, True),
        ("a.b", {}, None),
        ("=1", {}, None),
        ("a..b=1", {}, None),
    ],
)
def test_where(condition: str, payload: Any, fits: bool | None) -> None:
    if fits is None:
        with pytest.raises(Exception, match="is not FIELD=VALUE"):
            Condition.parse(condition)
    else:
        assert Condition.parse(condition).matches(payload) is fits


def test_any_event_is_one_line_of_json(folder: Path, url: str) -> None:
    evil = '{"text": "\x9b31m\u2028\u202e",\n\n "big": 123456789012345678901234567890, "exact": 9.50}'.encode()
    with tail("--json", "--limit", "3", folder=folder, url=url) as one, publishing_to(url, "shop") as channel:
        properties = {"message_id": "m-1", "timestamp": 1767323045, "correlation_id": "c-1"}
        headers = {"lightbus-version": 3, "lightbus-causation": "m-0", "tenant": "acme"}
        publish_plainly(channel, "shop", "thing.seen", evil, {**properties, "headers": headers})
        publish_plainly(channel, "shop", "thing.seen", b"\xff\x00not json")
        publish_plainly(channel, "shop", "thing.seen", b"")
        assert one.end() == 0
        first, second, third = map(json.loads, one.lines[1:-1])
        received = first.pop("received")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", received)
        assert first == {
            "id": "m-1",
            "event": "thing.seen",
            "source": "shop",
            "time": "2026-01-02T03:04:05+00:00",
            "version": 3,
            "correlation_id": "c-1",
            "causation_id": "m-0",
            "headers": {"tenant": "acme"},
            "payload": {"text": "\x9b31m\u2028\u202e", "big": 123456789012345678901234567890, "exact": 9.5},
        }
        assert '"exact":9.50' in one.lines[1]  # numbers are unchanged
        assert one.lines[1].isascii()
        assert second["body_base64"] == "/wBub3QganNvbg=="
        assert third["body_base64"] == ""


def test_long_payloads_are_cut_and_control_characters_are_escaped(folder: Path, sqlite_url: str) -> None:
    with tail(folder=folder, url=sqlite_url) as one, publishing_to(sqlite_url, "shop") as channel:
        publish_plainly(channel, "shop", "a.b", json.dumps({"text": "x" * 5000}).encode())
        publish_plainly(channel, "shop", "a.b", b'{"text": "' + b"y" * 200_000 + b'"}')
        publish_plainly(channel, "shop", "a.b", '{"text": "\u202e\u009b"}'.encode())
        publish_plainly(channel, "shop", "a.b", b"\x1b[31mred", {"message_id": "\x1b[2J", "headers": {"k\x07": "\x07"}})
        one.wait_for(r"5,012 bytes in all; --full shows them")
        one.wait_for(r"200,012 bytes in all; --full shows them")
        one.wait_for(r'"text": "\\u202e\\x9b"')
        one.wait_for(r"^  k\\x07: \\x07$")
        one.wait_for(r"b'\\x1b\[31mred'  \(not JSON, 8 bytes\)")
        one.end(signal.SIGINT)
        assert max(map(len, one.lines)) < 2100
        assert one.output.replace("\n", "").replace("…", "").isascii()
    with tail("--full", folder=folder, url=sqlite_url) as one, publishing_to(sqlite_url, "shop") as channel:
        publish_plainly(channel, "shop", "a.b", b'{"text": "' + b"y" * 200_000 + b'"}')
        one.wait_for("y" * 200_000)


def test_a_foreign_message_with_odd_properties_is_shown(folder: Path, sqlite_url: str) -> None:
    with tail(folder=folder, url=sqlite_url) as one, publishing_to(sqlite_url, "shop") as channel:
        publish_plainly(channel, "shop", "", b"{}", {"headers": None, "message_id": 7, "timestamp": "never"})
        one.wait_for(r"\(no name\)  from shop")


@pytest.mark.rabbitmq
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["for-people", "json"])
def test_properties_that_are_not_text_are_skipped_alone(folder: Path, rabbitmq_url: str, form: tuple[str, ...]) -> None:
    with tail(*form, folder=folder, url=rabbitmq_url) as one, publishing_to(rabbitmq_url, "shop"):
        for name in ODD_PROPERTIES:
            publish_raw(rabbitmq_url, b"order.placed", odd_properties(name, name.encode()), b"{}")
        for name in ODD_PROPERTIES:
            one.wait_for(name)
        assert "cannot be shown" not in one.output


# --- when it ends -----------------------------------------------------------------------------


def test_the_exit_code_shows_whether_the_limit_was_reached(folder: Path, url: str) -> None:
    none = lightbus("tail", "--limit", "1", "--timeout", "0.5", folder=folder, url=url)
    assert (none.returncode, none.stdout) == (1, "")

    def ends_well() -> bool:  # the limit includes the connection
        return lightbus("tail", "--timeout", "2", folder=folder, url=url).returncode == 0

    wait_until(ends_well, "a tail that has listened ends with 0")
    with tail("--limit", "2", "--timeout", "60", folder=folder, url=url) as one, publishing_to(url, "shop") as channel:
        for number in range(3):
            publish_plainly(channel, "shop", "a.b", b"%d" % number)
        assert one.end() == 0
        assert [line for line in one.lines if line.startswith("  ")] == ["  0", "  1"]
        assert one.lines[-1] == "2 shown."


def unread_tail(folder: Path, url: str) -> tuple[subprocess.Popen[str], IO[str], IO[str]]:
    """A running `lightbus tail` whose stdout only the test reads."""
    process = subprocess.Popen(
        [*LIGHTBUS, "tail"],
        cwd=folder,
        env=environment({"LIGHTBUS_URL": url}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert "Listening" in process.stderr.readline()
    return process, process.stdout, process.stderr


@pytest.mark.parametrize("published", [0, 3])
def test_it_ends_quietly_when_its_reader_exits(folder: Path, sqlite_url: str, published: int) -> None:
    """As with `| head -1`. Also without a further event, so that no write fails."""
    with publishing_to(sqlite_url, "shop") as channel:
        process, output, errors = unread_tail(folder, sqlite_url)
        for number in range(published):
            publish_plainly(channel, "shop", "a.b", b"%d" % number)
        if published:
            output.readline()
        output.close()
        assert process.wait(LIMIT) == 0
        assert errors.read() == ""
        errors.close()


def test_errors_are_one_message(folder: Path, sqlite_url: str) -> None:
    for arguments, status, words in (
        (["a..b"], 2, "'a..b' is not a topic pattern"),
        (["nowhere:app"], 2, "no module 'nowhere'"),
        (["a.b", "bus:app"], 2, "'bus:app' is not a pattern. Give MODULE:ATTR or a URL first"),
        (["--source", "Shop"], 2, "app name 'Shop'"),
        (["amqp://ann:s3cr3t@127.0.0.1:1/"], 1, "Connection refused. Is the broker running there?"),
        (["redis://localhost"], 1, "redis:// is not supported"),
    ):
        done = lightbus("tail", *arguments, folder=folder, url=sqlite_url)
        assert (done.returncode, done.stdout) == (status, ""), arguments
        assert words in done.stderr
        assert "s3cr3t" not in done.stderr
        assert "Traceback" not in done.stderr


def test_a_broker_that_never_answers_is_an_error(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://ann:s3cr3t@127.0.0.1:{silent.getsockname()[1]}/"
        done = lightbus("tail", "--timeout", "0.5", folder=folder, url=url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "did not answer within --timeout" in done.stderr
    assert "s3cr3t" not in done.stderr


@pytest.mark.rabbitmq
def test_a_lost_connection_is_logged_and_replaced(folder: Path, rabbitmq: nodes.Node, rabbitmq_url: str) -> None:
    with tail(folder=folder, url=rabbitmq_url) as one:
        rabbitmq.ctl("close_all_connections", "--vhost", rabbitmq_url.rpartition("/")[2], "a test")
        one.wait_for("The connection was lost .* reconnecting. Events in the meantime are not shown.")
        one.wait_for("Listening for")
        with publishing_to(rabbitmq_url, "shop") as channel:
            publish_plainly(channel, "shop", "a.b", b'"again"')
        one.wait_for('^  "again"$')
        assert one.end(signal.SIGINT) == 0


def test_a_consumer_that_the_broker_cancels_is_replaced(url: str) -> None:
    with running_tail(url) as one, publishing_to(url, "shop") as channel:
        before = one.queue
        one.consumer_cancelled("its consumer")  # called directly: only this connection may delete its exclusive queue
        one.wake()
        wait_until(lambda: one.epoch > 1, "it has subscribed again")
        assert one.queue != before
        publish_plainly(channel, "shop", "a.b", b"1")
        assert take(one).delivery.body == b"1"


# --- limits -----------------------------------------------------------------------


def test_its_queue_is_deleted_at_the_end(broker_url: str) -> None:
    with running_tail(broker_url) as one:
        name = one.queue
        assert name.startswith("lightbus.tail.")
    with connected(broker_url) as connection, pytest.raises(amqp.exceptions.NotFound):
        connection.channel().queue_declare(name, passive=True)


def is_newest(tail: Tail, body: bytes) -> bool:
    newest = tail.buffer.newest
    return newest is not None and newest.body == body


def test_the_oldest_events_that_are_not_taken_are_dropped_and_counted(broker_url: str) -> None:
    """At most HELD events are kept. The others are dropped, the oldest first, and counted."""
    app = Lightbus("shop", url=broker_url)
    event = app.event(type("Noted", (), {"__annotations__": {"number": int}}))
    many = 3 * HELD
    with app, running_tail(broker_url) as one:
        for start in range(0, many, 200):  # less than the limit of the broker's queue, so all are read
            receipts = app.publish_many_sync(event(number=number) for number in range(start, start + 200))
            assert all(receipt.routed for receipt in receipts)
            last = b'{"number":%d}' % (start + 199)
            wait_until(functools.partial(is_newest, one, last), "all were read")
        taken = [take(one) for _ in range(len(one.buffer))]
        assert one.take(0) is None
    assert len(taken) <= HELD
    assert not any(each.overrun for each in taken)
    assert len(taken) + sum(each.dropped for each in taken) == many
    numbers = [json.loads(each.delivery.body)["number"] for each in taken]
    assert numbers == list(range(many - len(numbers), many))


def test_the_buffer_is_limited_in_bytes(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightbus.tail.HELD_BYTES", 1000)
    with running_tail(sqlite_url) as one, publishing_to(sqlite_url, "shop") as channel:
        for number in (b"1", b"2", b"3"):
            publish_plainly(channel, "shop", "a.b", number * 600)
        wait_until(lambda: one.buffer.dropped == 2, "two were dropped")
        taken = take(one)
        assert (taken.delivery.body[:1], taken.dropped) == (b"3", 2)
        publish_plainly(channel, "shop", "a.b", b"4" * 5000)  # a single one is kept, whatever its size
        assert take(one).delivery.body[:1] == b"4"


def stop(program: Program, url: str) -> None:
    """Stop it while it holds no lock of the embedded broker's file. SQLite would let all its clients wait for that."""
    file = Path(url.removeprefix("sqlite:///"))
    for _ in range(20):
        program.signal(signal.SIGSTOP)
        until_stopped(program.process.pid)
        if not url.startswith("sqlite:") or can_be_written(file):
            return
        program.signal(signal.SIGCONT)
        wait_until(lambda: can_be_written(file), "its transaction has ended")
    pytest.fail("it holds the lock of the file each time")


def can_be_written(file: Path) -> bool:
    with contextlib.closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        return True


def test_a_stopped_tail_does_not_block_publishers_and_reports_missing_events(folder: Path, url: str) -> None:
    with tail(folder=folder, url=url) as one, publishing_to(url, "shop") as channel:
        publish_plainly(channel, "shop", "a.b", b'"first"')
        one.wait_for('^  "first"$')
        stop(one, url)
        many = [Publication("shop", "a.b", b"%d" % number, {}, mandatory=False) for number in range(2 * QUEUE_LIMIT)]
        with connected(url) as connection:
            publish_confirmed(connection, *many)
        publish_plainly(channel, "shop", "a.b", b'"last"')
        one.signal(signal.SIGCONT)
        one.wait_for("some events may be missing: the queue was full")
        one.wait_for('^  "last"$')
        one.end(signal.SIGINT)
        shown = sum(line.startswith("  ") for line in one.lines)
        assert QUEUE_LIMIT <= shown < 2 * QUEUE_LIMIT


@pytest.mark.parametrize("read_at_last", [True, False])
def test_publishers_do_not_wait_for_a_terminal_that_does_not_read(
    folder: Path, sqlite_url: str, read_at_last: bool
) -> None:
    app = Lightbus("shop", url=sqlite_url)
    event = app.event(type("Noted", (), {"__annotations__": {"text": str}}))
    process, output, _ = unread_tail(folder, sqlite_url)
    with app:  # far more than a pipe (64 KiB) and the buffer can hold
        for _ in range(30):
            app.publish_many_sync(event(text="x" * 1000) for _ in range(HELD // 10))
        app.publish_sync(event(text="last"))
    if read_at_last:
        for line in output:
            if '"last"' in line:
                break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    if not read_at_last:  # those in the buffer are not shown, but counted
        assert re.fullmatch(r"[\d,]+ shown, [\d,]+ dropped\.", errors.splitlines()[-1])
        return
    dropped = sum(int(one.replace(",", "")) for one in re.findall(r"\.\.\. ([\d,]+) events were dropped", errors))
    counts = re.fullmatch(r"([\d,]+) shown, ([\d,]+) dropped\.", errors.splitlines()[-1])
    assert counts is not None, errors
    shown, dropped_in_all = (int(count.replace(",", "")) for count in counts.groups())
    assert dropped_in_all == dropped
    sent = 3 * HELD + 1
    if "some events may be missing" in errors:  # if it was so slow that the broker's queue was full, too
        assert shown > 0
        assert shown + dropped <= sent
    else:
        assert dropped > HELD
        assert shown + dropped == sent


# --- on a terminal ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_it_uses_colors_on_a_terminal_unless_they_are_disabled(
    folder: Path, sqlite_url: str, extra: dict[str, str], coloured: bool
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*LIGHTBUS, "tail", "--limit", "1"],
        cwd=folder,
        env=environment({"LIGHTBUS_URL": sqlite_url, "TERM": "xterm", **extra}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    while b"Listening" not in seen:
        seen += os.read(ours, 4096)
    with publishing_to(sqlite_url, "shop") as channel:
        publish_plainly(channel, "shop", "a.b", b'{"n": 1}')
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)
    assert process.wait(LIMIT) == 0
    assert b"1 shown." in seen
    assert (b"\x1b[" in seen) is coloured


def test_colors_can_be_forced_in_a_pipe(folder: Path, sqlite_url: str) -> None:
    with tail("--limit", "1", folder=folder, url=sqlite_url, extra={"FORCE_COLOR": "1"}) as one:
        with publishing_to(sqlite_url, "shop") as channel:
            publish_plainly(channel, "shop", "a.b", b'{"n": 1}')
        assert one.end() == 0
        assert '\x1b[34m"n"\x1b[0m: \x1b[33m1\x1b[0m' in one.output
