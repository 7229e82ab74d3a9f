"""What runs in a worker beside its handlers: the outbox's relay, the inbox's sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import anyio


class Service(Protocol):
    """Add it to `app.services`. A worker runs it in its event loop, within the app's lifespan."""

    name: str
    """For logs and `/readyz`."""

    async def run(self, stopping: anyio.Event) -> None:
        """Run until `stopping` is set, then finish within a few seconds: the worker cancels what takes longer.

        What it raises ends the worker. So handle what may pass, such as a database that does not answer.
        """
        ...

    def health(self) -> Mapping[str, Any]:
        """For the report of `/readyz`, under its name: plain values. Called in any thread; must not block."""
        ...
