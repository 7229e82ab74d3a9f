"""Requests to Artemis' management address, over the connection itself.

A request is a message with the name of a resource and of its operation; the answer comes to an address that only this
connection knows, as JSON. What a user may ask for is in `broker_xml`.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from proton import Message

from lightbus.transport.activemq import answers, names
from lightbus.transport.activemq.engine import Engine
from lightbus.transport.activemq.links import ACCEPTED, Incoming, Outgoing, Sent, Transfer, settle

CREDIT = 100


class Owner(Protocol):
    """The connection, as requests need it."""

    engine: Engine

    @property
    def links(self) -> dict[str, Incoming | Outgoing]: ...

    def link_name(self, what: str) -> str: ...

    def wait_for(self, is_over: Callable[[], bool], what: str) -> None: ...


class Refused(Exception):
    """The broker refused or failed a request: its text."""


class Management:
    """Asks the broker, one request at a time. Owned by a connection; the links open with the first request."""

    def __init__(self, owner: Owner, user: str) -> None:
        """
        Args:
            user: the one that is logged in.
        """
        self._owner = owner
        self._user = user
        self._sender: Outgoing | None = None
        self._receiver: Incoming | None = None
        self._address = ""
        self._numbers = itertools.count(1)
        self._answers: dict[str, Message] = {}
        self._error: Exception | None = None

    def invoke(self, resource: str, operation: str, *arguments: Any) -> Any:
        """Call an operation. (Of a refused attribute, Artemis does not say that it was refused.)

        Raises:
            Refused: the broker does not know the resource, or refuses.
            amqp.exceptions.AccessRefused: this user may not ask at all.
        """
        properties = {"_AMQ_ResourceName": resource, "_AMQ_OperationName": operation}
        if self._sender is None:
            self._open()
        sender, number = self._sender, next(self._numbers)
        assert sender is not None
        token = str(number)
        request = Message(
            body=json.dumps(arguments),
            properties=properties,
            reply_to=self._address,
            correlation_id=token,
            durable=False,
        )
        sender.put(Sent(number, token, mandatory=False), request.encode())
        sender.push()
        what = f"{operation} of {resource}"
        self._owner.wait_for(lambda: token in self._answers or self._error is not None, what)
        if self._error is not None:
            raise self._error
        answer = self._answers.pop(token)
        found = json.loads(answer.body) if isinstance(answer.body, str) and answer.body else []
        value = found[0] if found else None
        if not answer.properties or not answer.properties.get("_AMQ_OperationSucceeded"):
            raise Refused(str(value))
        return value

    def _open(self) -> None:
        owner = self._owner
        session = owner.engine.session
        self._address = f"{names.reply_address(self._user)}.{uuid.uuid4().hex}"
        receiver = session.receiver(owner.link_name("replies"))
        self._receiver = owner.links[receiver.name] = Incoming(self, receiver, self._address, "")
        self._receiver.give(CREDIT)
        sender = session.sender(owner.link_name("management"))
        self._sender = owner.links[sender.name] = Outgoing(self, sender, names.MANAGEMENT, "queue")
        is_open = self._receiver
        owner.wait_for(lambda: is_open.is_open or self._error is not None, "opening the management address")

    # --- what the links report

    def enlisted(self, link: Incoming) -> None:
        """Answers are not acknowledged in transactions."""

    def arrived(self, link: Incoming, transfer: Transfer, data: bytes) -> None:
        message = Message()
        message.decode(data)
        self._answers[str(message.correlation_id)] = message
        settle(transfer, ACCEPTED)
        link.give(1)

    def accepted(self, sent: Sent) -> None:
        """The answer follows."""

    def unroutable(self, sent: Sent) -> None:
        """The answer follows."""

    def rejected(self, link: Outgoing, sent: Sent, condition: Any) -> None:
        self._fail(condition)

    def sender_closed(self, link: Outgoing, condition: Any) -> None:
        self._fail(condition)

    def receiver_closed(self, link: Incoming, condition: Any) -> None:
        self._fail(condition)

    def _fail(self, condition: Any) -> None:
        name, description = ("", "the broker closed its management address")
        if condition is not None:
            name, description = condition.name, condition.description or ""
        self._error = answers.channel_error(name, description)
