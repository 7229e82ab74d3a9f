"""Publishes an event for each user in a CSV file. Try it: python import_users.py users.csv"""

import csv
import sys

import attrs

from lightbus import Lightbus
from lightbus.errors import PublishManyError

app = Lightbus("importer", publish_timeout=5)  # seconds


@app.event  # published as "user.imported"
@attrs.frozen
class UserImported:
    user_id: int
    email: str


def main(path: str) -> int:
    with open(path, newline="") as file:
        users = [UserImported(user_id=int(row["user_id"]), email=row["email"]) for row in csv.DictReader(file)]
    with app:  # connects at once, or raises; at the end, waits for unconfirmed publishes
        try:
            app.publish_many_sync(users)
        except PublishManyError as error:
            for user, outcome in zip(users, error.outcomes, strict=True):
                if isinstance(outcome, Exception):
                    print(f"{user.user_id}: {outcome}", file=sys.stderr)
            return 1
    print(f"{len(users)} users: all confirmed by the broker.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
