"""`lightbus events` and `lightbus schema`: what an app declares, as text and as JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lightbus import Lightbus
from lightbus.catalog import schemas
from lightbus.wire import codec
from tests.processes import lightbus

BUS = '''\
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Literal

import attrs
import msgspec

from lightbus import Lightbus, Retry

app = Lightbus("billing")
silent = Lightbus("silent")


class Kind(Enum):
    CARD = "card"
    CASH = "cash"


@attrs.frozen
class Line:
    """One line of an invoice."""

    text: str
    count: int = 1


@app.event
class InvoicePaid:
    """An invoice was paid in full.

    Partial payments publish no event.
    """

    number: str
    amount: Decimal = Decimal("9.50")
    lines: list[Line] = attrs.field(factory=list)
    paid_at: datetime | None = None
    kind: Kind = Kind.CARD
    mode: Literal["a.b", "c"] | None = None
    parts: "list[InvoicePaid]" = attrs.field(factory=list)


@app.event("invoice.due", version=2)
@dataclass
class Due:
    number: str
    key: uuid.UUID = field(default_factory=uuid.uuid4)


@app.event
class InvoiceDropped(msgspec.Struct, rename="camel"):
    invoice_number: int


@app.event
class DayClosed:
    pass


@app.on("user.registered", "user.gone", source="auth", retry=Retry(delays=(1, 5)))
async def keep_account(user: dict):
    """Opens or closes an account."""


@app.on("#", queue="slow", timeout=90, retry=Retry.none(), name="log")
def write_log(event: dict): ...
'''

TABLE = """\
billing publishes to the exchange billing:

  day.closed  (bus.DayClosed)
    (no fields)

  invoice.dropped  (bus.InvoiceDropped)
    FIELD          TYPE
    invoiceNumber  int

  invoice.due  version 2  (bus.Due)
    FIELD   TYPE
    number  str
    key     UUID  = uuid4()

  invoice.paid  (bus.InvoicePaid)
    An invoice was paid in full.

    Partial payments publish no event.
    FIELD    TYPE
    number   str
    amount   Decimal                     = "9.50"
    lines    list[Line]                  = list()
    paid_at  datetime | None             = null
    kind     Kind                        = "card"
    mode     Literal['a.b', 'c'] | None  = null
    parts    list[InvoicePaid]           = list()

billing subscribes to:

  EVENT                       FROM     HANDLER       QUEUE         RETRY AFTER  TIMEOUT
  user.registered, user.gone  auth     keep_account  billing.main  1, 5 s       60 s
  #                           any app  log           billing.slow  never        90 s
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bus.py").write_text(BUS)
    return tmp_path


