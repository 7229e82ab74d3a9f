"""What differs between a laptop, a test and production: read from the environment, once.

The broker, LIGHTBUS_URL, is read by Lightbus itself.
"""

import os
from collections.abc import Mapping
from typing import Self

import attrs


@attrs.frozen
class Settings:
    concurrency: int
    """{{ cookiecutter.__prefix }}_CONCURRENCY: handlers that run at once, in each worker process."""

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """
        Raises:
            ValueError: a variable cannot be read; names it.
        """
        return cls(
            concurrency=_number(environment, "{{ cookiecutter.__prefix }}_CONCURRENCY", default=32),
        )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    given = environment.get(name, str(default))
    if not given.isdecimal():
        raise ValueError(f"{name}={given!r}: use a whole number, such as {default}.")
    return int(given)
