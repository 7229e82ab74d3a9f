"""A catalogue as a Mermaid flowchart: apps, their events, and the apps that handle them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightbus.cli.catalog import overview
from lightbus.cli.mermaid import label

if TYPE_CHECKING:
    from lightbus.cli.catalog.reading import Reading


def flowchart(reading: Reading) -> str:
    """Apps are boxes, events are round. A dotted line: no worker consumes the queues of these handlers."""
    return "\n".join(["flowchart LR", *(f"  {line}" for line in _lines(reading))])


def _lines(reading: Reading) -> Iterator[str]:
    catalog = reading.catalog
    apps = {one.app: f"app{number}" for number, one in enumerate(catalog.contracts)}
    for app, name in apps.items():
        yield f"{name}[{label(app)}]"
    for number, (contract, event) in enumerate(catalog.events()):
        yield f"event{number}([{label(event.name)}])"
        yield f"{apps[contract.app]} --> event{number}"
        down: dict[str, bool] = {}
        for one in catalog.subscribers(event.name, contract.app):
            name = apps[one.contract.app]
            down[name] = down.get(name, True) and overview.is_down(reading, one)
        for name, is_down in down.items():
            yield f"event{number} {'-.->' if is_down else '-->'} {name}"
