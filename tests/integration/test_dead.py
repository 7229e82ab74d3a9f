"""`lightbus dead`: an operator finds, understands, requeues and throws away what failed, whoever interrupts."""

from __future__ import annotations

import base64
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
from lightbus import Lightbus, Message, Reject, Retry

app = Lightbus("billing", retry=Retry(delays=(0.05,)))

@app.event
class InvoicePaid:
    number: int

@app.on(InvoicePaid)
def charge(paid: InvoicePaid, message: Message):
    print(f"charge {paid.number} attempt {message.attempt}", flush=True)
    if not os.path.exists("mended"):
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
            return int(connection.channel().queue_declare(queue, passive=True).message_count)
    except amqp.exceptions.NotFound:
        return -1


def listed(dead: Dead, *options: str) -> list[dict[str, Any]]:
    done = dead("list", "--json", "--limit", "0", *options)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def app_of(url: str) -> Lightbus:
    """The app that the file declares, as far as its topology goes."""
    app = Lightbus("billing", url=url)
    app.on("invoice.*", name="charge")(lambda body: None)
    app.on("invoice.*", name="close", queue="closed")(lambda body: None)
    return app


def put_letters(
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
    letters = []
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
            letters.append(Publication("billing.internal", "dead", first.body, properties))
        publish_confirmed(connection, *letters)
    wait_until(lambda: ready(url, "billing.dead") >= count, "letters")
    return [letter.properties["message_id"] for letter in letters]


@pytest.mark.rabbitmq
def test_letters_with_odd_properties_are_listed_shown_and_retried(folder: Path, rabbitmq_url: str) -> None:
    """As the broker dead-letters them: just as they came, since their worker has died."""
    app = app_of(rabbitmq_url)
    with connected(rabbitmq_url) as connection:
        declare(connection, app.topology())
    for name in ODD_PROPERTIES:
        publish_raw(rabbitmq_url, b"billing.dead", odd_properties(name, name.encode()), b"{}", exchange=b"")
    wait_until(lambda: ready(rabbitmq_url, "billing.dead") == len(ODD_PROPERTIES), "letters")

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


# --- an operator's way ------------------------------------------------------------------------


def test_a_failed_event_is_found_understood_and_retried_for_the_handler_that_failed(
    folder: Path, url: str, dead: Dead
) -> None:
    with working("billing:app", folder=folder, url=url) as first:
        done = lightbus("publish", "billing:app", "invoice.paid", "number=2", folder=folder, url=url)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: ready(url, "billing.dead") == 1, "a dead letter")
        first.end(signal.SIGTERM)
    assert "close 2 of billing" in first.output

    done = dead("list")
    head, line, *_ = done.stdout.splitlines()
    assert head.split() == ["ID", "AGE", "EVENT", "HANDLER", "ATTEMPT", "ERROR"]
    assert line.split()[2:6] == ["invoice.paid", "charge", "2", "LookupError:"]
    assert "\x1b" not in done.stdout  # what a stranger wrote does not steer the terminal
    (letter,) = listed(dead)
    assert "lightbus dead show billing:app ID" in done.stdout

    shown = dead("show", letter["id"][:20]).stdout
    for wanted in ("invoice.paid  from billing", "charge", "LookupError: no invoice 2", '"number": 2', "in charge"):
        assert wanted in shown
    assert "\x1b" not in shown

    (folder / "mended").touch()
    done = dead("retry", "--id", letter["id"])
    assert (done.stdout, done.returncode) == ("1 retried.\n", 0)
    assert listed(dead) == []
    # It may be handled before the worker logs that it is ready.
    with Program("worker", "billing:app", folder=folder, url=url) as second:
        second.wait_for("charge 2 attempt 1")  # as for the first time
        wait_until(lambda: ready(url, "billing.main") == 0, "an empty queue")
        assert second.end(signal.SIGTERM) == 0
    assert "close 2" not in second.output


def test_letters_are_counted_by_handler_and_error(url: str, dead: Dead) -> None:
    put_letters(url, 3)
    put_letters(url, 1, handler="close", queue="billing.closed")
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


