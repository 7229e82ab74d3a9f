"""Ends this process as `kill -9` does, once at each named place."""

import os
import signal
from pathlib import Path

from lightbus.outbox import sweep

sweep.FIRST_SWEEP = sweep.SWEEP  # its commit is not one of the named places


def once(place: str) -> None:
    try:
        Path(os.environ["CRASHES"], place).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
