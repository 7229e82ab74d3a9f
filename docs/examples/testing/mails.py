"""Welcomes new users by mail."""

import smtplib

import attrs

from lightbus import Lightbus, Retry

app = Lightbus("mails", retry=Retry(delays=(5, 60, 600)))


@attrs.frozen
class NewUser:
    email: str


def send(to: str, text: str) -> None:
    with smtplib.SMTP("localhost") as server:
        server.sendmail("shop@example.com", to, text)


@app.on("user.registered")
def welcome(user: NewUser) -> None:
    send(user.email, "Welcome!")
