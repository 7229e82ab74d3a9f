"""The fixtures of the conformance suite: bad input is met on every broker too."""

from tests.conformance.conftest import anyio_backend, billing, make_app, make_rabbitmq_app, shop

__all__ = ["anyio_backend", "billing", "make_app", "make_rabbitmq_app", "shop"]
