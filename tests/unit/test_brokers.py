"""The table of brokers: every difference is in a row, and Artemis' errors are explained by their texts."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, cast

import amqp.exceptions
import attrs
import pytest

import lightbus
from lightbus import Lightbus, errors
from lightbus.connection.address import parse_address
from lightbus.connection.brokers.table import BROKERS, SCHEMES
from lightbus.connection.declare import declare
from lightbus.connection.diagnosis import FATAL, describe
from lightbus.connection.dial import BrokerAddresses
from lightbus.inspection.trial import trial

HOUSE = Path(lightbus.__file__).parent
ADDRESS = parse_address("activemq://billing:secret@artemis")


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


# --- URLs of Artemis --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "port", "tls"),
    [
        ("activemq://localhost", 5672, False),
        ("activemq://billing:pw@artemis:61616/", 61616, False),
        ("ACTIVEMQS://billing:pw@artemis/?cafile=/ca.pem&heartbeat=5&connect_timeout=1", 5671, True),
    ],
)
def test_a_url_of_artemis_has_the_defaults_of_its_scheme(url: str, port: int, tls: bool) -> None:
    address = parse_address(url)
    assert (address.broker.name, address.port, address.tls, address.vhost) == ("ActiveMQ Artemis", port, tls, "/")
    assert not address.private


def test_several_nodes_of_artemis_are_joined_by_semicolons() -> None:
    broker = BrokerAddresses.parse("activemq://one;activemqs://two:5673/")
    assert [address.port for address in broker.addresses] == [5672, 5673]


@pytest.mark.parametrize("path", ["/shop", "//", "/%2F"])
def test_a_virtual_host_of_artemis_is_refused(path: str) -> None:
    with pytest.raises(
        errors.InvalidURL, match=r"ActiveMQ Artemis has no virtual hosts\. Remove what follows the host"
    ):
        parse_address(f"activemq://billing:secret@artemis{path}")


def test_without_its_library_the_error_names_the_extra_and_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "proton", cast(Any, None))
    with pytest.raises(errors.UnsupportedBroker) as refused:
        BrokerAddresses.parse("activemqs://127.0.0.1:1").connect("test")
    assert str(refused.value) == "activemqs:// needs the extra: pip install 'lightbus-amqp[activemq]'"
    assert isinstance(refused.value, FATAL)


def test_an_unknown_scheme_leads_to_all_brokers() -> None:
    with pytest.raises(errors.UnsupportedBroker) as refused:
        parse_address("activmq://localhost")
    assert "Did you mean activemq://?" in str(refused.value)
    assert (
        "Use RabbitMQ (amqp:// or amqps://), ActiveMQ Artemis (activemq:// or activemqs://), or the embedded broker "
        "(sqlite:// or memory://)."
    ) in str(refused.value)


# --- errors of Artemis ------------------------------------------------------------------------

# The texts after the dash are those of Artemis 2.40.0; before it is the name of AMQP 0-9-1's code.
ANSWERS: dict[str, tuple[Any, type[errors.BrokerError], str]] = {
    "ACCESS_REFUSED - Authentication failed [mech=PLAIN]": (
        amqp.exceptions.AccessRefused,
        errors.AccessRefused,
        "artemis-users.properties",
    ),
    "ACCESS_REFUSED - AMQ119017: not authorized to create producer, AMQ229032: User: shop does not have "
    "permission='SEND' on address lightbus.exchange.billing": (
        amqp.exceptions.AccessRefused,
        errors.AccessRefused,
        "permissions MODULE:ATTR --format artemis",
    ),
    "ACCESS_REFUSED - AMQ119015: not authorized to create consumer, AMQ229213: User: billing does not have "
    "permission='CREATE_DURABLE_QUEUE' for queue shop.main on address lightbus.bus": (
        amqp.exceptions.AccessRefused,
        errors.AccessRefused,
        "permissions MODULE:ATTR --format artemis",
    ),
    "INTERNAL_ERROR - AMQ229032: User: billing does not have permission='CREATE_ADDRESS' on address "
    "lightbus.exchange.shop": (
        amqp.exceptions.InternalError,
        errors.AccessRefused,
        "permissions MODULE:ATTR --format artemis",
    ),
    "INTERNAL_ERROR - AMQ229032: User: billing does not have permission='CREATE_ADDRESS' on address lightbus.bus": (
        amqp.exceptions.InternalError,
        errors.TopologyMissing,
        "lightbus topology artemis",
    ),
    "ACCESS_REFUSED - AMQ229032: User: billing does not have permission='EDIT' on address mops.broker.updateQueue": (
        amqp.exceptions.AccessRefused,
        errors.AccessRefused,
        "as an operator",
    ),
    "ACCESS_REFUSED - AMQ229032: User: billing does not have permission='VIEW' on address "
    "mops.queue.billing.main.countMessages": (
        amqp.exceptions.AccessRefused,
        errors.AccessRefused,
        "permissions MODULE:ATTR --format artemis",
    ),
    "PRECONDITION_FAILED - Unrecoverable error: Queue: billing.main filter mismatch [JMSType = 'b'] is different than "
    "existing filter [JMSType = 'a']": (
        amqp.exceptions.PreconditionFailed,
        errors.TopologyConflict,
        "artemis queue delete --name billing.main`",
    ),
    "NOT_FOUND - Queue: 'billing.dead' does not exist for address 'lightbus.dead'": (
        amqp.exceptions.NotFound,
        errors.TopologyMissing,
        "Start a worker",
    ),
    "NOT_FOUND - AMQ229017: Queue billing.main does not exist": (
        amqp.exceptions.NotFound,
        errors.TopologyMissing,
        "Start a worker",
    ),
    "NOT_FOUND - AMQ229067: Cannot find resource with name queue.billing.main": (
        amqp.exceptions.NotFound,
        errors.TopologyMissing,
        "Start a worker",
    ),
    "NOT_FOUND - Queue: 'lightbus.catalog' does not exist for address 'lightbus.catalog'": (
        amqp.exceptions.NotFound,
        errors.TopologyMissing,
        "lightbus topology artemis",
    ),
    "NOT_FOUND - AMQ229203: Address Does Not Exist: lightbus.bus": (
        amqp.exceptions.NotFound,
        errors.TopologyMissing,
        "lightbus topology artemis",
    ),
    "NOT_FOUND - AMQ229231: Divert Does Not Exist: lightbus-bus": (
        amqp.exceptions.NotFound,
        errors.TopologyMissing,
        "lightbus topology artemis",
    ),
    "NOT_FOUND - Queue deleted: billing.main": (
        amqp.exceptions.NotFound,
        errors.TopologyMissing,
        "Start a worker",
    ),
    "PRECONDITION_FAILED - AMQ229207: Can not create queue with routing type: MULTICAST, Supported routing types for "
    "address: lightbus.bus are [ANYCAST]": (
        amqp.exceptions.PreconditionFailed,
        errors.TopologyConflict,
        "lightbus topology artemis",
    ),
    "ACCESS_REFUSED - AMQ229200: Maximum Consumer Limit Reached on Queue:(address=lightbus.bus,queue=billing.main)": (
        amqp.exceptions.AccessRefused,
        errors.AccessRefused,
        "list of consumers",
    ),
    "SYNTAX_ERROR - Invalid filter": (amqp.exceptions.FrameSyntaxError, errors.UnsupportedBroker, "2.40"),
    'RESOURCE_ERROR - AMQ229102: Address "lightbus.bus" is full.': (
        amqp.exceptions.ResourceError,
        errors.LimitReached,
        "max-disk-usage",
    ),
    "NOT_ALLOWED - AMQ229110: Too many sessions for user 'billing'. Sessions allowed: 2.": (
        amqp.exceptions.NotAllowed,
        errors.LimitReached,
        "max-sessions",
    ),
    "CONNECTION_FORCED - AMQ229108: connections for user billing closed by management": (
        amqp.exceptions.ConnectionForced,
        errors.BrokerUnreachable,
        "an operator closed",
    ),
    "CONNECTION_FORCED - AMQ229014: Did not receive data from /127.0.0.1:40000 within the 20000ms connection TTL. The "
    "connection will now be closed.": (amqp.exceptions.ConnectionForced, errors.BrokerUnreachable, "heartbeat"),
    "INTERNAL_ERROR - Unrecoverable error: java.lang.NullPointerException": (
        amqp.exceptions.InternalError,
        errors.BrokerUnreachable,
        "log/artemis.log",
    ),
    "PRECONDITION_FAILED - something else": (
        amqp.exceptions.PreconditionFailed,
        errors.BrokerError,
        "log/artemis.log",
    ),
    "FRAME_ERROR - odd": (amqp.exceptions.FrameError, errors.BrokerError, "report it"),
}


@pytest.mark.parametrize("message", ANSWERS)
def test_an_error_of_artemis_is_explained_with_its_text_and_the_next_step(message: str) -> None:
    raised, expected, step = ANSWERS[message]
    described = describe(raised(message), ADDRESS)
    assert type(described) is expected, described
    assert message.rstrip(".") in str(described)
    assert step in str(described)
    assert "secret" not in str(described)
    assert "abbit" not in str(described)


@pytest.mark.parametrize("broker", [one for one in BROKERS if one.name == "ActiveMQ Artemis"], ids=lambda one: one.name)
def test_no_text_of_artemis_is_about_rabbitmq(broker: Any) -> None:
    texts = [f"{one.cause} {one.step}" for one in broker.answers]
    texts += [value for name in broker.__slots__ if isinstance(value := getattr(broker, name, None), str)]
    texts += [broker.list_bindings("/"), broker.list_consumers("/"), broker.resolution("", ADDRESS)]
    assert not [text for text in texts if "rabbit" in text.lower()]
