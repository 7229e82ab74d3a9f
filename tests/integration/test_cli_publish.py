"""`lightbus publish` and `lightbus unbind`, as real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.patience import LIMIT
from tests.processes import LIGHTBUS, Program, environment, lightbus, working
from tests.rabbitmq import free_port

BUS = """\
from datetime import datetime
from decimal import Decimal
import attrs
from lightbus import Lightbus, Message

app = Lightbus("billing", publish_timeout=TIMEOUT)

@attrs.frozen
class Address:
    city: str
    zip: int = 0

@app.event
class InvoicePaid:
    number: str
    amount: Decimal = Decimal(1)
    lines: tuple[int, ...] = ()
    paid_at: datetime | None = None
    address: Address | None = None
    note: str | None = None

@app.on("invoice.*")
async def handle(event: dict, message: Message):
    print("GOT", message.body.decode(), dict(message.headers), flush=True)
    print("ENVELOPE", message.id, message.correlation_id, message.time.isoformat(), flush=True)

@app.on("user.gone", queue="slow", source="auth")
async def close_account(event: dict): ...
"""


FILES = {"bus.py": BUS.replace("TIMEOUT", "10")}


def publish(folder: Path, url: str, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    return lightbus("publish", "bus:app", *arguments, folder=folder, url=url, given=given)


def test_the_receipt_of_an_event_shows_whether_it_was_routed(folder: Path, url: str) -> None:
    unrouted = publish(folder, url, "invoice.paid", "number=1")
    assert unrouted.returncode == 0
    assert "not routed (no queue is bound for it)" in unrouted.stdout
    with working("bus:app", folder=folder, url=url) as running:
        done = publish(folder, url, "invoice.paid", '{"number": "2", "amount": 2.5}', "--json", "--header", "a=b")
        receipt = json.loads(done.stdout)
        assert receipt == {"id": receipt["id"], "event": "invoice.paid", "routed": True}
        running.wait_for(r"""GOT \{.*"amount":"2.5",.*\} \{'a': 'b'\}""")
        typed = ["number=007", "amount=9.50", "lines=[1, 2]", "paid_at=2026-01-02T03:04:05Z", "note=[x]"]
        assert publish(folder, url, "invoice.paid", *typed, "address.city=Oslo", "address.zip=150").returncode == 0
        got = json.loads(running.wait_for(r"GOT (\{.*\}) \{\}")[1])
    assert got == {
        "number": "007",
        "amount": "9.50",
        "lines": [1, 2],
        "paid_at": "2026-01-02T03:04:05Z",
        "address": {"city": "Oslo", "zip": 150},
        "note": "[x]",
    }


def test_the_broker_holds_a_delayed_event(folder: Path, sqlite_url: str) -> None:
    with working("bus:app", folder=folder, url=sqlite_url) as running:
        done = publish(folder, sqlite_url, "invoice.paid", "number=1", "--delay", "1")
        assert (done.returncode, done.stderr) == (0, "")
        assert "the broker holds it for 1 s" in done.stdout
        running.wait_for("GOT")


def test_an_id_a_correlation_id_and_a_time_are_published(folder: Path, url: str) -> None:
    given = ["--id", "import 7", "--correlation-id", "request-1", "--time", "2026-05-04T14:30:00+02:00"]
    with working("bus:app", folder=folder, url=url) as running:
        done = publish(folder, url, "invoice.paid", "number=1", "--json", *given)
        assert json.loads(done.stdout)["id"] == "import 7"
        running.wait_for(r"ENVELOPE import 7 request-1 2026-05-04T12:30:00\+00:00")
        lines = b'{"number": "2"}\n{"number": "3"}\n'
        done = publish(folder, url, "invoice.paid", "--jsonl", "-", "--correlation-id", "file-1", given=lines)
        assert done.returncode == 0, done.stderr
        for _ in range(2):
            running.wait_for(r"ENVELOPE \S+ file-1 ")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["invoice.payd", "number=1"],
            2,
            "event 'invoice.payd' is not declared on app 'billing'. Did you mean 'invoice.paid'",
        ),
        (["invoice.paid", "number=1", "amount=much"], 1, "Invalid decimal string - at `$.amount`"),
        (["invoice.paid", "number=1", "amout=2"], 1, "has no field 'amout'. Did you mean 'amount'?"),
        (["invoice.paid", '{"number": "1", "amout": 2}'], 1, "has no field 'amout'. Did you mean 'amount'?"),
        (["invoice.paid"], 1, "missing required field `number`. Its fields: number: str, amount: Decimal, "),
        (["invoice.paid", '{"number"'], 1, "truncated"),
        (["invoice.paid", "[1]"], 1, "Expected `object`, got `array`"),
        (["invoice.paid", "number"], 2, "'number' is not FIELD=VALUE"),
        (["invoice.paid", "number=1", "number=2"], 2, "'number' is given twice"),
        (["invoice.paid", "number=1", "--header", "x"], 2, "--header 'x' is not KEY=VALUE"),
        (["invoice.paid", "number=1", "--header", "x-a=1"], 1, "belong to Lightbus and the broker"),
        (["invoice.paid", "number=1", "--delay", "-1"], 2, "delay=-1.0: use seconds"),
        (["invoice.paid", "number=1", "--id", ""], 2, "id='': it is empty. Pass a string of 1 to 255 bytes"),
        (["invoice.paid", "number=1", "--correlation-id", "x" * 256], 2, "it has 256 bytes, the limit is 255"),
        (["invoice.paid", "number=1", "--time", "noon"], 2, "'noon' is not a time, as in 2026-05-04T12:00:00Z"),
        (["invoice.paid", "number=1", "--time", "2026-05-04"], 2, "has no UTC offset: write 2026-05-04T00:00:00Z"),
        (["invoice.paid", "number=1", "--time", "1969-01-01T00:00:00Z"], 2, "use a time from 1970-01-01"),
        (["invoice.paid", "--jsonl", "f", "--id", "a"], 2, "--id works for single events, not with --jsonl"),
        (["invoice.paid", "--jsonl", "f", "--time", "noon"], 2, "--time works for single events, not with --jsonl"),
        (["invoice.paid", "number=1", "--jsonl", "f"], 2, "not both"),
        (["invoice.paid", "--jsonl", "nowhere.jsonl"], 2, "nowhere.jsonl: No such file or directory"),
    ],
)
def test_an_invalid_event_is_explained(
    folder: Path, sqlite_url: str, arguments: list[str], status: int, message: str
) -> None:
    done = publish(folder, sqlite_url, *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_an_unreachable_broker_is_one_message_without_the_password(folder: Path) -> None:
    (folder / "bus.py").write_text(BUS.replace("TIMEOUT", "5"))
    done = publish(folder, "amqp://me:geheim@127.0.0.1:1/", "invoice.paid", "number=1")
    assert done.returncode == 1
    *log, message = done.stderr.splitlines()
    assert "Connection refused. Is the broker running there?" in message
    assert len(log) <= 1, log  # a warning after a second
    assert "geheim" not in done.stderr


LINES = b"""\
{"number": "1"}

