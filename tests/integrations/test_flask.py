"""docs/examples/flask: gunicorn with forked workers, and a Lightbus worker."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.integrations.example import GUNICORN, MAIL, NO_BROKER, ORDER, SERVES, Example, place_order
from tests.patience import wait_until

OTHER = ORDER.replace("3", "4")

FORKED = '''\
"""The shop, after the parent process has published an event; each response waits for the file let-go."""

import os
import time
import uuid

from shop import create_app
from shop.bus import OrderPlaced, bus

bus.publish_sync(OrderPlaced(order_id=uuid.UUID(int=0), email="before the fork"))
app = create_app()


@app.after_request
def hold(response):
    open(f"answering-{os.getpid()}", "w").close()
    while not os.path.exists("let-go"):
        time.sleep(0.02)
    response.headers["X-Worker"] = str(os.getpid())
    return response
'''


def test_the_event_of_a_request_is_handled_by_the_worker(example: Callable[[str], Example], url: str) -> None:
    shop = example("flask")
    with (
        shop.start("worker", "shop.bus:bus", url=url) as worker,
        shop.start("--preload", "shop:create_app()", program=GUNICORN, url=url) as server,
    ):
        worker.wait_for("Ready")
        answer = place_order(server.wait_for(SERVES)[1])
        assert answer.status == 202
        worker.wait_for(MAIL)
        assert server.end(signal.SIGTERM) == 0
        assert worker.end(signal.SIGTERM) == 0


def test_the_events_of_both_workers_of_a_preloaded_gunicorn_are_confirmed(
    example: Callable[[str], Example], url: str
) -> None:
    """Each of the two requests waits for the other one, so that each process serves one."""
    shop = example("flask")
    (shop.folder / "forked.py").write_text(FORKED)
    with (
        shop.start("worker", "shop.bus:bus", url=url) as worker,
        ThreadPoolExecutor(2) as clients,
    ):
        worker.wait_for("Ready")
        with shop.start("--preload", "forked:app", program=GUNICORN, url=url) as server:
            worker.wait_for("before the fork")
            root = server.wait_for(SERVES)[1]
            waiting = [clients.submit(place_order, root, order) for order in (ORDER, OTHER)]
            wait_until(lambda: len(list(shop.folder.glob("answering-*"))) == 2, "both processes serve a request")
            (shop.folder / "let-go").touch()
            answers = [one.result() for one in waiting]
            assert server.end(signal.SIGTERM) == 0
        assert [answer.status for answer in answers] == [202, 202]
        assert len({answer.headers["X-Worker"] for answer in answers}) == 2
        wait_until(lambda: all(order in worker.output for order in (ORDER, OTHER)), "both events are handled")
    assert "Traceback" not in server.output


def test_a_missing_broker_causes_a_503_within_the_publish_timeout(example: Callable[[str], Example]) -> None:
    with example("flask").start("--preload", "shop:create_app()", program=GUNICORN, url=NO_BROKER) as server:
        answer = place_order(server.wait_for(SERVES)[1])
        assert server.end(signal.SIGTERM) == 0
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "5"


def test_the_tests_of_the_example_pass(example: Callable[[str], Example]) -> None:
    assert "2 passed" in example("flask").run_its_tests("-W", "error", "-m", "pytest", "-q", "-p", "no:asyncio")
