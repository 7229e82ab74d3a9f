"""`lightbus dead`: list, show, retry and purge, with interruptions."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import amqp.exceptions
import pytest

from lightbus import Lightbus, Retry
from lightbus.cli import tables
from lightbus.cli.dead.reading import NONE
from lightbus.connection.counts import TRIES, queue_counts
from lightbus.connection.declare import declare
from lightbus.dead_letters.actions import Outcome, retry
from lightbus.dead_letters.letter import Filter, read_dead_letter, retry_publication
from lightbus.dead_letters.queue import FIRST_WINDOW, opened
from lightbus.transport import Delivery, Publication
from lightbus.wire import codec, topology
from tests import rabbitmq as nodes
from tests.bus import connected, publish_confirmed, publish_plainly, take_all
from tests.odd import ODD_PROPERTIES, odd_properties, publish_raw
from tests.patience import LIMIT, wait_until
from tests.processes import LIGHTBUS, Program, environment, lightbus, working

BUS = """\
import os
from lightbus.connection.counts import TRIES, queue_counts
from lightbus import Lightbus, Message, Reject, Retry

app = Lightbus("billing", retry=Retry(delays=(0.05,)))

@app.event
class InvoicePaid:
    number: int

@app.on(InvoicePaid)
def charge(paid: InvoicePaid, message: Message):
    print(f"charge {paid.number} attempt {message.attempt}", flush=True)
    if not os.path.exists("fixed"):
        raise LookupError(f"no invoice {paid.number}\\x1b[31m")

@app.on("invoice.*", queue="closed")
def close(paid: dict, message: Message):
    print(f"close {paid['number']} of {message.source}", flush=True)
    if paid["number"] % 2:
        raise Reject("the account is closed")
