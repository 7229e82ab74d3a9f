"""A worker keeps its app's contract in the catalogue, in a thread that disturbs nothing else."""

from __future__ import annotations

import logging
import os
import random
import threading

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.catalog import storage
from lightbus.catalog.contract import contract_of

logger = logging.getLogger("lightbus")

RELEASE = "LIGHTBUS_RELEASE"
"""The environment variable with the name of the deployed release."""
EVERY = 24 * 3600.0
"""Seconds between two copies: the catalogue forgets an app after 90 days, or sooner on a large bus."""
FIRST_AGAIN, LAST_AGAIN = 5.0, 600.0
"""Seconds after which a failed attempt is repeated, doubled each time."""


def announce(app: Lightbus) -> None:
    """Publish the contract now and every 24 hours, from a daemon thread. A failure is logged once, and tried again."""
    if any(address.private for address in app.broker.addresses):
        return  # nobody else can read it
    threading.Thread(target=_run, args=(app,), name="lightbus contract", daemon=True).start()


def _run(app: Lightbus) -> None:
    logged: set[str] = set()
    waiting, again = threading.Event(), FIRST_AGAIN
    while True:
        pause, again = again, min(2 * again, LAST_AGAIN)
        try:
            storage.publish(app.broker, contract_of(app, os.environ.get(RELEASE, "")))
        except errors.LightbusError as error:
            text = f"The contract of app {app.name!r} is not in the catalogue of the bus: {error}"
            logger.log(logging.DEBUG if text in logged else logging.INFO, "%s", text)
            logged.add(text)
        except Exception as error:  # a fault of Lightbus must not end the worker, or be repeated in its log
            text = repr(error)
            level = logging.DEBUG if text in logged else logging.WARNING
            logger.log(level, "The contract of app %r could not be published.", app.name, exc_info=True)
            logged.add(text)
        else:
            logger.debug("The contract of app %r is published.", app.name)
            pause, again = EVERY, FIRST_AGAIN
        waiting.wait(pause * random.uniform(0.9, 1.0))
