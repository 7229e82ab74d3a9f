"""An app's topology as a Mermaid flowchart, which GitHub, GitLab and many wikis render."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightbus.cli import tables

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.inspection.states import ObjectState, States
    from lightbus.wire.topology import Queue


def flowchart(app: Lightbus, states: States | None = None) -> str:
    """Exchanges are round, queues are cylinders (one for all retry queues of a queue), handlers are boxes. Dotted lines
    are for events that were not handled: a delay is over, a limit is reached, or the handler has failed.
    """
    return "\n".join(["flowchart LR", *(f"  {line}" for line in _lines(app, states))])


def _lines(app: Lightbus, states: States | None) -> Iterator[str]:
    from lightbus.wire.topology import internal_name, queue_name

    wanted = app.topology()
    exchanges = {one.name: f"exchange{number}" for number, one in enumerate((*wanted.shared, *wanted.exchanges))}
    for exchange in (*wanted.shared, *wanted.exchanges):
        kind = f"{exchange.type}{', internal' if exchange.internal else ''}"
        found = None if states is None else states.exchanges[exchange.name]
        yield f"{exchanges[exchange.name]}([{label(exchange.name, kind, _state(found))}])"
    schedules: dict[str, list[Queue]] = {}
    for queue in wanted.queues:
        key = queue.arguments.get("x-dead-letter-routing-key", "")
        schedules.setdefault(key if "x-message-ttl" in queue.arguments else queue.name, []).append(queue)
    cylinders: dict[str, str] = {}
    for number, schedule in enumerate(schedules.values()):
        cylinders |= dict.fromkeys((queue.name for queue in schedule), f"queue{number}")
        yield f"queue{number}[({label(*(_queue(queue, states) for queue in schedule))})]"
    for number, handler in enumerate(app.handlers.values()):
        yield f"handler{number}[{label(handler.name)}]"
    keys: dict[tuple[str, str], list[str]] = {}
    for binding in wanted.bindings:
        destination = (cylinders if binding.to_queue else exchanges)[binding.destination]
        keys.setdefault((exchanges[binding.source], destination), []).append(binding.key)
    for (source, destination), several in keys.items():
        yield f"{source} -- {label(*several)} --> {destination}"
    for number, handler in enumerate(app.handlers.values()):
        yield f"{cylinders[queue_name(app.name, handler.queue)]} --> handler{number}"
        yield f"handler{number} -. {label('fails')} .-> {exchanges[internal_name(app.name)]}"
    for number, schedule in enumerate(schedules.values()):
        onward = schedule[0].arguments.get("x-dead-letter-exchange")
        if onward is not None:
            yield f"queue{number} -. {label(_when(schedule))} .-> {exchanges[onward]}"


def _queue(queue: Queue, states: States | None) -> str:
    state = _state(None if states is None else states.queues[queue.name], queue=True)
    return f"{queue.name}: {state}" if state else queue.name


def _when(schedule: list[Queue]) -> str:
    """When the broker moves a message out of a queue."""
    match schedule[0].arguments:
        case {"x-message-ttl": _}:
            return "after " + ", ".join(f"{one.arguments['x-message-ttl'] / 1000:g}" for one in schedule) + " s"
        case {"x-delivery-limit": int(limit)}:
            return f"after {limit} deliveries"
        case _:
            return "rejected"


def _state(state: ObjectState | None, *, queue: bool = False) -> str:
    if state is None:
        return ""
    if not state.exists:
        return "missing"
    return ", ".join([*([f"{state.ready:,} ready"] if queue else []), *(["differs"] if state.difference else [])])


def label(*lines: str) -> str:
    """The lines in quotes, with entities for characters of Mermaid's syntax."""
    cleaned = (
        tables.printable(line).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;") for line in lines
    )
    return f'"{"<br/>".join(line for line in cleaned if line)}"'
