"""Says that a day is over, from cron. Try it: python close_day.py 2026-05-04; echo $?"""

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
    # A listener keeps the day, not the event's id: a run by hand, or a second one after a timeout, changes nothing.
    day = date.fromisoformat(arguments[0]) if arguments else (datetime.now(UTC) - timedelta(days=1)).date()
    try:
        receipt = app.publish_sync(DayClosed(day=day), timeout=5)  # seconds; crontab comes back to it
    except PublishError as error:
        print(f"close_day {day}: {error}", file=sys.stderr)  # cron mails what a job prints
        return os.EX_TEMPFAIL  # 75: it may work the next time
    if not receipt.routed:
        print(f"close_day {day}: confirmed, but nobody has ever listened.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
