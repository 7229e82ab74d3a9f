"""Records when the first event was handled, on the monotonic clock that all processes share."""

import os
import time

URL = os.environ["BENCH_URL"]
NAME = os.environ["BENCH_NAME"]


def handled(number: int) -> None:
    now = time.monotonic()
    with open(os.environ["BENCH_OUT"], "a") as out:
        out.write(f"{now} {number}\n")
