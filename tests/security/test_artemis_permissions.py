"""What a user with the printed settings may do on ActiveMQ Artemis, and that no source can be forged.

The broker has exactly the printed XML, so a right that is not printed does not exist. Clients are qpid-proton's: they
can do what Lightbus never does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.artemis import ADMIN, INSTALL, Artemis
from tests.conftest import need_artemis
from tests.patience import LIMIT, wait_until
from tests.processes import lightbus

if TYPE_CHECKING:
    from proton import Message
    from proton.utils import BlockingConnection

    Attempt = Callable[[BlockingConnection], object]

pytest.importorskip("proton", reason=INSTALL)

pytestmark = pytest.mark.artemis

PASSWORD = "secret"
BUS = """\
from lightbus import Lightbus

billing, shop = Lightbus("billing"), Lightbus("shop")

@billing.on("invoice.#")
async def pay(invoice: dict): ...

@billing.on("invoice.#", queue="slow")
async def print_it(invoice: dict): ...

@shop.on("order.#", source="shop")
async def ship(order: dict): ...
"""
# A retry is sent to the queue itself, and has no origin. A core message (over STOMP and so on) has one in a property.
UNDIVERTED = '("m.x-opt-ORIG-ADDRESS" IS NULL AND _AMQ_ORIG_ADDRESS IS NULL)'
DIVERTED = '"m.x-opt-ORIG-ADDRESS" IS NOT NULL'
SELECTORS = {
    "lightbus.bus::billing.main": f"{UNDIVERTED} OR {DIVERTED} AND JMSType LIKE 'invoice.%'",
    "lightbus.bus::billing.slow": f"{UNDIVERTED} OR {DIVERTED} AND JMSType LIKE 'invoice.%'",
    "lightbus.dead::billing.dead": f"{UNDIVERTED} OR \"m.x-opt-ORIG-QUEUE\" IN ('billing.main', 'billing.slow')",
    "lightbus.bus::shop.main": (
        f"{UNDIVERTED} OR \"m.x-opt-ORIG-ADDRESS\" IN ('lightbus.exchange.shop', 'lightbus.delay.shop') AND "
        "JMSType LIKE 'order.%'"
    ),
    "lightbus.dead::shop.dead": f"{UNDIVERTED} OR \"m.x-opt-ORIG-QUEUE\" IN ('shop.main')",
    "lightbus.bus::witness.main": f"{UNDIVERTED} OR {DIVERTED}",
    "lightbus.bus::naive.main": '"m.x-opt-ORIG-ADDRESS" IS NULL',
}
"""The administrator has made the last two, and no setting is for them: all events, and what seems to be a retry."""

_names = itertools.count(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apps")
    (folder / "bus.py").write_text(BUS)
    return folder


def printed(folder: Path, *command: str) -> str:
    done = lightbus("topology", *command, "--admin-role", ADMIN, folder=folder, url="memory://")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def broker(folder: Path) -> Iterator[Artemis]:
    need_artemis()
    end = "</security-settings>"
    apps = [printed(folder, "permissions", f"bus:{app}", "--format", "artemis") for app in ("billing", "shop")]
    settings = printed(folder, "artemis").replace(end, "\n".join([*apps, end]))
    # STOMP, so that what a core message can do is seen: the printed text warns of such an acceptor.
    with Artemis(settings, options="protocols=AMQP,STOMP") as broker:
        broker.add_users({app: ["lightbus", f"lightbus.{app}"] for app in ("billing", "shop")}, PASSWORD)
        for user in ("billing", "shop", ADMIN):
            for address, selector in SELECTORS.items():
                if f"::{user}." in address or (user == ADMIN and ("witness" in address or "naive" in address)):
                    with connected(broker, user) as connection:
                        consumes(address, selector)(connection)
        for app in ("shop", "billing"):  # the addresses exist, so that none is refused only because it would be created
            for each in ("exchange", "contract", "delay"):
                with connected(broker, app) as connection:
                    sends(f"lightbus.{each}.{app}", subject="set.up")(connection)
        yield broker


@contextlib.contextmanager
def connected(broker: Artemis, user: str) -> Iterator[BlockingConnection]:
    from proton.utils import BlockingConnection

    connection = BlockingConnection(broker.url(user, scheme="amqp"), timeout=LIMIT, allowed_mechs="PLAIN")
    try:
        yield connection
    finally:
        with contextlib.suppress(Exception):  # proton raises the error of a link again
            connection.close()


# --- what a client can try ------------------------------------------------------------------------


def message(**fields: Any) -> Message:
    from proton import Message, symbol

    annotations = {symbol(key): value for key, value in fields.pop("annotations", {}).items()}
    made = Message(**{"body": b"{}", "durable": True, "subject": "order.placed", **fields})
    made.annotations = annotations or None
    return made


def sends(target: str | None, **fields: Any) -> Attempt:
    """Send a message, and wait until the broker has accepted it. None: to the message's own address (`to`)."""
    return lambda connection: connection.create_sender(target).send(message(**fields))


