"""Tests of mails.py without an event loop. Try it: pytest test_mails.py"""

from collections.abc import Iterator

import mails
import pytest

from lightbus.testing import TestBus

USER = {"email": "someone@example.com"}


@pytest.fixture
def bus() -> Iterator[TestBus]:
    with TestBus(mails.app) as bus:
        yield bus


def test_a_new_user_gets_one_mail(bus: TestBus, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(mails, "send", lambda to, text: sent.append(to))
    bus.publish_sync("user.registered", USER, source="auth")
    bus.drain_sync()
    assert sent == ["someone@example.com"]


def test_mail_is_sent_at_the_third_attempt(bus: TestBus, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [ConnectionRefusedError(), ConnectionRefusedError(), None]

    def send(to: str, text: str) -> None:
        if (error := answers.pop(0)) is not None:
            raise error

    monkeypatch.setattr(mails, "send", send)
    bus.publish_sync("user.registered", USER, source="auth")
    bus.drain_sync()  # includes the retries after 5 and 60 seconds, without waiting
    assert [one.attempt for one in bus.failed("welcome")] == [1, 2]
    assert [one.attempt for one in bus.handled("welcome")] == [3]


def test_mail_that_always_fails_becomes_a_dead_letter(bus: TestBus, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(to: str, text: str) -> None:
        raise ConnectionRefusedError("no mail server")

    monkeypatch.setattr(mails, "send", send)
    bus.publish_sync("user.registered", USER, source="auth")
    bus.drain_sync()
    [dead] = bus.dead("welcome")
    assert dead.attempt == 4
    assert dead.error == "ConnectionRefusedError: no mail server"
