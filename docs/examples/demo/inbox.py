"""Delivers review requests through a mail server that fails on purpose."""

import os

import attrs
import ledger

from lightbus import Lightbus, Message, Retry

PREFIX = os.environ.get("DEMO_PREFIX", "")
app = Lightbus(PREFIX + "inbox", retry=Retry(delays=(1, 2)))  # three attempts, then a dead letter


@attrs.frozen
class Request:
    sha: str
    lines: int


class MailServerBusy(Exception):
    """A temporary failure: a retry succeeds."""


class MailTooLong(Exception):
    """A permanent failure: every retry fails, too."""


@app.on("review.requested", source=PREFIX + "reviews")
async def deliver(request: Request, message: Message) -> None:
    ledger.enter("inbox", request.sha, what=f"attempt {message.attempt}", lines=request.lines)
    if request.lines > 3_000:
        raise MailTooLong(f"{request.lines:,} lines")
    if request.lines % 5 == 0 and message.attempt == 1:
        raise MailServerBusy("try later")
    ledger.enter("inbox", request.sha, what="delivered", lines=request.lines)
