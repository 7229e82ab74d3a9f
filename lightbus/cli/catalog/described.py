"""A catalogue as JSON: a snapshot for --from, and what can be derived from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from lightbus.catalog.catalog import Subscriber
    from lightbus.catalog.contract import Contract
    from lightbus.cli.catalog.reading import Reading


def described(reading: Reading) -> dict[str, Any]:
    """Keys of a snapshot, and `apps`, `events` and `notices`."""
    from lightbus.catalog import catalog
    from lightbus.catalog.notices import notices

    return {
        **catalog.to_json(reading.catalog),
        "apps": [_app(reading, one) for one in reading.catalog.contracts],
        "events": [
            {
                "event": event.name,
                "app": contract.app,
                "version": event.version,
                "handlers": [one.name for one in reading.catalog.subscribers(event.name, contract.app)],
            }
            for contract, event in reading.catalog.events()
        ],
        "notices": [attrs.asdict(one) for one in notices(reading.catalog)],
    }


def _app(reading: Reading, contract: Contract) -> dict[str, Any]:
    found: dict[str, Any] = {"app": contract.app, "release": contract.release}
    if reading.live is not None:
        found["consumers"] = reading.live.consumers(contract)
        found["waiting"] = reading.live.waiting(contract)
        found["dead_letters"] = reading.live.dead(contract)
    return found


def queue_state(reading: Reading, one: Subscriber) -> dict[str, Any] | None:
    """The live state of a handler's queue; None if it is unknown."""
    state = None if reading.live is None else reading.live.queue(one.listener.queue)
    return None if state is None else {"exists": state.exists, "consumers": state.consumers, "waiting": state.ready}