def test_looking_changes_nothing(url: str, dead: Dead) -> None:
    ids = put_letters(url, 5)
    for _ in range(2):
        assert sorted(letter["id"] for letter in listed(dead)) == sorted(ids)
    assert dead("show", ids[3]).returncode == 0
    assert dead("list", "--limit", "2").stdout.count("LookupError") == 2
    assert "3 more were not read" in dead("list", "--limit", "2").stdout
    assert "5 of 5 would be retried" in dead("retry", "--all", "--dry-run").stdout
    assert "5 of 5 would be purged" in dead("purge", "--all", "--dry-run").stdout
    wait_until(lambda: ready(url, "billing.dead") == 5, "all letters given back")


# --- many of them: more than the broker sends ahead at once ---------------------------------------


MANY = FIRST_WINDOW + 2 * FIRST_WINDOW + 4 * FIRST_WINDOW + 10
"""Letters of four windows, the last of which is not full."""


def ids_in(output: str) -> list[str]:
    return [letter["id"] for letter in json.loads(output)]


def test_letters_keep_their_order_and_each_look_counts_as_one_return(url: str, dead: Dead) -> None:
    ids = put_letters(url, MANY)
    assert ids_in(dead("list", "--json", "--limit", "70").stdout) == ids[:70]
    assert ids_in(dead("list", "--json", "--limit", "0").stdout) == ids
    assert ids_in(dead("show", "--all", "--json").stdout) == ids
    assert ready(url, "billing.dead") == MANY, "they are back when the command ends"
    left = take_all(app_of(url), "billing.dead")
    assert [letter.properties["message_id"] for letter in left] == ids
    returns = [letter.properties["headers"]["x-delivery-count"] for letter in left]
    assert max(returns) <= 3, "far from the 1,000,000 that the queue allows"


def test_all_but_those_that_are_meant_are_given_back_in_their_order(url: str, dead: Dead) -> None:
    ids = put_letters(url, MANY)
    some = [ids[0], *ids[40:60], ids[-1]]
    done = dead("purge", "--yes", *(word for id_ in some for word in ("--id", id_)))
    assert (done.stdout, done.returncode) == (f"{len(some)} purged.\n", 0)
    left = [id_ for id_ in ids if id_ not in some]
    assert ids_in(dead("list", "--json", "--limit", "0").stdout) == left
    assert dead("retry", "--limit", "120").stdout == "120 retried.\n"
    assert ids_in(dead("list", "--json", "--limit", "0").stdout) == left[120:]
    assert dead("purge", "--all", "--yes").stdout == f"{len(left) - 120} purged.\n"
    assert ready(url, "billing.dead") == 0


def test_two_looks_at_once_share_the_letters_and_both_end(url: str) -> None:
    ids = put_letters(url, FIRST_WINDOW + 10)
    with opened(app_of(url)) as one, opened(app_of(url)) as other:
        assert (one.count, other.count) == (len(ids), len(ids))
        first = [letter.id for letter in itertools.islice(one.letters(), 5)]
        second = [letter.id for letter in other.letters()]
        first += [letter.id for letter in one.letters()]
    assert second
    assert sorted(first + second) == sorted(ids)
    with opened(app_of(url)) as again:
        assert again.count == len(ids)


