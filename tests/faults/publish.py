"""A publisher process: `python -m tests.faults.publish URL LEDGER ...`. It stops gracefully on SIGTERM.

It records each error, and continues with the next event.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio

from lightbus import Lightbus, Receipt, errors
from tests.faults.events import ThingHappened, shop
from tests.faults.ledger import CONFIRMED, FAILED, TRIED, UNROUTED, Ledger


class TooSlow(TimeoutError):
    pass


class Publisher:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ledger = Ledger(Path(options.ledger))
        self.app: Lightbus = shop(options.url.split(";"), publish_timeout=options.timeout)
        self.numbers = itertools.count(1)
        self.stopping = False

    def next_event(self) -> ThingHappened | None:
        number = next(self.numbers)
        if self.stopping or (self.options.count and number > self.options.count):
            return None
        event = ThingHappened(id=f"{self.options.prefix}-{number}")
        self.ledger.write(TRIED, event.id)
        return event

    def note(self, event: ThingHappened, receipt: Receipt) -> None:
        self.ledger.write(CONFIRMED if receipt.routed else UNROUTED, event.id)

    def note_error(self, event: ThingHappened, error: errors.PublishError) -> None:
        self.ledger.write(FAILED, event.id, type(error).__name__)

    async def publish_in_tasks(self) -> None:
        pause = self.options.tasks / self.options.rate

        async def publish() -> None:
            while True:
                while self.ledger.is_paused() and not self.stopping:  # noqa: ASYNC110 - another process decides
                    await anyio.sleep(0.02)
                event = self.next_event()
                if event is None:
                    return
                try:
                    self.note(event, await self.app.publish(event))
                except errors.PublishError as error:
                    self.note_error(event, error)
                await anyio.sleep(pause)

        async with anyio.create_task_group() as tasks:
            for _ in range(self.options.tasks):
                tasks.start_soon(publish)

    def publish_in_threads(self) -> None:
        pause = self.options.threads / self.options.rate

        def publish() -> None:
            while (event := self.next_event()) is not None:
                self.publish_sync(event)
                time.sleep(pause)

        with ThreadPoolExecutor(self.options.threads) as threads:
            for done in [threads.submit(publish) for _ in range(self.options.threads)]:
                done.result()

    def publish_sync(self, event: ThingHappened) -> None:
        try:
            self.note(event, self.app.publish_sync(event))
        except errors.PublishError as error:
            self.note_error(event, error)

    def publish_in_forks(self) -> None:
        """Like a pre-forking server: the parent publishes, then its children publish."""
        parent = self.options.prefix
        event = self.next_event()
        assert event is not None
        self.publish_sync(event)
        children = []
        for child in range(self.options.forks):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    self.options.prefix = f"{parent}.child{child}"
                    self.numbers = itertools.count(1)
                    self.publish_in_threads()
                    status = 0
                finally:
                    os._exit(status)
            children.append(pid)
        self.publish_in_threads()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert codes == [0] * len(codes), codes

    def publish_with_alarms(self) -> None:
        """Like a task with a time limit: a signal handler raises a TimeoutError at any point of a publish."""
        raised = caught = 0

        def too_slow(_number: int, _frame: object) -> None:
            nonlocal raised
            raised += 1
            raise TooSlow

        self.app.publisher.open(self.options.timeout)  # imports now: an interrupted import is not tested here
        signal.signal(signal.SIGALRM, too_slow)
        while caught < self.options.alarms:
            event = self.next_event()
            assert event is not None
            try:
                try:
                    # About the time of one publish on an idle machine.
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00005, 0.001))
                    receipt = self.app.publish_sync(event)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except TooSlow:
                caught += 1
                self.ledger.write(FAILED, event.id, "TooSlow")
            else:
                self.note(event, receipt)
        self.publish_sync(self.next_event() or ThingHappened(id="none"))  # it can still publish
        print(f"{raised} alarms, {raised - caught} exceptions lost")

    def publish_at_exit(self) -> None:
        """The main thread ends while another thread publishes."""
        begun = threading.Event()

        def publish() -> None:
            while (event := self.next_event()) is not None:
                self.publish_sync(event)
                begun.set()

        threading.Thread(target=publish).start()
        begun.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("ledger")
    parser.add_argument("--prefix", default="p")
    parser.add_argument("--rate", type=float, default=100.0, help="maximum events/s")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--forks", type=int, default=0)
    parser.add_argument("--at-exit", action="store_true")
    parser.add_argument("--alarms", type=int, default=0, help="number of publishes to interrupt")
    parser.add_argument("--count", type=int, default=0, help="stop after this number of events; otherwise on SIGTERM")
    parser.add_argument("--timeout", type=float, default=10.0)
    publisher = Publisher(parser.parse_args())

    def stop(_number: int, _frame: object) -> None:
        publisher.stopping = True

    signal.signal(signal.SIGTERM, stop)
    if publisher.options.alarms:
        publisher.publish_with_alarms()
    elif publisher.options.at_exit:
        publisher.publish_at_exit()
    elif publisher.options.forks:
        publisher.publish_in_forks()
    elif publisher.options.threads:
        publisher.publish_in_threads()
    else:
        anyio.run(publisher.publish_in_tasks)


if __name__ == "__main__":
    main()
