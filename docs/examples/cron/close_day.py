"""Publishes the end of a day, from cron. Try it: python close_day.py 2026-05-04; echo $?"""

import os
import sys
from datetime import UTC, date, datetime, timedelta

import attrs

from lightbus import Lightbus
from lightbus.errors import PublishError

app = Lightbus("accounting")


@app.event  # published as "day.closed"
@attrs.frozen
class DayClosed:
    day: date


def main(arguments: list[str]) -> int:
    # Subscribers deduplicate by the day, not by the event's id: running the job twice changes nothing.
    day = date.fromisoformat(arguments[0]) if arguments else (datetime.now(UTC) - timedelta(days=1)).date()
    try:
        receipt = app.publish_sync(DayClosed(day=day), timeout=5)  # seconds; the crontab retries
    except PublishError as error:
        print(f"close_day {day}: {error}", file=sys.stderr)  # cron sends this as mail
        return os.EX_TEMPFAIL  # 75: a temporary failure
    if not receipt.routed:
        print(f"close_day {day}: confirmed, but not routed: no queue is bound.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
