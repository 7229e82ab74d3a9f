"""The fixtures of the conformance suite: these tests also run on every broker."""

from tests.conformance.conftest import anyio_backend, billing, make_app, make_rabbitmq_app, shop

__all__ = ["anyio_backend", "billing", "make_app", "make_rabbitmq_app", "shop"]
