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
    """Runs around each worker. Open here what handlers share (a pool, a client), and close it after the yield."""
    yield


app = Lightbus("{{ cookiecutter.__slug }}", concurrency=settings.concurrency, lifespan=lifespan)


@app.event("{{ cookiecutter.event }}")
@attrs.frozen(kw_only=True)
class {{ cookiecutter.__event_class }}:
    """TODO: document when this event is published and what its fields mean."""

    id: str


@attrs.frozen
class {{ cookiecutter.__hears_class }}:
    """The fields of {{ cookiecutter.hears }} that this service reads. It ignores all others."""

    id: str


@app.on("{{ cookiecutter.hears }}")
async def {{ cookiecutter.__handler }}(event: {{ cookiecutter.__hears_class }}) -> None:
    # An event may arrive twice. If that matters, also take `message: Message`: message.id is the same both times.
    await app.publish({{ cookiecutter.__event_class }}(id=event.id))
    # Log the id, not the event: other fields may hold personal data or secrets.
    log.info("handled {{ cookiecutter.hears }} %s", event.id)
