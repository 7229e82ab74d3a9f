"""What Lightbus uses of python-qpid-proton, which is not installed where there is no C compiler."""

from typing import Any

class ProtonException(Exception): ...
class TransportException(ProtonException): ...
class LinkException(ProtonException): ...
class symbol(str): ...

class Described:
    def __init__(self, descriptor: object, value: object) -> None: ...

class Condition:
    name: str
    description: str | None
    def __init__(self, name: str, description: str | None = None, info: object = None) -> None: ...

class Data:
    def put_array(self, described: bool, element_type: int) -> None: ...
    def put_dict(self, d: dict[Any, Any]) -> None: ...
    def put_symbol(self, s: symbol) -> None: ...
    def enter(self) -> bool: ...
    def exit(self) -> bool: ...

class Terminus:
    DIST_MODE_COPY: int
    address: str | None
    distribution_mode: int
    capabilities: Data
    filter: Data

class EventType: ...

class Endpoint:
    REMOTE_UNINIT: int
    state: int
    remote_condition: Condition | None
    def open(self) -> None: ...
    def close(self) -> None: ...

class Disposition:
    condition: Condition | None
    failed: bool

class Delivery:
    _impl: object
    def __init__(self, impl: object) -> None: ...
    ACCEPTED: int
    REJECTED: int
    RELEASED: int
    MODIFIED: int
    aborted: bool
    link: Link
    local: Disposition
    partial: bool
    pending: int
    readable: bool
    remote: Disposition
    remote_state: int
    tag: str
    def settle(self) -> None: ...
    def update(self, state: int) -> None: ...

class Link(Endpoint):
    _impl: object
    credit: int
    current: Delivery | None
    drain_mode: bool
    name: str
    remote_source: Terminus
    remote_target: Terminus
    source: Terminus
    target: Terminus
    def free(self) -> None: ...
    def advance(self) -> bool: ...
    def delivery(self, tag: str) -> Delivery: ...

class Sender(Link):
    def stream(self, data: bytes) -> int: ...

class Receiver(Link):
    def drain(self, n: int) -> None: ...
    def flow(self, n: int) -> None: ...
    def recv(self, limit: int) -> bytes | None: ...

class Session(Endpoint):
    def free(self) -> None: ...
    def receiver(self, name: str) -> Receiver: ...
    def sender(self, name: str) -> Sender: ...

class Connection(Endpoint):
    container: str
    hostname: str | None
    password: str
    properties: dict[Any, Any] | None
    remote_properties: dict[Any, Any] | None
    user: str
    def collect(self, collector: Collector) -> None: ...
    def session(self) -> Session: ...

class SASL:
    allow_insecure_mechs: bool
    def allowed_mechs(self, mechs: str | list[str]) -> None: ...

class Transport:
    condition: Condition | None
    idle_timeout: float
    max_frame_size: int
    def bind(self, connection: Connection) -> None: ...
    def capacity(self) -> int: ...
    def peek(self, size: int) -> bytes | None: ...
    def pending(self) -> int: ...
    def pop(self, size: int) -> None: ...
    def push(self, binary: bytes | memoryview) -> None: ...
    def sasl(self) -> SASL: ...
    def tick(self, now: float) -> float: ...
    def unbind(self) -> None: ...

class Event:
    @staticmethod
    def wrap(impl: object) -> Event: ...
    CONNECTION_REMOTE_CLOSE: EventType
    CONNECTION_REMOTE_OPEN: EventType
    DELIVERY: EventType
    LINK_FLOW: EventType
    LINK_REMOTE_CLOSE: EventType
    LINK_REMOTE_DETACH: EventType
    LINK_REMOTE_OPEN: EventType
    SESSION_REMOTE_CLOSE: EventType
    SESSION_REMOTE_OPEN: EventType
    TRANSPORT_ERROR: EventType
    type: EventType
    delivery: Delivery
    link: Link
    session: Session

class Collector:
    _impl: object
    def peek(self) -> Event | None: ...
    def pop(self) -> None: ...

class Message:
    body: Any
    correlation_id: Any
    properties: dict[str, Any] | None
    def __init__(
        self,
        body: object = None,
        *,
        properties: dict[str, Any] | None = None,
        reply_to: str | None = None,
        correlation_id: str | None = None,
        durable: bool = False,
    ) -> None: ...
    def decode(self, data: bytes) -> None: ...
    def encode(self) -> bytes: ...
