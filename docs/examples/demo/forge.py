"""Hosts repositories: publishes `commit.pushed` for each commit."""

import os
import sys
from datetime import datetime
from itertools import islice

import attrs
import msgspec

from lightbus import Lightbus

PREFIX = os.environ.get("DEMO_PREFIX", "")  # separates demos that share a broker
app = Lightbus(PREFIX + "forge")


@app.event  # published as "commit.pushed"
@attrs.frozen
class CommitPushed:
    repository: str
    sha: str
    committed_at: datetime
    files: int
    insertions: int
    deletions: int


if __name__ == "__main__":  # python forge.py [BATCH] < commits.jsonl
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    commits = (msgspec.json.decode(line, type=CommitPushed) for line in sys.stdin.buffer)
    with app:
        while some := list(islice(commits, batch)):
            app.publish_many_sync(some)  # returns once the broker has confirmed all of them
            print(len(some), flush=True)
