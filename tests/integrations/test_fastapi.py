"""docs/examples/fastapi: uvicorn and a worker, two processes."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.integrations.example import MAIL, NOBODY, SERVES, UVICORN, Example, place_order


def test_what_a_request_publishes_is_handled_by_the_worker_beside(example: Callable[[str], Example], url: str) -> None:
    shop = example("fastapi")
    with (
        shop.start("worker", "shop.bus:bus", url=url) as worker,
        shop.start("shop.main:api", program=UVICORN, url=url) as server,
    ):
        worker.wait_for("Ready")
        answer = place_order(server.wait_for(SERVES)[1])
        assert answer.status == 202
        assert list(answer.body) == ["event"]
        worker.wait_for(MAIL)
        server.signal(signal.SIGTERM)
        server.wait_for("Application shutdown complete")
        server.end()
        assert worker.end(signal.SIGTERM) == 0
    assert "Traceback" not in server.output


def test_without_a_broker_the_start_fails_and_says_why(example: Callable[[str], Example]) -> None:
    with example("fastapi").start("shop.main:api", program=UVICORN, url=NOBODY) as server:
        assert server.end() == 3
    assert "127.0.0.1:1" in server.output
    assert "Application startup failed" in server.output


def test_a_broker_that_has_gone_is_a_503_within_the_publish_timeout(example: Callable[[str], Example]) -> None:
    with example("fastapi").start("--lifespan", "off", "shop.main:api", program=UVICORN, url=NOBODY) as server:
        answer = place_order(server.wait_for(SERVES)[1])
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "5"


def test_its_own_tests_pass(example: Callable[[str], Example]) -> None:
    assert "2 passed" in example("fastapi").own_tests_pass("-W", "error", "-m", "pytest", "-q", "-p", "no:asyncio")