@pytest.fixture
def app(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Lightbus:
    spec = importlib.util.spec_from_file_location("events_bus", folder / "bus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "events_bus", module)
    spec.loader.exec_module(module)
    found: Lightbus = module.app
    return found


def read(folder: Path, *arguments: str) -> Any:
    done = lightbus(*arguments, folder=folder, url="amqp://127.0.0.1:1/")  # no broker listens there, and none is needed
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


# --- events -----------------------------------------------------------------------------------


def test_events_and_subscriptions_are_shown_as_tables(folder: Path) -> None:
    done = lightbus("events", "bus:app", folder=folder, url="amqp://127.0.0.1:1/")
    assert (done.stdout, done.stderr, done.returncode) == (TABLE, "", 0)


def test_an_empty_app_gets_a_hint(folder: Path) -> None:
    done = lightbus("events", "bus:silent", folder=folder, url="memory://")
    assert "silent publishes nothing yet: decorate a class with @app.event." in done.stdout
    assert "silent subscribes to nothing yet: decorate a function with @app.on('user.registered')." in done.stdout


def test_json_has_the_same_content(folder: Path) -> None:
    found = read(folder, "events", "bus:app", "--json")
    assert found["app"] == "billing"
    assert [one["name"] for one in found["publishes"]] == [
        "day.closed",
        "invoice.dropped",
        "invoice.due",
        "invoice.paid",
    ]
    due, paid = found["publishes"][2:]
    assert due == {
        "name": "invoice.due",
        "version": 2,
        "class": "bus.Due",
        "doc": None,
        "fields": [
            {"name": "number", "type": "str", "required": True},
            {"name": "key", "type": "UUID", "required": False, "default_factory": "uuid4"},
        ],
    }
    assert paid["doc"] == "An invoice was paid in full.\n\nPartial payments publish no event."
    assert paid["fields"][1] == {"name": "amount", "type": "Decimal", "required": False, "default": "9.50"}
    keep, log = found["handles"]
    assert keep == {
        "patterns": ["user.registered", "user.gone"],
        "source": "auth",
        "handler": "keep_account",
        "function": "bus.keep_account",
        "doc": "Opens or closes an account.",
        "queue": "billing.main",
        "retry": [1, 5],
        "timeout": 60,
        "concurrency": None,
    }
    assert (log["function"], log["queue"], log["retry"], log["source"]) == ("bus.write_log", "billing.slow", [], None)


# --- schema -----------------------------------------------------------------------------------


def test_schemas_are_valid_in_their_dialect(folder: Path) -> None:
    found = read(folder, "schema", "bus:app")
    assert list(found) == ["day.closed", "invoice.dropped", "invoice.due", "invoice.paid"]
    for name, one in found.items():
        assert one["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert one["title"] == name
        jsonschema.Draft202012Validator.check_schema(one)
    assert "Version 2 of the event that 'billing' publishes" in found["invoice.due"]["$comment"]
    assert found["invoice.paid"]["$defs"]["Line"]["description"] == "One line of an invoice."
    assert read(folder, "schema", "bus:app", "invoice.paid") == found["invoice.paid"]


def test_published_bodies_match_their_schema_and_rejected_ones_do_not(app: Lightbus) -> None:
    given: dict[str, dict[str, Any]] = {
        "invoice.paid": {"number": "i-1", "lines": [{"text": "one"}], "parts": [{"number": "i-2"}], "mode": "a.b"},
        "invoice.due": {"number": "i-1"},
        "invoice.dropped": {"invoiceNumber": 1},
        "day.closed": {},
    }
    for name, payload in given.items():
        event_type = app.events[name]
        body = codec.encode(event_type, codec.build_event(event_type, payload))
        found = schemas.schema_of(app.name, event_type)
        jsonschema.validate(json.loads(body), found)
        jsonschema.validate(json.loads(body) | {"unknown": 1}, found)  # consumers ignore unknown fields
        if payload:
            for wrong in ({}, payload | {next(iter(payload)): [1.5]}):
                with pytest.raises(jsonschema.ValidationError):
                    jsonschema.validate(wrong, found)


def test_the_output_is_stable_until_an_event_changes(folder: Path) -> None:
    uncached = {"PYTHONDONTWRITEBYTECODE": "1"}  # a file of the same size and second would not be compiled again

    def text(seed: str) -> str:
        extra = {"PYTHONHASHSEED": seed, **uncached}
        return lightbus("schema", "bus:app", folder=folder, url="memory://", extra=extra).stdout

    before = text("1")
    assert before == text("2")
    source = (folder / "bus.py").read_text()
    (folder / "bus.py").write_text(source.replace("count: int = 1", "count: int = 2"))
    changed = [line for line in text("1").splitlines() if line not in before.splitlines()]
    assert [line.strip() for line in changed] == ['"default": 2']


def test_a_misspelt_event_gets_a_suggestion(folder: Path) -> None:
    done = lightbus("schema", "bus:app", "invoice.payd", folder=folder, url="memory://")
    assert (done.returncode, done.stdout) == (2, "")
    assert "event 'invoice.payd' is not declared on app 'billing'. Did you mean 'invoice.paid'" in done.stderr