{"number": "2", "amount": "3.5", "colour": "red"}
{"number": 3}
{"number": "4"
\xff\xfe
{"number": "5", "amount": "much"}
[]
{"number": "last"}"""


@pytest.mark.parametrize("from_stdin", [True, False])
def test_valid_lines_of_a_file_are_published_and_invalid_ones_are_reported(
    folder: Path, url: str, from_stdin: bool
) -> None:
    (folder / "f.jsonl").write_bytes(LINES)
    with working("bus:app", folder=folder, url=url) as running:
        name = "-" if from_stdin else "f.jsonl"
        done = publish(folder, url, "invoice.paid", "--jsonl", name, given=LINES if from_stdin else b"")
        assert done.returncode == 1
        complaints = done.stderr.splitlines()
        assert [line.split(":")[0] for line in complaints[:-1]] == ["line 4", "line 5", "line 6", "line 7", "line 8"]
        assert complaints[0] == "line 4: Expected `str`, got `int` - at `$.number`"
        assert complaints[-1] == "Ignored, because 'invoice.paid' has no such field: 'colour'."
        assert done.stdout.startswith("Published 3 of 8 lines in ")
        assert "5 not published, see above" in done.stdout
        for number in ("1", "2", "last"):
            running.wait_for(f'GOT {{.*"number":"{number}"')


def test_a_large_file_is_published_with_a_json_summary(folder: Path, url: str) -> None:
    (folder / "f.jsonl").write_text("".join(f'{{"number": "{n}"}}\n' for n in range(5000)))
    done = publish(folder, url, "invoice.paid", "--jsonl", "f.jsonl", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    assert (summary["lines"], summary["published"], summary["bad"], summary["unrouted"]) == (5000, 5000, 0, 5000)


def test_a_line_over_the_size_limit_is_reported_and_the_next_one_is_published(folder: Path, sqlite_url: str) -> None:
    lines = b'{"number": "' + b"x" * (26 * 1024 * 1024) + b'"}\n{"number": "2"}\n'
    done = publish(folder, sqlite_url, "invoice.paid", "--jsonl", "-", given=lines)
    assert done.returncode == 1
    assert done.stderr == "line 1: longer than 16,777,216 bytes\n"
    assert done.stdout.startswith("Published 1 of 2 lines")


def test_lines_of_a_pipe_are_published_as_they_arrive(folder: Path, sqlite_url: str) -> None:
    read, write = os.pipe()
    with (
        working("bus:app", folder=folder, url=sqlite_url) as running,
        os.fdopen(read, "rb") as theirs,
        os.fdopen(write, "wb", buffering=0) as ours,
    ):
        one = Program("publish", "bus:app", "invoice.paid", "--jsonl", "-", folder=folder, url=sqlite_url, stdin=theirs)
        with one:
            ours.write(b'{"number": "now"}\n')
            running.wait_for("GOT")
            ours.close()
            assert one.end() == 0


@pytest.mark.parametrize("name", ["-", "pipe"])
def test_ctrl_c_interrupts_a_publish_that_waits_for_a_pipe(folder: Path, sqlite_url: str, name: str) -> None:
    command = ["publish", "bus:app", "invoice.paid", "--jsonl", name]
    os.mkfifo(folder / "pipe")
    with (
        working("bus:app", folder=folder, url=sqlite_url) as running,
        open(os.open(folder / "pipe", os.O_RDWR), "r+b", buffering=0) as pipe,
        Program(*command, folder=folder, url=sqlite_url, stdin=pipe) as one,
    ):
        pipe.write(b'{"number": "now"}\n')
        running.wait_for("GOT")
        assert one.end(signal.SIGINT) == 130
    assert one.output.startswith("Stopped after line 1. Interrupted.")
    assert "Fatal" not in one.output


def test_a_read_error_within_a_file_is_reported(folder: Path, sqlite_url: str) -> None:
    unreadable = "/proc/self/mem"  # it can be opened, but reading fails
    if not os.path.exists(unreadable):
        pytest.skip("needs Linux' /proc")
    done = publish(folder, sqlite_url, "invoice.paid", "--jsonl", unreadable)
    assert done.returncode == 1
    assert done.stderr == "Stopped after line 0. The rest cannot be read: Input/output error.\n"


def test_a_closed_stdin_is_reported(folder: Path, sqlite_url: str) -> None:
    program = [*LIGHTBUS, "publish", "bus:app", "invoice.paid", "--jsonl", "-"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *program],
        cwd=folder,
        env=environment({"LIGHTBUS_URL": sqlite_url}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.endswith("Error: --jsonl -: stdin is closed.\n")


def test_publishing_a_file_stops_soon_if_the_broker_is_down(folder: Path) -> None:
    (folder / "bus.py").write_text(BUS.replace("TIMEOUT", "5"))
    lines = b'{"number": "1"}\n' * 5000
    done = publish(folder, "amqp://me:geheim@127.0.0.1:1/", "invoice.paid", "--jsonl", "-", given=lines)
    assert done.returncode == 1
    *log, message = done.stderr.splitlines()
    assert "Stopped after line " in message
    assert "Connection refused" in message
    assert len(log) <= 1, log
    assert "geheim" not in done.stderr


# --- unbind -----------------------------------------------------------------------------------


def test_an_unused_binding_is_removed(folder: Path, url: str) -> None:
    with working("bus:app", folder=folder, url=url):
        pass  # it has declared the queue and the bindings
    (folder / "bus.py").write_text(BUS.replace("TIMEOUT", "10").replace('"invoice.*"', '"order.*"'))
    done = publish(folder, url, "invoice.paid", "number=1")
    assert "confirmed, routed" in done.stdout
    done = lightbus("unbind", "bus:app", "invoice.*", folder=folder, url=url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "Removed the binding lightbus -- invoice.* --> billing.main, if there was one (the broker does not "
        "report it).\n"
    )
    assert "not routed" in publish(folder, url, "invoice.paid", "number=1").stdout


def test_a_needed_binding_is_removed_only_with_force(folder: Path, url: str) -> None:
    with working("bus:app", folder=folder, url=url):
        pass
    refused = lightbus("unbind", "bus:app", "invoice.*", folder=folder, url=url)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: handle of app 'billing' needs this binding for 'invoice.*': ")
    assert "confirmed, routed" in publish(folder, url, "invoice.paid", "number=1").stdout
    other = ["unbind", "bus:app", "user.gone", "--queue", "slow"]
    assert lightbus(*other, "--source", "auth", folder=folder, url=url).returncode == 1
    assert lightbus(*other, folder=folder, url=url).returncode == 0  # no handler needs the binding to the bus
    forced = lightbus("unbind", "bus:app", "invoice.*", "--force", folder=folder, url=url)
    assert forced.returncode == 0
    assert "handle receives nothing through it until a worker starts" in forced.stdout
    assert "not routed" in publish(folder, url, "invoice.paid", "number=1").stdout


def test_unbind_reports_a_missing_queue_or_exchange(folder: Path, url: str) -> None:
    done = lightbus("unbind", "bus:app", "a.b", folder=folder, url=url)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: This binding does not exist.")
    assert "billing" in done.stderr
    bad = lightbus("unbind", "bus:app", "a b", folder=folder, url=url)
    assert bad.returncode == 2
    assert "is not a topic pattern" in bad.stderr


def test_ctrl_c_interrupts_a_publish_that_waits_for_the_broker(folder: Path) -> None:
    (folder / "bus.py").write_text(BUS.replace("TIMEOUT", "1000"))
    unreachable = f"amqp://127.0.0.1:{free_port()}"
    with Program("publish", "bus:app", "invoice.paid", "number=7", folder=folder, url=unreachable) as running:
        running.wait_for("Trying again")
        assert running.end(signal.SIGINT) in (1, 130)  # before publish_timeout
    assert "Traceback" not in running.output


MODELS = """\
from datetime import date
from decimal import Decimal
from uuid import UUID
from pydantic import BaseModel, ConfigDict, Field
from lightbus import Lightbus

app = Lightbus("billing")

class Address(BaseModel):
    city: str
    zip: int = 0

@app.event
class InvoicePaid(BaseModel):
    model_config = ConfigDict(validate_by_name=True)

    number: int = Field(alias="invoiceNumber")
    amount: Decimal = Decimal(1)
    lines: list[str] = []
    address: Address | None = None

@app.event
class InvoiceDue(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    number: int
    late: bool
    on: date
    key: UUID

@app.on("invoice.*")
async def handle(event: dict): print("GOT", event, flush=True)
"""


def test_pydantic_events_are_published_from_fields_json_and_files(tmp_path: Path, url: str) -> None:
    (tmp_path / "bus.py").write_text(MODELS)
    fields = ("invoiceNumber=5", "amount=2.50", "address.city=Berlin", "address.zip=1", 'lines=["a"]')
    with working("bus:app", folder=tmp_path, url=url) as running:
        for event, *given in (
            ("invoice.paid", *fields),
            ("invoice.paid", '{"number": 6}'),
            ("invoice.due", "number=7", "late=true", "on=2026-01-01", f"key={uuid.UUID(int=1)}"),
        ):
            done = publish(tmp_path, url, event, *given)
            assert (done.returncode, done.stderr) == (0, "")
        got = "{'invoiceNumber': 5, 'amount': '2.50', 'lines': ['a'], 'address': {'city': 'Berlin', 'zip': 1}}"
        running.wait_for(rf"GOT {re.escape(got)}")
        running.wait_for("'invoiceNumber': 6")
        running.wait_for("'late': True")
    wrong = publish(tmp_path, url, "invoice.paid", "number=x", "amount=y")
    assert wrong.returncode == 1
    assert "2 errors (number, amount):\n  number: Input should be a valid integer" in wrong.stderr
    assert "\nIts fields: invoiceNumber: int, amount: Decimal, lines: list[str], address: Addr" in wrong.stderr
    assert "Did you mean 'amount'?" in publish(tmp_path, url, "invoice.paid", "number=1", "amuont=2").stderr
    lines = publish(tmp_path, url, "invoice.paid", "--jsonl", "-", given=b'{"number": 1}\n{"number": "x"}\n')
    assert lines.returncode == 1
    assert "number: Input should be a valid integer" in lines.stderr
