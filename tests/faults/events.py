"""The event of the fault tests, and the app that publishes it."""

from __future__ import annotations

from typing import Any

import attrs

from lightbus import Lightbus


@attrs.frozen(kw_only=True)
class ThingHappened:
    id: str
    do: str = ""
    """What the handler does with it; see handlers.py."""


def shop(url: str | list[str], **options: Any) -> Lightbus:
    app = Lightbus("shop", url=url, **options)
    app.event(ThingHappened)
    return app
