"""The result of one check of `lightbus doctor`."""

from __future__ import annotations

from typing import Literal

import attrs

Level = Literal["ok", "note", "warn", "fail"]


@attrs.frozen
class Finding:
    """The result of one check."""

    level: Level
    subject: str
    text: str
    step: str = ""
    """What to do next."""