def test_a_consumer_that_is_sent_nothing_is_no_end_of_the_letters(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RabbitMQ may leave a consumer deaf."""
    ids = put_letters(url, 5)
    monkeypatch.setattr("lightbus.dead_letters.queue.PATIENCE", 0.2)
    with opened(app_of(url)) as queue:
        queue.channel.consume = lambda *_, **__: ""  # type: ignore[method-assign]
        assert [letter.id for letter in queue.letters()] == ids
    with opened(app_of(url)) as queue:
        assert queue.count == 5


def test_a_slow_retry_keeps_few_letters_at_a_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightbus.dead_letters.actions.SECONDS_AHEAD", 1.0)
    put_letters(url, 20)
    outcome = Outcome()
    app = app_of(url)
    left: list[int] = []
    with app, opened(app, on_read=lambda _: left.append(ready(url, "billing.dead"))) as queue:
        retry(queue, Filter(), outcome, limit=3, rate=3)
        assert min(left) >= 12, "RabbitMQ wants each back within 30 minutes"
    assert outcome.done == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_look_may_be_interrupted_at_any_moment(folder: Path, url: str, number: signal.Signals) -> None:
    ids = put_letters(url, MANY)
    with subprocess.Popen(
        [*LIGHTBUS, "dead", "show", "billing:app", "--all"],
        cwd=folder,
        env=environment({"LIGHTBUS_URL": url}),
        stdout=subprocess.PIPE,  # which is not read, and so fills: the command stands still in the midst of them
        stderr=subprocess.PIPE,
    ) as program:
        wait_until(lambda: ready(url, "billing.dead") < MANY, "some of them taken")
        program.send_signal(number)
        program.communicate(timeout=LIMIT)
    wait_until(lambda: ready(url, "billing.dead") == MANY, "all letters given back")
    with opened(app_of(url)) as queue:
        seen = [letter.id for letter in queue.letters()]
    assert (seen == ids) if number == signal.SIGINT else (sorted(seen) == sorted(ids))


def test_filters_say_which_letters_are_meant(url: str, dead: Dead) -> None:
    old = put_letters(url, 1, minutes_ago=200)
    new = put_letters(url, 1)
    other = put_letters(url, 1, handler="close", queue="billing.closed")
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
        assert sorted(letter["id"] for letter in listed(dead, *options)) == sorted(wanted), options


@pytest.mark.parametrize("command", [["list"], ["show", ""], ["retry"], ["purge", "--yes"]])
def test_an_empty_id_is_refused_since_it_would_mean_every_letter(url: str, dead: Dead, command: list[str]) -> None:
    put_letters(url, 2)
    options = [] if command[0] == "show" else ["--id", ""]
    done = dead(*command, *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert ready(url, "billing.dead") == 2


def test_an_event_pattern_that_is_none_is_refused(url: str, dead: Dead) -> None:
    put_letters(url, 1)
    done = dead("list", "--event", "invoice..paid")
    assert done.returncode == 2
    assert "--event: 'invoice..paid' is not a topic pattern" in done.stderr


def test_retry_goes_to_the_queue_and_handler_it_came_from_and_keeps_source_and_id(url: str, dead: Dead) -> None:
    (id_,) = put_letters(url, 1, handler="close", queue="billing.closed")
    assert dead("retry", "--id", id_).returncode == 0
    app = app_of(url)
    assert take_all(app, "billing.main") == []
    (copy,) = take_all(app, "billing.closed")
    message = codec.read_message("billing", copy)
    assert (message.id, message.event, message.source, message.attempt) == (id_, "invoice.paid", "shop", 1)
    headers = copy.properties["headers"]
    assert headers["lightbus-handler"] == "close"
    assert not [name for name in headers if name.startswith(("lightbus-error", "x-death"))]


def test_what_is_retried_must_be_said(url: str, dead: Dead) -> None:
    put_letters(url, 1)
    for command in ("retry", "purge"):
        done = dead(command)
        assert done.returncode == 2
        assert "Select dead letters: use a filter (see --help), --limit N, or --all." in done.stderr


def test_a_letter_whose_queue_is_gone_stays_and_is_named_while_others_are_retried(url: str, dead: Dead) -> None:
    put_letters(url, 1, queue="billing.gone")
    put_letters(url, 1)
    done = dead("retry", "--all")
    assert done.returncode == 1
    assert done.stdout == "1 retried.\n"
    assert "1 skipped: their queue billing.gone does not exist. Start a worker" in done.stderr
    (left,) = listed(dead)
    assert left["queue"] == "billing.gone"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_retry_may_be_interrupted_at_any_moment(folder: Path, url: str, dead: Dead, number: signal.Signals) -> None:
    ids = put_letters(url, 100)  # enough for 20 s
    with Program("dead", "retry", "billing:app", "--all", "--rate", "5", folder=folder, url=url) as program:
        wait_until(lambda: ready(url, "billing.main") >= 5, "some of them retried")
        code = program.end(number)
    if number == signal.SIGINT:
        assert code == 130
        assert "Interrupted: " in program.output
    wait_until(lambda: ready(url, "billing.main") + ready(url, "billing.dead") >= len(ids), "all of them somewhere")
    app = app_of(url)
    retried = [copy.properties["message_id"] for copy in take_all(app, "billing.main")]
    left = [letter["id"] for letter in listed(dead)]
    assert set(retried) | set(left) == set(ids)
    assert left
    assert len(retried) + len(left) - len(ids) <= 5  # twice: what was published, and not acked yet


def test_a_rate_is_kept(url: str, dead: Dead) -> None:
    put_letters(url, 6)
    began = time.monotonic()
    assert dead("retry", "--all", "--rate", "4").returncode == 0
    assert time.monotonic() - began > 6 / 4
    assert ready(url, "billing.main") == 6


def test_purge_shows_what_and_asks(url: str, dead: Dead) -> None:
    put_letters(url, 2)
    put_letters(url, 1, handler="close", queue="billing.closed")
    refused = dead("purge", "--handler", "charge", given="n\n")
    assert "Purge 2 of them permanently?" in refused.stderr
    assert refused.returncode == 1
    assert len(listed(dead)) == 3
    assert dead("purge", "--handler", "charge", given="y\n").returncode == 0
    assert [letter["handler"] for letter in listed(dead)] == ["close"]
    done = dead("purge", "--all", "--yes", "--json")
    assert json.loads(done.stdout)["purged"] == 1
    assert ready(url, "billing.dead") == 0


def test_a_purge_that_nobody_answers_names_the_option_that_does_not_ask(url: str, dead: Dead) -> None:
    put_letters(url, 1)
    done = dead("purge", "--all", given="")
    assert done.returncode == 1
    assert done.stderr.endswith("\nError: stdin ended without an answer. To skip the question: --yes\n")
    assert ready(url, "billing.dead") == 1


def test_what_was_shown_is_purged_after_the_question_and_nothing_else(folder: Path, url: str, dead: Dead) -> None:
    shown = put_letters(url, 3)
    answer, write = os.pipe()
    command = ("dead", "purge", "billing:app", "--newer", "1h")
    with os.fdopen(answer, "rb") as stdin, Program(*command, folder=folder, url=url, stdin=stdin) as program:
        program.wait_for("3 dead letters. Show one")
        assert dead("purge", "--id", shown[1], "--yes").returncode == 0
        new = put_letters(url, 2)
        os.write(write, b"y\n")
        assert program.end() == 0
    os.close(write)
    assert re.search(r"^(Purge 3 of them permanently\? .*: )?2 purged\.$", program.output, re.MULTILINE)
    assert "1 of those shown is no longer there: retried, purged or being read by another command" in program.output
    assert [letter["id"] for letter in listed(dead)] == new


def test_no_queue_no_letters_and_no_broker_are_told_apart(folder: Path, url: str, dead: Dead) -> None:
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


def test_an_empty_list_says_how_many_wait_for_their_next_attempt(folder: Path, url: str, dead: Dead) -> None:
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


# --- what it was ------------------------------------------------------------------------------


def test_a_payload_is_shown_as_it_came(url: str, dead: Dead) -> None:
    body = '{"amount": 9.50, "big": 123456789012345678901234567890, "who": "Zoë\u2028"}'
    put_letters(url, 1, body=body.encode())
    shown = dead("show", "--all").stdout
    assert '    "amount": 9.50,\n    "big": 123456789012345678901234567890,\n    "who": "Zoë' in shown
    text = dead("show", "--all", "--json").stdout
    assert '"amount":9.50,"big":123456789012345678901234567890,' in text
    assert text.isascii()
    (letter,) = json.loads(text)
    assert letter["payload"] == json.loads(body)


def test_a_body_that_is_no_json_is_shown_too(url: str, dead: Dead) -> None:
    put_letters(url, 1, body=b"\x1b[31m")
    assert "body (5 bytes, not JSON)\n  b'\\x1b[31m'\n" in dead("show", "--all").stdout
    (letter,) = json.loads(dead("show", "--all", "--json").stdout)
    assert base64.b64decode(letter["body_base64"]) == b"\x1b[31m"


# --- the next step ----------------------------------------------------------------------------


def next_step(done: CompletedProcess[str]) -> str:
    return done.stdout.splitlines()[-1]


def test_a_letter_that_is_shown_says_how_to_retry_it_and_no_other(url: str, dead: Dead) -> None:
    (id_,) = put_letters(url, 1)
    step = f"lightbus dead retry billing:app --id {id_} --handler charge"
    assert next_step(dead("show", id_)) == f"After fixing the cause, run: {step}"


def test_a_letter_whose_handler_is_gone_says_so_and_so_does_its_retry(url: str, dead: Dead) -> None:
    (id_,) = put_letters(url, 1, handler="bill")
    step = f"lightbus dead purge billing:app --id {id_} --handler bill"
    assert next_step(dead("show", id_)) == f"Next: restore the handler, or run: {step}"
    warning = "for the handler bill, which does not exist in this code"
    assert f"1 of them would be {warning}" in dead("retry", "--all", "--dry-run").stdout
    done = dead("retry", "--all")
    assert (done.returncode, done.stdout) == (0, "1 retried.\n")
    assert f"1 of them are {warning}" in done.stderr


@pytest.mark.parametrize("options", [[], ["--stats"]])
def test_where_nothing_fits_it_says_how_to_see_what_there_is(url: str, dead: Dead, options: list[str]) -> None:
    put_letters(url, 2)
    done = dead("list", "--handler", "chrge", *options)
    assert done.stdout == "None of the 2 dead letters match. To see all: lightbus dead list billing:app --stats\n"


# --- pipes and terminals ----------------------------------------------------------------------


@pytest.mark.parametrize("command", [["list"], ["list", "--json", "--limit", "0"], ["show", "--all"]], ids=" ".join)
def test_it_ends_quietly_when_nobody_reads_it_any_more(folder: Path, url: str, command: list[str]) -> None:
    """As with `| head -1`: that is no lost connection."""
    put_letters(url, 60)
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
    wait_until(lambda: ready(url, "billing.dead") == 60, "all letters given back")


@pytest.mark.parametrize("command", [["list"], ["show", "--all", "--json"]])
def test_a_full_disk_is_no_lost_connection(folder: Path, url: str, command: list[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs Linux' /dev/full")
    put_letters(url, 2)
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


def test_long_errors_are_cut_where_the_terminal_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["ID  ERROR", "1   " + "x" * 96]
    monkeypatch.setenv("COLUMNS", "50")
    assert tables.fitted(lines, 20) == ["ID  ERROR", "1   " + "x" * 45 + "…"]
    assert tables.fitted(lines, 70) == ["ID  ERROR", "1   " + "x" * 65 + "…"]
    monkeypatch.setenv("COLUMNS", "100")
    assert tables.fitted(lines, 20) == lines


@pytest.mark.rabbitmq
def test_a_retry_whose_broker_goes_away_says_how_many_are_done(folder: Path, rabbitmq: nodes.Node) -> None:
    vhost = "dead-away"
    rabbitmq.add_vhosts([vhost])
    url = rabbitmq.vhost_url(vhost)
    put_letters(url, 200)  # enough for minutes: to start rabbitmqctl may take many seconds
    with Program("dead", "retry", "billing:app", "--all", "--rate", "2", folder=folder, url=url) as program:
        wait_until(lambda: ready(url, "billing.main") >= 2, "some of them retried")
        rabbitmq.ctl("close_all_connections", "--vhost", vhost, "gone")
        assert program.end() == 1
    assert re.search(r"^[1-9]\d* retried\.$", program.output, re.MULTILINE)
    assert "What was not confirmed is in billing.dead as before." in program.output


def test_secrets_of_the_url_are_not_shown(folder: Path) -> None:
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
    """Publish as a stranger may, then let the broker dead-letter it."""
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
    wait_until(lambda: ready(url, "billing.dead") == 1, "the letter")


FORGED = {"lightbus-source": "bank", "lightbus-handler": "close", "lightbus-attempt": 9, "lightbus-error-type": "Lie"}


def test_headers_of_a_stranger_do_not_say_what_a_letter_is(url: str, dead: Dead) -> None:
    reject_first(url, "billing.main", "evil", {"message_id": "m-1", "headers": {**FORGED, "tenant": "acme"}})
    (letter,) = listed(dead)
    assert (letter["source"], letter["handler"], letter["attempt"]) == ("evil", None, 1)
    assert (letter["error_type"], letter["by_broker"], letter["queue"]) == ("rejected", True, "billing.main")
    assert dead("retry", "--all", "--trust-origin").returncode == 0
    (copy,) = take_all(app_of(url), "billing.main")
    message = codec.read_message("billing", copy)
    assert (message.id, message.source, message.event, message.attempt) == ("m-1", "evil", "invoice.paid", 1)
    assert message.headers == {"tenant": "acme"}
    assert "lightbus-handler" not in copy.properties["headers"]


@pytest.mark.rabbitmq
def test_a_source_that_only_its_publisher_claims_is_not_retried_unasked(folder: Path, rabbitmq_url: str) -> None:
    """RabbitMQ 3 merges its record of a death into an x-death header that a stranger has written."""
    routing = {"exchange": "bank", "routing-keys": ["money.sent"]}
    death = {"queue": "billing.main", "reason": "rejected", "count": 0, **routing}
    reject_first(rabbitmq_url, "billing.main", "evil", {"message_id": "m-1", "headers": {"x-death": [death]}})
    with connected(rabbitmq_url) as connection:
        version = connection.server_properties["version"]
    done = lightbus("dead", "list", "billing:app", "--json", folder=folder, url=rabbitmq_url)
    (letter,) = json.loads(done.stdout)
    if version.startswith("3."):
        assert (letter["source"], letter["source_proven"]) == ("bank", False)  # believed, and said not to be proven
        done = lightbus("dead", "retry", "billing:app", "--all", folder=folder, url=rabbitmq_url)
        assert done.returncode == 1
        assert "1 skipped: the broker dead-lettered them" in done.stderr
        assert ready(rabbitmq_url, "billing.main") == 0
        done = lightbus("dead", "show", "billing:app", "m-1", folder=folder, url=rabbitmq_url)
        assert "from bank  (not verified: " in done.stdout
    else:
        assert letter["source"] == "evil"


@pytest.mark.rabbitmq
def test_an_event_that_killed_its_workers_says_so(rabbitmq_url: str, folder: Path) -> None:
    app = app_of(rabbitmq_url)
    with connected(rabbitmq_url) as connection:
        declare(connection, app.topology())
        channel = connection.channel()
        publish_plainly(channel, "billing", "invoice.paid", b'{"number": 7}')
        wait_until(lambda: _requeued_until_dead(channel), "the delivery limit")
    done = lightbus("dead", "list", "billing:app", folder=folder, url=rabbitmq_url)
    assert "delivery_limit: its worker crashed (or lost its connection) each time" in done.stdout
    assert "~" in done.stdout  # it has no id: its content names it


def _requeued_until_dead(channel: Any) -> bool:
    delivery = channel.get("billing.main")
    if delivery is None:
        return int(channel.queue_declare("billing.dead", passive=True)[1]) == 1
    channel.basic_reject(delivery.delivery_tag, requeue=True)
    return False


# --- pure -------------------------------------------------------------------------------------


def letter_of(properties: Any, exchange: str = "billing.internal") -> Any:
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
def test_any_letter_can_be_read_and_published_again(properties: Any) -> None:
    letter = letter_of(properties)
    assert letter.id
    assert Filter(older=5.0).matches(letter, 0.0) is False
    assert retry_publication(letter).exchange == "billing.internal"


def test_a_letter_that_cannot_be_read_is_no_proof_of_anything() -> None:
    assert not letter_of(broken).proven
    assert not letter_of({"headers": {"x-death": 5}}).proven
    assert letter_of({"headers": {"lightbus-error-type": "KeyError"}}).proven


def test_a_letter_is_the_same_at_each_look_and_another_where_its_event_died_again() -> None:
    headers = {"lightbus-error-type": "KeyError", "lightbus-error-time": "2026-05-04T08:20:55+00:00"}
    first = letter_of({"message_id": "m-1", "headers": headers})
    again = letter_of({"message_id": "m-1", "headers": {**headers, "x-delivery-count": 2}})
    other = letter_of({"message_id": "m-1", "headers": {**headers, "lightbus-error-time": "2026-05-04T08:20:56+00:00"}})
    assert first.digest == again.digest != other.digest