def subscription(selector: str | None, *, queue: bool, browse: bool) -> Any:
    from proton import Described, Terminus, symbol
    from proton.reactor import ReceiverOption

    class Subscription(ReceiverOption):
        def apply(self, receiver: Any) -> None:
            source = receiver.source
            if selector is not None:
                kind = symbol("apache.org:selector-filter:string")
                source.filter.put_dict({symbol("jms-selector"): Described(kind, selector)})
            if browse:
                source.distribution_mode = Terminus.DIST_MODE_COPY
            elif queue:
                source.durability, source.expiry_policy = Terminus.DELIVERIES, Terminus.EXPIRE_NEVER
                source.capabilities.put_array(False, 21)
                source.capabilities.enter()
                for capability in ("topic", "shared", "global"):
                    source.capabilities.put_symbol(capability)
                source.capabilities.exit()

    return Subscription()


def consumes(address: str, selector: str | None = None, *, browse: bool = False) -> Attempt:
    """Attach to a queue, which is created if it does not exist; or to an address, with a temporary queue."""
    options = [subscription(selector or SELECTORS.get(address), queue="::" in address, browse=browse)]
    return lambda connection: connection.create_receiver(address, credit=0, options=options, name=f"l{next(_names)}")


def asks(resource: str, operation: str, *arguments: object, reply_to: str = "lightbus.reply.billing.1") -> Attempt:
    """Call a management operation. Its answer arrives at the address."""

    def ask(connection: BlockingConnection) -> Any:
        answers = connection.create_receiver(reply_to, credit=1, name=f"l{next(_names)}")
        properties = {"_AMQ_ResourceName": resource, "_AMQ_OperationName": operation}
        request = message(properties=properties, body=json.dumps(arguments), reply_to=reply_to)
        connection.create_sender("activemq.management", name=f"l{next(_names)}").send(request)
        answer = answers.receive(timeout=LIMIT)
        answers.accept()
        value = json.loads(answer.body)[0] if answer.body else None
        if not answer.properties["_AMQ_OperationSucceeded"]:
            raise PermissionError(value)
        return value

    return ask


def received(broker: Artemis, user: str, address: str, *, reject: bool = False) -> list[Message]:
    """Take all messages that a queue has, up to the one that is sent now."""
    with connected(broker, user) as connection:
        receiver = connection.create_receiver(
            address, credit=100, options=[subscription(SELECTORS[address], queue=True, browse=False)], name="taker"
        )
        end = f"end-{next(_names)}"
        sends(address, subject=end)(connection)
        found: list[Message] = []
        while True:
            one = receiver.receive(timeout=LIMIT)
            if one.subject == end:
                receiver.accept()
                return found
            receiver.reject() if reject else receiver.accept()
            found.append(one)


# --- the table ------------------------------------------------------------------------------------

CHANGED = json.dumps({"name": "billing.main", "filter-string": "JMSType = 'all'"})

