"""Places orders until SIGTERM: `python -m tests.faults.place`. Small and large transactions; some are rolled back.

It records each order before its transaction (tried), and after the commit (placed) or the rollback (rolled-back). If
the commit fails, the outcome is unknown: the table of orders shows it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import time
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from tests.faults.ledger import HANDLED, PLACED, ROLLED_BACK, SKIPPED, TRIED, Ledger
from tests.faults.orders import Order, OrderPlaced, open_engine, patch_clock, shop


class Undo(Exception):
    """Rolls a transaction back."""


class Placer:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ledger = Ledger(Path(os.environ["FAULTS_LEDGER"]))
        engine = open_engine(asynchronous=False)
        assert isinstance(engine, sa.Engine)
        self.engine = engine
        _, self.outbox = shop()
        self.numbers = itertools.count(1)
        self.chance = random.Random(options.prefix)
        self.stopping = False

    def run(self) -> None:
        placed = 0
        while not self.stopping and not (self.options.count and placed >= self.options.count):
            if self.options.ahead and self.ahead() > self.options.ahead:
                time.sleep(0.01)
                continue
            try:
                placed += self.transaction()
            except DBAPIError as error:
                print(f"unknown outcome: {error.orig!r}", flush=True)
                time.sleep(0.1)

    def ahead(self) -> int:
        """About how many orders have no invoice yet."""
        placed, handled, skipped = (len(self.ledger.entries(kind)) for kind in (PLACED, HANDLED, SKIPPED))
        return placed - handled - skipped

    def transaction(self) -> int:
        """Returns how many orders it has placed."""
        chance = self.chance
        size = chance.choices((chance.randint(1, 3), chance.randint(10, 40), 200), (70, 25, 5))[0]
        ids = [f"{self.options.prefix}-{next(self.numbers)}" for _ in range(size)]
        undone: list[str] = []
        for id in ids:
            self.ledger.write(TRIED, id)
        try:
            with Session(self.engine) as session, session.begin():
                for id in ids:
                    match chance.choices(("plain", "kept", "undone"), self.options.savepoints)[0]:
                        case "plain":
                            self.place(session, id)
                        case "kept":
                            with session.begin_nested():
                                self.place(session, id)
                        case _:
                            with session.begin_nested() as savepoint:
                                self.place(session, id)
                                session.flush()
                                savepoint.rollback()
                            undone.append(id)
                session.flush()
                if chance.random() < self.options.rollbacks:
                    raise Undo
        except Undo:
            undone, placed = ids, []
        else:
            placed = [id for id in ids if id not in undone]
        for id in placed:
            self.ledger.write(PLACED, id)
        for id in undone:
            self.ledger.write(ROLLED_BACK, id)
        return len(placed)

    def place(self, session: Session, id: str) -> None:
        do = self.options.do if self.chance.random() < self.options.share else ""
        session.add(Order(id=id, do=do))
        self.outbox.add(session, OrderPlaced(order_id=id, do=do), id=id)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prefix", default="o")
    parser.add_argument("--count", type=int, default=0, help="stop after this number of orders; otherwise on SIGTERM")
    parser.add_argument("--ahead", type=int, default=0, help="wait while this number of orders have no invoice")
    parser.add_argument("--rollbacks", type=float, default=0.15, help="share of the transactions")
    parser.add_argument("--savepoints", type=float, nargs=3, default=(90, 5, 5), help="weights: none, kept, undone")
    parser.add_argument("--do", default="", help="what handlers do with a share of the orders")
    parser.add_argument("--share", type=float, default=0.0)
    placer = Placer(parser.parse_args())

    def stop(_number: int, _frame: object) -> None:
        placer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    placer.run()


if __name__ == "__main__":
    patch_clock()
    main()
