"""What this service publishes and handles. Run it: lightbus worker {{ cookiecutter.__module }}.bus:app"""

import contextlib
import logging
from collections.abc import AsyncIterator

import attrs
from lightbus import Lightbus

from {{ cookiecutter.__module }}.settings import Settings

log = logging.getLogger(__name__)
settings = Settings.read()


@contextlib.asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncIterator[None]:
    """Runs around each worker. Open what handlers share (a pool, a client) before the yield, and close it after."""
    yield


app = Lightbus("{{ cookiecutter.__slug }}", concurrency=settings.concurrency, lifespan=lifespan)


@app.event("{{ cookiecutter.event }}")
@attrs.frozen(kw_only=True)
class {{ cookiecutter.__event_class }}:
    """TODO: document when this event is published and what its fields mean."""

    id: str


@attrs.frozen
class {{ cookiecutter.__consumed_class }}:
    """The fields of {{ cookiecutter.consumes }} that this service reads. It ignores all others."""

    id: str


@app.on("{{ cookiecutter.consumes }}")
async def {{ cookiecutter.__handler }}(event: {{ cookiecutter.__consumed_class }}) -> None:
    # An event may arrive twice. To detect this, add a parameter `message: Message`: message.id is the same both times.
    await app.publish({{ cookiecutter.__event_class }}(id=event.id))
    # Log the id, not the event: other fields may hold personal data or secrets.
    log.info("handled {{ cookiecutter.consumes }} %s", event.id)
