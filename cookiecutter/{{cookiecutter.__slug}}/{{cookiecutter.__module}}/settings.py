"""Settings from the environment, read once at the start.

Lightbus itself reads LIGHTBUS_URL (the broker).
"""

import os
from collections.abc import Mapping
from typing import Self

import attrs


@attrs.frozen
class Settings:
    """Declare a secret as `attrs.field(repr=False)`, so that no log shows it. A test checks that."""

    concurrency: int
    """{{ cookiecutter.__prefix }}_CONCURRENCY: handlers that run at once, in each worker process."""

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """
        Raises:
            ValueError: a variable has an invalid value. The message names the variable.
        """
        return cls(
            concurrency=_number(environment, "{{ cookiecutter.__prefix }}_CONCURRENCY", default=32),
        )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    given = environment.get(name, str(default))
    if not given.isdecimal():
        raise ValueError(f"{name}={given!r}: use a whole number, such as {default}.")
    return int(given)