ALLOWED: dict[str, Attempt] = {
    "publish": sends("lightbus.exchange.billing"),
    "publish to its own address without a link to it": sends(None, address="lightbus.exchange.billing"),
    "publish with a delay": sends("lightbus.delay.billing", ttl=60),
    "publish its contract": sends("lightbus.contract.billing"),
    "send a retry to its queue": sends("lightbus.bus::billing.main"),
    "send a retry to its separate queue": sends("lightbus.bus::billing.slow"),
    "send a dead letter": sends("lightbus.dead::billing.dead"),
    "consume its queue": consumes("lightbus.bus::billing.main"),
    "consume its separate queue": consumes("lightbus.bus::billing.slow"),
    "read its dead letters": consumes("lightbus.dead::billing.dead"),
    "tail": consumes("lightbus.bus", "JMSType LIKE 'order.%'"),
    "read the contracts": consumes("lightbus.catalog::lightbus.catalog", browse=True),
    "count its messages": asks("queue.billing.main", "getMessageCount"),
    "count its retries": asks("queue.billing.main", "getScheduledCount"),
    "count its consumers": asks("queue.billing.main", "getConsumerCount"),
    "read its selector": asks("queue.billing.main", "getFilter"),
    "count its dead letters": asks("queue.billing.dead", "getMessageCount"),
    "see that another app exists": asks("address.lightbus.exchange.shop", "getAddress"),
    "see that the divert exists": asks("divert.lightbus-bus", "getAddress"),
    # Not separable from `tail`. No app can make such a queue: createDurableQueue is for queues with a setting.
    "consume a queue that has no setting": consumes("lightbus.bus::witness.main"),
}

