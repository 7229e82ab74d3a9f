"""The app of handlers.py with metrics between two observers: `lightbus worker tests.faults.counted:app --metrics`.

An observer is called right before the metrics count an outcome, and one right after. Each writes a line. So at any
moment, also that of a `kill -9`, the counters are between the numbers of lines of both: equal to them, except for the
one outcome of a killed process that lay between the two.
"""

from __future__ import annotations

import os

from lightbus import Outcome
from lightbus.telemetry.prometheus import Metrics
from tests.faults.handlers import app as app
from tests.faults.handlers import ledger
from tests.faults.ledger import COUNTED, COUNTING


@app.observe
def before(outcome: Outcome) -> None:
    ledger.write(COUNTING, outcome.message.id, outcome.kind, os.getpid())


Metrics(app)


@app.observe
def after(outcome: Outcome) -> None:
    ledger.write(COUNTED, outcome.message.id, outcome.kind, os.getpid())
