"""Counts commits and changed lines for each repository."""

import os

import attrs
import ledger

from lightbus import Lightbus

PREFIX = os.environ.get("DEMO_PREFIX", "")
app = Lightbus(PREFIX + "stats")


@attrs.frozen
class Commit:  # this app's view of the event: only the fields that it needs
    repository: str
    sha: str
    insertions: int
    deletions: int


@app.on("commit.pushed", source=PREFIX + "forge")
async def count(commit: Commit) -> None:
    ledger.enter("stats", commit.sha, what=commit.repository, lines=commit.insertions + commit.deletions)
