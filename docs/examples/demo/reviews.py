"""Requests a review of every commit that changes more than 500 lines."""

import os

import attrs
import ledger

from lightbus import Lightbus

PREFIX = os.environ.get("DEMO_PREFIX", "")
app = Lightbus(PREFIX + "reviews")


@app.event  # published as "review.requested"
@attrs.frozen
class ReviewRequested:
    repository: str
    sha: str
    lines: int


@attrs.frozen
class Commit:
    repository: str
    sha: str
    insertions: int
    deletions: int


@app.on("commit.pushed", source=PREFIX + "forge")
async def look_at_size(commit: Commit) -> None:
    lines = commit.insertions + commit.deletions
    if lines > 500:
        await app.publish(ReviewRequested(repository=commit.repository, sha=commit.sha, lines=lines))
    ledger.enter("reviews", commit.sha, what="large" if lines > 500 else "small", lines=lines)