"""


FILES = {"billing.py": BUS}


Dead = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def dead(folder: Path, url: str) -> Dead:
    """`dead("list", "--stats")`"""

    def run(command: str, *options: str, given: str = "") -> CompletedProcess[str]:
        return lightbus("dead", command, "billing:app", *options, folder=folder, url=url, given=given.encode())

    return run


def ready(url: str, queue: str) -> int:
    try:
        with connected(url) as connection:
            return queue_counts(connection.channel(), queue, tries=TRIES).ready
    except amqp.exceptions.NotFound:
        return -1


def listed(dead: Dead, *options: str) -> list[dict[str, Any]]:
    done = dead("list", "--json", "--limit", "0", *options)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def app_of(url: str) -> Lightbus:
    """An app with the topology of the one in the file."""
    app = Lightbus("billing", url=url)
    app.on("invoice.*", name="charge")(lambda body: None)
    app.on("invoice.*", name="close", queue="closed")(lambda body: None)
    return app


def put_dead_letters(
    url: str,
    count: int,
    *,
    queue: str = "billing.main",
    handler: str = "charge",
    minutes_ago: float = 0,
    body: bytes | None = None,
) -> list[str]:
    """Dead letters as the app writes them."""
    app = app_of(url)
    dead_letters = []
    with connected(url) as connection:
        declare(connection, app.topology())
        channel = connection.channel()
        for number in range(count):
            content = b'{"number": %d}' % number if body is None else body
            first = Delivery(channel, 0, False, "shop", "invoice.paid", {}, content)
            properties = codec.copy_properties("billing", first, handler, 2, queue)
            properties["headers"] |= codec.error_headers(LookupError(f"no invoice {number}"))
            stamp = time.gmtime(time.time() - 60 * minutes_ago)
            properties["headers"][codec.ERROR_TIME] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", stamp)
            dead_letters.append(Publication("billing.internal", "dead", first.body, properties))
        publish_confirmed(connection, *dead_letters)
    wait_until(lambda: ready(url, "billing.dead") >= count, "the dead letters")
    return [dead_letter.properties["message_id"] for dead_letter in dead_letters]


@pytest.mark.rabbitmq
def test_dead_letters_with_odd_properties_can_be_listed_shown_retried_and_purged(
    folder: Path, rabbitmq_url: str
) -> None:
    """The broker dead-letters them unchanged, because their worker has crashed."""
    app = app_of(rabbitmq_url)
    with connected(rabbitmq_url) as connection:
        declare(connection, app.topology())
    for name in ODD_PROPERTIES:
        publish_raw(rabbitmq_url, b"billing.dead", odd_properties(name, name.encode()), b"{}", exchange=b"")
    wait_until(lambda: ready(rabbitmq_url, "billing.dead") == len(ODD_PROPERTIES), "the dead letters")

    def run(command: str, *options: str) -> CompletedProcess[str]:
        return lightbus("dead", command, "billing:app", *options, folder=folder, url=rabbitmq_url)

    for command in (("list",), ("list", "--json"), ("show", "--all"), ("show", "--all", "--json")):
        done = run(*command)
        assert (done.returncode, done.stderr) == (0, ""), command
        assert all(name in done.stdout for name in ODD_PROPERTIES), command
    assert run("show", "latin-1-name").stdout.count("gr\\xf6sse: x") == 1
    assert "0 retried" in run("retry", "--all").stdout
    assert f"{len(ODD_PROPERTIES)} skipped" in run("retry", "--all").stderr
    assert f"{len(ODD_PROPERTIES)} purged" in run("purge", "--all", "--yes").stdout


# --- a typical session ------------------------------------------------------------------------


def test_an_operator_finds_a_failed_event_and_retries_it_for_its_handler(folder: Path, url: str, dead: Dead) -> None:
    with working("billing:app", folder=folder, url=url) as first:
        done = lightbus("publish", "billing:app", "invoice.paid", "number=2", folder=folder, url=url)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: ready(url, "billing.dead") == 1, "a dead letter")
        first.wait_for("close 2 of billing")
        first.end(signal.SIGTERM)

    done = dead("list")
    head, line, *_ = done.stdout.splitlines()
    assert head.split() == ["ID", "AGE", "EVENT", "HANDLER", "ATTEMPT", "ERROR"]
    assert line.split()[2:6] == ["invoice.paid", "charge", "2", "LookupError:"]
    assert "\x1b" not in done.stdout  # control characters of other publishers are escaped
    (dead_letter,) = listed(dead)
    assert "lightbus dead show billing:app ID" in done.stdout

    shown = dead("show", dead_letter["id"][:20]).stdout
    for wanted in ("invoice.paid  from billing", "charge", "LookupError: no invoice 2", '"number": 2', "in charge"):
        assert wanted in shown
    assert "\x1b" not in shown

    (folder / "fixed").touch()
    done = dead("retry", "--id", dead_letter["id"])
    assert (done.stdout, done.returncode) == ("1 retried.\n", 0)
    assert listed(dead) == []
    # The event may be handled before the worker logs that it is ready.
    with Program("worker", "billing:app", folder=folder, url=url) as second:
        second.wait_for("charge 2 attempt 1")  # the attempts start again at 1
        wait_until(lambda: ready(url, "billing.main") == 0, "an empty queue")
        assert second.end(signal.SIGTERM) == 0
    assert "close 2" not in second.output


def test_dead_letters_are_counted_by_handler_and_error(url: str, dead: Dead) -> None:
    put_dead_letters(url, 3)
    put_dead_letters(url, 1, handler="close", queue="billing.closed")
    lines = dead("list", "--stats").stdout.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["COUNT", "HANDLER", "ERROR"],
        ["3", "charge", "LookupError"],
        ["1", "close", "LookupError"],
    ]
    groups = json.loads(dead("list", "--stats", "--json").stdout)
    assert [(group["handler"], group["count"], group["events"]) for group in groups] == [
        ("charge", 3, {"invoice.paid": 3}),
        ("close", 1, {"invoice.paid": 1}),
    ]


def test_reading_changes_nothing(url: str, dead: Dead) -> None:
    ids = put_dead_letters(url, 5)
    for _ in range(2):
        assert sorted(dead_letter["id"] for dead_letter in listed(dead)) == sorted(ids)
    assert dead("show", ids[3]).returncode == 0
    assert dead("list", "--limit", "2").stdout.count("LookupError") == 2
    assert "3 more were not read" in dead("list", "--limit", "2").stdout
    assert "5 of 5 would be retried" in dead("retry", "--all", "--dry-run").stdout
    assert "5 of 5 would be purged" in dead("purge", "--all", "--dry-run").stdout
    wait_until(lambda: ready(url, "billing.dead") == 5, "all dead letters returned")


# --- more than one window ---------------------------------------------------------------------


MANY = FIRST_WINDOW + 2 * FIRST_WINDOW + 4 * FIRST_WINDOW + 10
"""Four windows, of which the last is not full."""


def ids_in(output: str) -> list[str]:
    return [dead_letter["id"] for dead_letter in json.loads(output)]


def test_reading_keeps_the_order_and_returns_each_dead_letter_once(url: str, dead: Dead) -> None:
    ids = put_dead_letters(url, MANY)
    assert ids_in(dead("list", "--json", "--limit", "70").stdout) == ids[:70]
    assert ids_in(dead("list", "--json", "--limit", "0").stdout) == ids
    assert ids_in(dead("show", "--all", "--json").stdout) == ids
    assert ready(url, "billing.dead") == MANY, "all are in the queue when the command ends"
    left = take_all(app_of(url), "billing.dead")
    assert [dead_letter.properties["message_id"] for dead_letter in left] == ids
    returns = [dead_letter.properties["headers"]["x-delivery-count"] for dead_letter in left]
    assert max(returns) <= 3, "far from the 1,000,000 that the queue allows"


def test_dead_letters_that_are_not_selected_are_returned_in_order(url: str, dead: Dead) -> None:
    ids = put_dead_letters(url, MANY)
    some = [ids[0], *ids[40:60], ids[-1]]
    done = dead("purge", "--yes", *(word for id_ in some for word in ("--id", id_)))
    assert (done.stdout, done.returncode) == (f"{len(some)} purged.\n", 0)
    left = [id_ for id_ in ids if id_ not in some]
    assert ids_in(dead("list", "--json", "--limit", "0").stdout) == left
    assert dead("retry", "--limit", "120").stdout == "120 retried.\n"
    assert ids_in(dead("list", "--json", "--limit", "0").stdout) == left[120:]
    assert dead("purge", "--all", "--yes").stdout == f"{len(left) - 120} purged.\n"
    assert ready(url, "billing.dead") == 0


def test_two_readers_at_once_share_the_dead_letters_and_both_end(url: str) -> None:
    ids = put_dead_letters(url, FIRST_WINDOW + 10)
    with opened(app_of(url)) as one, opened(app_of(url)) as other:
        assert (one.count, other.count) == (len(ids), len(ids))
        first = [dead_letter.id for dead_letter in itertools.islice(one.dead_letters(), 5)]
        second = [dead_letter.id for dead_letter in other.dead_letters()]
        first += [dead_letter.id for dead_letter in one.dead_letters()]
    assert second
    assert sorted(first + second) == sorted(ids)
    with opened(app_of(url)) as again:
        assert again.count == len(ids)


def test_a_stalled_consumer_does_not_end_the_reading(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RabbitMQ may stop sending to a consumer."""
    ids = put_dead_letters(url, 5)
    monkeypatch.setattr("lightbus.dead_letters.queue.PATIENCE", 0.2)
    with opened(app_of(url)) as queue:
        queue.channel.consume = lambda *_, **__: ""  # type: ignore[method-assign]
        assert [dead_letter.id for dead_letter in queue.dead_letters()] == ids
    with opened(app_of(url)) as queue:
        assert queue.count == 5


