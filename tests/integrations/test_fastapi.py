"""docs/examples/fastapi: uvicorn and a worker, in two processes."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.integrations.example import MAIL, NO_BROKER, SERVES, UVICORN, Example, place_order


def test_the_event_of_a_request_is_handled_by_the_worker(example: Callable[[str], Example], url: str) -> None:
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


def test_without_a_broker_the_startup_fails_with_the_reason(example: Callable[[str], Example]) -> None:
    with example("fastapi").start("shop.main:api", program=UVICORN, url=NO_BROKER) as server:
        assert server.end() == 3
    assert "127.0.0.1:1" in server.output
    assert "Application startup failed" in server.output


def test_a_lost_broker_causes_a_503_within_the_publish_timeout(example: Callable[[str], Example]) -> None:
    with example("fastapi").start("--lifespan", "off", "shop.main:api", program=UVICORN, url=NO_BROKER) as server:
        answer = place_order(server.wait_for(SERVES)[1])
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "5"


def test_the_tests_of_the_example_pass(example: Callable[[str], Example]) -> None:
    assert "2 passed" in example("fastapi").run_its_tests("-W", "error", "-m", "pytest", "-q", "-p", "no:asyncio")
