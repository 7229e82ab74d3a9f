"""What this service says and hears. Start it: lightbus worker {{ cookiecutter.__module }}.bus:app"""

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
    """A worker's life: open here what handlers share (a pool, a client), and close it after the yield."""
    log.info("%s", settings)
    yield


app = Lightbus("{{ cookiecutter.__slug }}", concurrency=settings.concurrency, lifespan=lifespan)


@app.event("{{ cookiecutter.event }}")
@attrs.frozen(kw_only=True)
class {{ cookiecutter.__event_class }}:
    """Tell whoever hears it when it is said, and what its fields mean."""

    id: str


@attrs.frozen
class {{ cookiecutter.__hears_class }}:
    """What is read of {{ cookiecutter.hears }}; its other fields are ignored."""

    id: str


@app.on("{{ cookiecutter.hears }}")
async def {{ cookiecutter.__handler }}(heard: {{ cookiecutter.__hears_class }}) -> None:
    # An event may come twice. Where that would hurt, take `message: Message` too: message.id is the same then.
    log.info("heard %s", heard)
    await app.publish({{ cookiecutter.__event_class }}(id=heard.id))