REFUSED: dict[str, Attempt] = {
    "send to the bus": sends("lightbus.bus"),
    "send to the bus without a link to it": sends(None, address="lightbus.bus"),
    "publish as another app": sends("lightbus.exchange.shop"),
    "publish as another app without a link to it": sends(None, address="lightbus.exchange.shop"),
    "publish as a new app": sends("lightbus.exchange.stranger"),
    "publish as all apps": sends("lightbus.exchange.*"),
    "publish with a delay as another app": sends("lightbus.delay.shop"),
    "publish the contract of another app": sends("lightbus.contract.shop"),
    "send to the catalogue": sends("lightbus.catalog"),
    "send to the queue of the catalogue": sends("lightbus.catalog::lightbus.catalog"),
    "send to a queue of another app": sends("lightbus.bus::shop.main"),
    "send to a queue of another app without a link to it": sends(None, address="lightbus.bus::shop.main"),
    "send to the dead letters": sends("lightbus.dead"),
    "send to the dead letters of another app": sends("lightbus.dead::shop.dead"),
    "send to a queue that has no setting": sends("lightbus.bus::witness.main"),
    "consume a queue of another app": consumes("lightbus.bus::shop.main"),
    "browse a queue of another app": consumes("lightbus.bus::shop.main", browse=True),
    "read the dead letters of another app": consumes("lightbus.dead::shop.dead"),
    "browse the dead letters of another app": consumes("lightbus.dead::shop.dead", browse=True),
    "tail the dead letters": consumes("lightbus.dead"),
    "create a queue of another app": consumes("lightbus.bus::shop.other", "TRUE"),
    "create another queue": consumes("lightbus.bus::billing.other", "TRUE"),
    "create a queue at its exchange": consumes("lightbus.exchange.billing::billing.all", "TRUE"),
    "tail an exchange": consumes("lightbus.exchange.billing"),
    "tail everything": consumes("lightbus.#"),
    "read the delayed events": consumes("lightbus.delay.billing"),
    "take contracts away": consumes("lightbus.catalog::lightbus.catalog"),
    "read the answers of another app": consumes("lightbus.reply.shop.1"),
    "count the messages of another app": asks("queue.shop.main", "getMessageCount"),
    "delete its messages": asks("queue.billing.main", "removeAllMessages"),
    "change the selector of its queue": asks("broker", "updateQueue", CHANGED),
    "delete its queue": asks("broker", "destroyQueue", "billing.main"),
    "delete a queue of another app": asks("broker", "destroyQueue", "shop.main"),
    "send by management": asks(
        "address.lightbus.exchange.shop", "sendMessage", {}, 3, "e30=", True, "billing", "secret"
    ),
    "list the queues": asks("broker", "listQueues", "", 1, 10),
    "stop the divert": asks("broker", "destroyDivert", "lightbus-bus"),
    "add a user": asks("broker", "addUser", "eve", "eve", "amq", False),
    "let an answer go to another app's exchange": asks(
        "queue.billing.main", "getFilter", reply_to="lightbus.exchange.shop"
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_an_app_may(broker: Artemis, name: str) -> None:
    with connected(broker, "billing") as connection:
        ALLOWED[name](connection)


@pytest.mark.parametrize("name", REFUSED)
def test_an_app_must_not(broker: Artemis, name: str) -> None:
    from proton.utils import LinkDetached, SendException

    # A message without a link to its address is rejected without a reason.
    reason = "rejected" if "without a link" in name else "permission"
    with (
        connected(broker, "billing") as connection,
        pytest.raises((LinkDetached, SendException, PermissionError)) as it,
    ):
        REFUSED[name](connection)
    text = str(it.value) if not isinstance(it.value, SendException) else "rejected"
    assert reason in text


def test_an_operator_changes_a_selector_and_deletes_a_queue(broker: Artemis) -> None:
    with connected(broker, ADMIN) as connection:
        consumes("lightbus.bus::gone.main", "JMSType = 'old'")(connection)
    changed = json.dumps({"name": "billing.slow", "filter-string": "FALSE"})
    with connected(broker, ADMIN) as connection:
        asks("broker", "updateQueue", changed)(connection)
        assert asks("queue.billing.slow", "getFilter")(connection) == "FALSE"
        back = json.dumps({"name": "billing.slow", "filter-string": SELECTORS["lightbus.bus::billing.slow"]})
        asks("broker", "updateQueue", back)(connection)
        assert asks("queue.billing.slow", "getFilter")(connection) == SELECTORS["lightbus.bus::billing.slow"]
        asks("broker", "destroyQueue", "gone.main", True)(connection)
        with pytest.raises(PermissionError, match="Cannot find resource"):
            asks("queue.gone.main", "getFilter")(connection)


def test_a_missing_queue_does_not_take_messages(broker: Artemis) -> None:
    from proton.utils import LinkDetached

    with connected(broker, ADMIN) as connection, pytest.raises(LinkDetached, match="does not exist"):
        sends("lightbus.bus::nobody.main")(connection)


# --- sources --------------------------------------------------------------------------------------

ORIGIN = {"x-opt-ORIG-ADDRESS": "lightbus.exchange.shop", "x-opt-ORIG-QUEUE": "shop.main"}
FORGERIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "annotations": {"annotations": ORIGIN},
    "all annotations": {"annotations": {**ORIGIN, "x-opt-ORIG-MESSAGE-ID": 5}},
    "annotations of another name": {"annotations": {"_AMQ_ORIG_ADDRESS": ORIGIN["x-opt-ORIG-ADDRESS"]}},
    "to": {"address": "lightbus.exchange.shop"},
    "to the bus": {"address": "lightbus.bus", "annotations": ORIGIN},
    "to a queue": {"address": "lightbus.bus::shop.main", "annotations": ORIGIN},
    "properties": {
        "properties": {
            "_AMQ_ORIG_ADDRESS": "lightbus.exchange.shop",
            "_AMQ_ORIG_QUEUE": "shop.main",
            "x-opt-ORIG-ADDRESS": "lightbus.exchange.shop",
            "m.x-opt-ORIG-ADDRESS": "lightbus.exchange.shop",
            "_AMQ_ROUTE_TO": b"\0" * 8,
            "_AMQ_SCHED_DELIVERY": 1,
            "JMSXGroupID": "shop",
        }
    },
    "a group": {"group_id": "shop", "user_id": b"shop", "reply_to": "lightbus.exchange.shop"},
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_the_source_of_an_event_cannot_be_forged(broker: Artemis, forgery: str) -> None:
    fields = FORGERIES[forgery]
    received(broker, ADMIN, "lightbus.bus::witness.main")
    with connected(broker, "billing") as connection:
        sends("lightbus.exchange.billing", **fields)(connection)
        sends("lightbus.delay.billing", ttl=0.01, **fields)(connection)
    found: list[Message] = []

    def both_arrived() -> bool:
        found.extend(received(broker, ADMIN, "lightbus.bus::witness.main"))
        return len(found) >= 2

    wait_until(both_arrived, "the event and the delayed event arrive")
    origins = [one.annotations["x-opt-ORIG-ADDRESS"] for one in found]
    assert origins == ["lightbus.exchange.billing", "lightbus.delay.billing"]
    assert received(broker, "shop", "lightbus.bus::shop.main") == []


def test_an_event_of_the_named_source_arrives(broker: Artemis) -> None:
    """The counterpart of the test above: such a queue takes messages at all."""
    with connected(broker, "shop") as connection:
        sends("lightbus.exchange.shop")(connection)
    (found,) = received(broker, "shop", "lightbus.bus::shop.main")
    assert found.annotations["x-opt-ORIG-ADDRESS"] == "lightbus.exchange.shop"


def test_a_dead_letter_of_the_broker_goes_to_the_app_that_rejected_it(broker: Artemis) -> None:
    received(broker, "billing", "lightbus.bus::billing.main")
    received(broker, "billing", "lightbus.dead::billing.dead")
    with connected(broker, "billing") as connection:
        sends("lightbus.exchange.billing", subject="invoice.paid", annotations=ORIGIN)(connection)
        # The broker compares the selector here, too, so a retry must not have the annotations of its event.
        sends("lightbus.bus::billing.main", subject="invoice.paid")(connection)
    assert len(received(broker, "billing", "lightbus.bus::billing.main", reject=True)) == 2
    found = received(broker, "billing", "lightbus.dead::billing.dead")
    assert [one.annotations["x-opt-ORIG-QUEUE"] for one in found] == ["billing.main"] * 2
    assert received(broker, "shop", "lightbus.dead::shop.dead") == []


def test_a_message_over_another_protocol_has_no_source_that_amqp_shows(broker: Artemis) -> None:
    """The reason for the acceptor with AMQP only, and for the first line of each selector."""
    received(broker, "billing", "lightbus.bus::billing.main")
    received(broker, ADMIN, "lightbus.bus::witness.main")
    received(broker, ADMIN, "lightbus.bus::naive.main")
    headers = "".join(f"{key}:{value}\n" for key, value in {**ORIGIN, "JMSType": "invoice.paid"}.items())
    with socket.create_connection(("127.0.0.1", broker.port), timeout=LIMIT) as stomp:
        stomp.sendall(f"CONNECT\naccept-version:1.2\nhost:x\nlogin:billing\npasscode:{PASSWORD}\n\n\0".encode())
        assert stomp.recv(4096).startswith(b"CONNECTED")
        stomp.sendall(f"SEND\ndestination:lightbus.exchange.billing\nreceipt:1\n{headers}\n{{}}\0".encode())
        assert stomp.recv(4096).startswith(b"RECEIPT")
    assert received(broker, "billing", "lightbus.bus::billing.main") == []
    assert received(broker, "shop", "lightbus.bus::shop.main") == []
    assert received(broker, ADMIN, "lightbus.bus::witness.main") == []
    (found,) = received(broker, ADMIN, "lightbus.bus::naive.main")
    assert found.annotations is None or "x-opt-ORIG-ADDRESS" not in found.annotations