def test_a_retry_with_a_low_rate_reads_few_dead_letters_ahead(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightbus.dead_letters.actions.SECONDS_AHEAD", 1.0)
    put_dead_letters(url, 20)
    outcome = Outcome()
    app = app_of(url)
    left: list[int] = []
    with app, opened(app, on_read=lambda _: left.append(ready(url, "billing.dead"))) as queue:
        retry(queue, Filter(), outcome, limit=3, rate=3)
        assert min(left) >= 12, "RabbitMQ closes a channel that keeps a delivery for 30 minutes"
    assert outcome.done == 3


def test_a_reading_that_an_error_ends_returns_everything_in_order(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightbus.dead_letters.queue.PATIENCE", LIMIT)  # a busy broker needs more than a command has
    ids = put_dead_letters(url, MANY)
    with contextlib.suppress(KeyboardInterrupt), opened(app_of(url)) as queue:
        assert [read.id for read in itertools.islice(queue.dead_letters(), FIRST_WINDOW + 5)] == ids[: FIRST_WINDOW + 5]
        raise KeyboardInterrupt
    with opened(app_of(url)) as queue:
        assert [dead_letter.id for dead_letter in queue.dead_letters()] == ids


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_reader_returns_everything(folder: Path, url: str, number: signal.Signals) -> None:
    ids = put_dead_letters(url, MANY)
    with subprocess.Popen(
        [*LIGHTBUS, "dead", "show", "billing:app", "--all"],
        cwd=folder,
        env=environment({"LIGHTBUS_URL": url}),
        stdout=subprocess.PIPE,  # not read: the pipe fills, and the command blocks
        stderr=subprocess.PIPE,
    ) as program:
        wait_until(lambda: ready(url, "billing.dead") < MANY, "some of them taken")
        program.send_signal(number)
        program.communicate(timeout=LIMIT)
    wait_until(lambda: ready(url, "billing.dead") == MANY, "all dead letters returned")
    with opened(app_of(url)) as queue:
        seen = [dead_letter.id for dead_letter in queue.dead_letters()]
    # A command waits for up to PATIENCE. On a busy broker, that may not be enough for the order: see the test above.
    in_order = number == signal.SIGINT and url.startswith("sqlite")
    assert seen == ids if in_order else sorted(seen) == sorted(ids)


def test_filters_select_dead_letters(url: str, dead: Dead) -> None:
    old = put_dead_letters(url, 1, minutes_ago=200)
    new = put_dead_letters(url, 1)
    other = put_dead_letters(url, 1, handler="close", queue="billing.closed")
    for options, wanted in [
        (["--older", "2h"], old),
        (["--newer", "2h"], new + other),
        (["--newer", "2h", "--handler", "charge"], new),
        (["--error", "builtins.LookupError"], []),
        (["--error", "lookuperror", "--handler", "close"], other),
        (["--event", "invoice.*"], old + new + other),
        (["--event", "order.*"], []),
        (["--id", new[0], "--id", old[0]], old + new),
    ]:
        assert sorted(dead_letter["id"] for dead_letter in listed(dead, *options)) == sorted(wanted), options


@pytest.mark.parametrize("command", [["list"], ["show", ""], ["retry"], ["purge", "--yes"]])
def test_an_empty_id_is_refused_because_it_would_match_everything(url: str, dead: Dead, command: list[str]) -> None:
    put_dead_letters(url, 2)
    options = [] if command[0] == "show" else ["--id", ""]
    done = dead(*command, *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert ready(url, "billing.dead") == 2


def test_an_invalid_event_pattern_is_refused(url: str, dead: Dead) -> None:
    put_dead_letters(url, 1)
    done = dead("list", "--event", "invoice..paid")
    assert done.returncode == 2
    assert "--event: 'invoice..paid' is not a topic pattern" in done.stderr


def test_a_retry_goes_to_its_queue_and_handler_and_keeps_source_and_id(url: str, dead: Dead) -> None:
    (id_,) = put_dead_letters(url, 1, handler="close", queue="billing.closed")
    assert dead("retry", "--id", id_).returncode == 0
    app = app_of(url)
    assert take_all(app, "billing.main") == []
    (copy,) = take_all(app, "billing.closed")
    message = codec.read_message("billing", copy)
    assert (message.id, message.event, message.source, message.attempt) == (id_, "invoice.paid", "shop", 1)
    headers = copy.properties["headers"]
    assert headers["lightbus-handler"] == "close"
    assert not [name for name in headers if name.startswith(("lightbus-error", "x-death"))]


def test_retry_and_purge_need_a_selection(url: str, dead: Dead) -> None:
    put_dead_letters(url, 1)
    for command in ("retry", "purge"):
        done = dead(command)
        assert done.returncode == 2
        assert "Select dead letters: use a filter (see --help), --limit N, or --all." in done.stderr


def test_a_dead_dead_letter_of_a_missing_queue_is_skipped_and_reported(url: str, dead: Dead) -> None:
    put_dead_letters(url, 1, queue="billing.gone")
    put_dead_letters(url, 1)
    done = dead("retry", "--all")
    assert done.returncode == 1
    assert done.stdout == "1 retried.\n"
    assert "1 skipped: their queue billing.gone does not exist. Start a worker" in done.stderr
    (left,) = listed(dead)
    assert left["queue"] == "billing.gone"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_retry_loses_nothing(folder: Path, url: str, dead: Dead, number: signal.Signals) -> None:
    ids = put_dead_letters(url, 100)  # enough for 20 s
    with Program("dead", "retry", "billing:app", "--all", "--rate", "5", folder=folder, url=url) as program:
        wait_until(lambda: ready(url, "billing.main") >= 5, "some of them retried")
        code = program.end(number)
    if number == signal.SIGINT:
        assert code == 130
        assert "Interrupted: " in program.output
    wait_until(lambda: ready(url, "billing.main") + ready(url, "billing.dead") >= len(ids), "all of them somewhere")
    app = app_of(url)
    retried = [copy.properties["message_id"] for copy in take_all(app, "billing.main")]
    left = [dead_letter["id"] for dead_letter in listed(dead)]
    assert set(retried) | set(left) == set(ids)
    assert left
    assert len(retried) + len(left) - len(ids) <= 5  # duplicates: published, but not acked yet


def test_retry_respects_the_rate(url: str, dead: Dead) -> None:
    put_dead_letters(url, 6)
    began = time.monotonic()
    assert dead("retry", "--all", "--rate", "4").returncode == 0
    assert time.monotonic() - began > 6 / 4
    assert ready(url, "billing.main") == 6


def test_purge_shows_the_dead_letters_and_asks(url: str, dead: Dead) -> None:
    put_dead_letters(url, 2)
    put_dead_letters(url, 1, handler="close", queue="billing.closed")
    refused = dead("purge", "--handler", "charge", given="n\n")
    assert "Purge 2 of them permanently?" in refused.stderr
    assert refused.returncode == 1
    assert len(listed(dead)) == 3
    assert dead("purge", "--handler", "charge", given="y\n").returncode == 0
    assert [dead_letter["handler"] for dead_letter in listed(dead)] == ["close"]
    done = dead("purge", "--all", "--yes", "--json")
    assert json.loads(done.stdout)["purged"] == 1
    assert ready(url, "billing.dead") == 0


def test_a_purge_without_an_answer_names_the_option_that_skips_the_question(url: str, dead: Dead) -> None:
    put_dead_letters(url, 1)
    done = dead("purge", "--all", given="")
    assert done.returncode == 1
    assert done.stderr.endswith("\nError: stdin ended without an answer. To skip the question: --yes\n")
    assert ready(url, "billing.dead") == 1


def test_purge_deletes_only_what_it_has_shown(folder: Path, url: str, dead: Dead) -> None:
    shown = put_dead_letters(url, 3)
    answer, write = os.pipe()
    command = ("dead", "purge", "billing:app", "--newer", "1h")
    with os.fdopen(answer, "rb") as stdin, Program(*command, folder=folder, url=url, stdin=stdin) as program:
        program.wait_for("3 dead letters. Show one")
        assert dead("purge", "--id", shown[1], "--yes").returncode == 0
        new = put_dead_letters(url, 2)
        os.write(write, b"y\n")
        assert program.end() == 0
    os.close(write)
    assert re.search(r"^(Purge 3 of them permanently\? .*: )?2 purged\.$", program.output, re.MULTILINE)
    assert (
        "1 of those shown is no longer in the queue: retried, purged or being read by another command" in program.output
    )
    assert [dead_letter["id"] for dead_letter in listed(dead)] == new


def test_a_missing_queue_an_empty_queue_and_a_missing_broker_are_distinguished(
    folder: Path, url: str, dead: Dead
) -> None:
    done = dead("list")
    assert done.returncode == 1
    assert "There is no queue billing.dead on " in done.stderr
    assert "Check LIGHTBUS_URL" in done.stderr
    with connected(url) as connection:
        declare(connection, app_of(url).topology())
    assert dead("list").stdout == f"{NONE}\n"
    assert dead("list", "--json").stdout == "[]\n"
    assert "no dead letter of 'billing' has an id that begins with 'abc'" in dead("show", "abc").stderr
    none = dead("show", "--all")
    assert (none.returncode, none.stdout) == (0, f"{NONE}\n")
    assert dead("show", "--all", "--json").stdout == "[]\n"


def test_an_empty_list_shows_how_many_events_wait_for_a_retry(folder: Path, url: str, dead: Dead) -> None:
    (folder / "billing.py").write_text(BUS.replace("0.05", "600"))
    app = Lightbus("billing", url=url, retry=Retry(delays=(600,)))
    app.on("invoice.*", name="charge")(lambda body: None)
    app.on("invoice.*", name="close", queue="closed")(lambda body: None)
    with connected(url) as connection:
        declare(connection, app.topology())
        keys = ("retry.600s", "closed.retry.600s")
        publish_confirmed(connection, *(Publication("billing.internal", key, b"{}", {}) for key in keys))
        for queue in ("billing.retry.600s", "billing.closed.retry.600s"):
            wait_until(lambda queue=queue: ready(url, queue) == 1, "an event that waits")
    waiting = "2 events wait for their next attempt and may become dead letters after the last one."
    assert dead("list").stdout == f"{NONE}\n{waiting}\n"
    assert dead("list", "--json").stdout == "[]\n"


# --- show -------------------------------------------------------------------------------------


def test_numbers_in_a_payload_are_shown_unchanged(url: str, dead: Dead) -> None:
    body = '{"amount": 9.50, "big": 123456789012345678901234567890, "who": "Zoë\u2028"}'
    put_dead_letters(url, 1, body=body.encode())
    shown = dead("show", "--all").stdout
    assert '    "amount": 9.50,\n    "big": 123456789012345678901234567890,\n    "who": "Zoë' in shown
    text = dead("show", "--all", "--json").stdout
    assert '"amount":9.50,"big":123456789012345678901234567890,' in text
    assert text.isascii()
    (dead_letter,) = json.loads(text)
    assert dead_letter["payload"] == json.loads(body)


def test_a_body_that_is_not_json_is_shown(url: str, dead: Dead) -> None:
    put_dead_letters(url, 1, body=b"\x1b[31m")
    assert "body (5 bytes, not JSON)\n  b'\\x1b[31m'\n" in dead("show", "--all").stdout
    (dead_letter,) = json.loads(dead("show", "--all", "--json").stdout)
    assert base64.b64decode(dead_letter["body_base64"]) == b"\x1b[31m"


def test_an_error_of_several_lines_is_shown_as_such(folder: Path, url: str) -> None:
    (folder / "models.py").write_text(MODELS)
    with working("models:app", folder=folder, url=url) as worker:
        lightbus("publish", "models:app", "invoice.paid", "number=5", folder=folder, url=url)
        worker.wait_for("dead-lettered to billing.dead")
    list_done, show = (
        lightbus("dead", command, "models:app", *options, folder=folder, url=url)
        for command, *options in (("list",), ("show", "--all"))
    )
    first = "DecodeError: the body cannot be read as Paid: 2 errors (amount, customer.id):"
    assert list_done.stdout.splitlines()[1].endswith(first)
    assert (
        f"error        lightbus.errors.{first}\n"
        "               amount: Field required\n"
        "               customer.id: Input should be a valid integer, unable to parse string as an integer\n"
    ) in show.stdout


MODELS = """\
from pydantic import BaseModel
from lightbus import Lightbus

app = Lightbus("billing")

@app.event
class InvoicePaid(BaseModel):
    number: int
    customer: dict[str, str] = {"id": "x"}

class Customer(BaseModel):
    id: int

class Paid(BaseModel):
    amount: int
    customer: Customer

@app.on(InvoicePaid)
def charge(paid: Paid): ...
"""


# --- the next step ----------------------------------------------------------------------------


def next_step(done: CompletedProcess[str]) -> str:
    return done.stdout.splitlines()[-1]


def test_show_prints_the_command_that_retries_this_dead_letter(url: str, dead: Dead) -> None:
    (id_,) = put_dead_letters(url, 1)
    step = f"lightbus dead retry billing:app --id {id_} --handler charge"
    assert next_step(dead("show", id_)) == f"After fixing the cause, run: {step}"


def test_show_and_retry_report_a_handler_that_no_longer_exists(url: str, dead: Dead) -> None:
    (id_,) = put_dead_letters(url, 1, handler="bill")
    step = f"lightbus dead purge billing:app --id {id_} --handler bill"
    assert next_step(dead("show", id_)) == f"Next: restore the handler, or run: {step}"
    warning = "for the handler bill, which does not exist in this code"
    assert f"1 of them would be {warning}" in dead("retry", "--all", "--dry-run").stdout
    done = dead("retry", "--all")
    assert (done.returncode, done.stdout) == (0, "1 retried.\n")
    assert f"1 of them are {warning}" in done.stderr


@pytest.mark.parametrize("options", [[], ["--stats"]])
def test_without_a_match_list_prints_the_command_that_shows_all(url: str, dead: Dead, options: list[str]) -> None:
    put_dead_letters(url, 2)
    done = dead("list", "--handler", "chrge", *options)
    assert done.stdout == "None of the 2 dead letters match. To see all: lightbus dead list billing:app --stats\n"


# --- pipes and terminals ----------------------------------------------------------------------


@pytest.mark.parametrize("command", [["list"], ["list", "--json", "--limit", "0"], ["show", "--all"]], ids=" ".join)
def test_it_ends_quietly_when_its_reader_exits(folder: Path, url: str, command: list[str]) -> None:
    """As with `| head -1`."""
    put_dead_letters(url, 60)
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [*LIGHTBUS, "dead", command[0], "billing:app", *command[1:]],
        cwd=folder,
        env=environment({"LIGHTBUS_URL": url}),
        stdout=theirs,
        stderr=subprocess.PIPE,
        timeout=2 * LIMIT,
        check=False,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")
    wait_until(lambda: ready(url, "billing.dead") == 60, "all dead letters returned")


@pytest.mark.parametrize("command", [["list"], ["show", "--all", "--json"]])
def test_a_full_disk_is_not_reported_as_a_lost_connection(folder: Path, url: str, command: list[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs Linux' /dev/full")
    put_dead_letters(url, 2)
    name, *options = command
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*LIGHTBUS, "dead", name, "billing:app", *options],
            cwd=folder,
            env=environment({"LIGHTBUS_URL": url}),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "Error: the output cannot be written: No space left on device. It is incomplete.\n"
    assert ready(url, "billing.dead") == 2


def test_long_errors_are_cut_at_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["ID  ERROR", "1   " + "x" * 96]
    monkeypatch.setenv("COLUMNS", "50")
    assert tables.fitted(lines, 20) == ["ID  ERROR", "1   " + "x" * 45 + "…"]
    assert tables.fitted(lines, 70) == ["ID  ERROR", "1   " + "x" * 65 + "…"]
    monkeypatch.setenv("COLUMNS", "100")
    assert tables.fitted(lines, 20) == lines


@pytest.mark.rabbitmq
def test_a_retry_reports_its_progress_when_the_broker_stops(folder: Path, rabbitmq: nodes.Node) -> None:
    vhost = "dead-away"
    rabbitmq.add_vhosts([vhost])
    url = rabbitmq.vhost_url(vhost)
    put_dead_letters(url, 200)  # enough for minutes: rabbitmqctl may take many seconds to start
    with Program("dead", "retry", "billing:app", "--all", "--rate", "2", folder=folder, url=url) as program:
        wait_until(lambda: ready(url, "billing.main") >= 2, "some of them retried")
        rabbitmq.ctl("close_all_connections", "--vhost", vhost, "gone")
        assert program.end() == 1
    assert re.search(r"^[1-9]\d* retried\.$", program.output, re.MULTILINE)
    assert "What was not confirmed is in billing.dead as before." in program.output


def test_passwords_in_urls_are_not_shown(folder: Path) -> None:
    for command in (["dead", "list"], ["dead", "retry", "--all"], ["dead", "purge", "--all", "--yes"]):
        first, second, *rest = command
        done = lightbus(
            first, second, "billing:app", *rest, folder=folder, url="amqp://ann:s3cr3t@127.0.0.1:1/?connect_timeout=1"
        )
        assert done.returncode == 1
        assert "amqp://ann:**@127.0.0.1:1/" in done.stderr
        assert "s3cr3t" not in done.stdout + done.stderr


# --- what the broker dead-lettered --------------------------------------------------------------


def reject_first(url: str, queue: str, exchange: str, properties: dict[str, Any]) -> None:
    """Publish with any properties, then let the broker dead-dead_letter the message."""
    app = app_of(url)
    with connected(url) as connection:
        declare(connection, topology.publishing(exchange))
        declare(connection, app.topology())
        channel = connection.channel()
        publish_plainly(channel, exchange, "invoice.paid", b'{"number": 7}', properties)
        taken: list[Delivery] = []
        wait_until(lambda: bool(taken) or taken.extend(filter(None, [channel.get(queue)])), "the event")
        channel.basic_reject(taken[0].delivery_tag, requeue=False)
        channel.queue_declare(queue, passive=True)
    wait_until(lambda: ready(url, "billing.dead") == 1, "the dead letter")


FORGED = {"lightbus-source": "bank", "lightbus-handler": "close", "lightbus-attempt": 9, "lightbus-error-type": "Lie"}


def test_forged_headers_do_not_describe_a_dead_letter(url: str, dead: Dead) -> None:
    reject_first(url, "billing.main", "evil", {"message_id": "m-1", "headers": {**FORGED, "tenant": "acme"}})
    (dead_letter,) = listed(dead)
    assert (dead_letter["source"], dead_letter["handler"], dead_letter["attempt"]) == ("evil", None, 1)
    assert (dead_letter["error_type"], dead_letter["by_broker"], dead_letter["queue"]) == (
        "rejected",
        True,
        "billing.main",
    )
    assert dead("retry", "--all", "--trust-origin").returncode == 0
    (copy,) = take_all(app_of(url), "billing.main")
    message = codec.read_message("billing", copy)
    assert (message.id, message.source, message.event, message.attempt) == ("m-1", "evil", "invoice.paid", 1)
    assert message.headers == {"tenant": "acme"}
    assert "lightbus-handler" not in copy.properties["headers"]


@pytest.mark.rabbitmq
def test_an_unverified_source_is_retried_only_with_trust_origin(folder: Path, rabbitmq_url: str) -> None:
    """RabbitMQ 3 merges its record of a death into an x-death header that a publisher has written."""
    routing = {"exchange": "bank", "routing-keys": ["money.sent"]}
    death = {"queue": "billing.main", "reason": "rejected", "count": 0, **routing}
    reject_first(rabbitmq_url, "billing.main", "evil", {"message_id": "m-1", "headers": {"x-death": [death]}})
    with connected(rabbitmq_url) as connection:
        version = connection.server_properties["version"]
    done = lightbus("dead", "list", "billing:app", "--json", folder=folder, url=rabbitmq_url)
    (dead_letter,) = json.loads(done.stdout)
    if version.startswith("3."):
        assert (dead_letter["source"], dead_letter["source_proven"]) == ("bank", False)
        done = lightbus("dead", "retry", "billing:app", "--all", folder=folder, url=rabbitmq_url)
        assert done.returncode == 1
        assert "1 skipped: the broker dead-lettered them" in done.stderr
        assert ready(rabbitmq_url, "billing.main") == 0
        done = lightbus("dead", "show", "billing:app", "m-1", folder=folder, url=rabbitmq_url)
        assert "from bank  (not verified: " in done.stdout
    else:
        assert dead_letter["source"] == "evil"


@pytest.mark.rabbitmq
def test_show_reports_an_event_that_crashed_its_workers(rabbitmq_url: str, folder: Path) -> None:
    app = app_of(rabbitmq_url)
    with connected(rabbitmq_url) as connection:
        declare(connection, app.topology())
        channel = connection.channel()
        publish_plainly(channel, "billing", "invoice.paid", b'{"number": 7}')
        wait_until(lambda: _requeued_until_dead(channel), "the delivery limit")
    done = lightbus("dead", "list", "billing:app", folder=folder, url=rabbitmq_url)
    assert "delivery_limit: its worker crashed (or lost its connection) each time" in done.stdout
    assert "~" in done.stdout  # it has no id, so the id is made of its content


def _requeued_until_dead(channel: Any) -> bool:
    delivery = channel.get("billing.main")
    if delivery is None:
        return int(channel.queue_declare("billing.dead", passive=True)[1]) == 1
    channel.basic_reject(delivery.delivery_tag, requeue=True)
    return False


# --- pure -------------------------------------------------------------------------------------


def dead_letter_of(properties: Any, exchange: str = "billing.internal") -> Any:
    return read_dead_letter("billing", Delivery(None, 1, False, exchange, "dead", properties, b"{}"))  # type: ignore[arg-type]


def broken() -> dict[str, Any]:
    raise ValueError("no table")


@pytest.mark.parametrize(
    "properties",
    [
        {},
        broken,
        {"headers": None},
        {"headers": []},
        {"headers": {"x-death": 5}},
        {"headers": {"x-death": [7]}},
        {
            "headers": {
                "x-death": [{"queue": 1, "exchange": None, "routing-keys": {}, "time": "soon", "reason": b"\xff"}]
            }
        },
        {
            "headers": {"lightbus-error-type": 5, "lightbus-queue": 7, "lightbus-error-time": "yesterday"},
            "timestamp": "x",
        },
        {"timestamp": 10**30, "message_id": 5, "headers": {"lightbus-attempt": True}},
    ],
)
def test_any_dead_letter_can_be_read_and_retried(properties: Any) -> None:
    dead_letter = dead_letter_of(properties)
    assert dead_letter.id
    assert Filter(older=5.0).matches(dead_letter, 0.0) is False
    assert retry_publication(dead_letter).exchange == "billing.internal"


def test_unreadable_properties_do_not_verify_a_source() -> None:
    assert not dead_letter_of(broken).proven
    assert not dead_letter_of({"headers": {"x-death": 5}}).proven
    assert dead_letter_of({"headers": {"lightbus-error-type": "KeyError"}}).proven


def test_a_digest_is_stable_and_differs_after_the_next_failure() -> None:
    headers = {"lightbus-error-type": "KeyError", "lightbus-error-time": "2026-05-04T08:20:55+00:00"}
    first = dead_letter_of({"message_id": "m-1", "headers": headers})
    again = dead_letter_of({"message_id": "m-1", "headers": {**headers, "x-delivery-count": 2}})
    other = dead_letter_of(
        {"message_id": "m-1", "headers": {**headers, "lightbus-error-time": "2026-05-04T08:20:56+00:00"}}
    )
    assert first.digest == again.digest != other.digest
