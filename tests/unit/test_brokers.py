"""The table of brokers: every difference is in a row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import pytest

import lightbus
from lightbus import Lightbus
from lightbus.connection.brokers.table import BROKERS, SCHEMES
from lightbus.connection.declare import declare
from lightbus.inspection.trial import trial

HOUSE = Path(lightbus.__file__).parent


# --- the table --------------------------------------------------------------------------------

ASKS = re.compile(
    r"""(?<!request\.url)(?<!origin)\.scheme\ *(==|!=|in\b)
      | ["'](amqps|pyamqp|activemqs?|memory)["']
      | rabbitmq(ctl|-\w)""",
    re.VERBOSE,
)
"""Code that asks which broker it is, or assumes one."""

HELP = ("cli/topology.py", "cli/unbind.py")
"""Pages of help, and the command that prints a line for rabbitmqctl."""


def test_only_the_table_asks_which_broker_it_is() -> None:
    asking = [
        f"{path.relative_to(HOUSE)}:{number}: {line.strip()}"
        for path in sorted(HOUSE.rglob("*.py"))
        if not str(path.relative_to(HOUSE)).startswith(("transport/", "connection/brokers/", *HELP))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if ASKS.search(line)
    ]
    assert asking == []


@pytest.mark.parametrize("broker", BROKERS, ids=lambda broker: broker.name)
def test_every_error_of_a_broker_has_an_answer_and_every_scheme_one_broker(broker: Any) -> None:
    assert re.search(broker.answers[-1].pattern, "999 ")
    assert [SCHEMES[scheme.name] for scheme in broker.schemes] == [(broker, scheme) for scheme in broker.schemes]
    assert sum(
        scheme.name in {one.name for one in other.schemes} for other in BROKERS for scheme in broker.schemes
    ) == (len(broker.schemes))


@pytest.mark.parametrize("handlers", [True, False])
def test_a_trial_by_subscription_finds_the_permissions_and_publishes_nothing(
    handlers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, scheme = SCHEMES["memory"]
    monkeypatch.setitem(SCHEMES, "memory", (attrs.evolve(broker, trial="subscription"), scheme))
    app = Lightbus("billing", url="memory://trial-by-subscription")
    if handlers:
        app.on("order.placed", source="shop")(lambda: None)
    connection = app.broker.connect("test")
    declare(connection, app.topology())
    channel = connection.channel()
    channel.queue_declare("everything", durable=False, exclusive=True, auto_delete=False)
    channel.queue_bind("everything", "lightbus", "#")
    found = list(trial(connection, app.broker.addresses[0], app, "billing.bus:app"))
    assert [one.level for one in found] == (["ok", "note"] if handlers else ["ok"])
    assert channel.get("everything") is None
    connection.close()
