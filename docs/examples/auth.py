"""Publishes an event when a user registers. Try it: python auth.py"""

import attrs

from lightbus import Lightbus

app = Lightbus("auth")


@app.event  # published as "user.registered"
@attrs.frozen
class UserRegistered:
    user_id: int
    email: str


if __name__ == "__main__":
    with app:
        receipt = app.publish_sync(UserRegistered(user_id=1, email="someone@example.com"))
    print("Confirmed." if receipt.routed else "Confirmed, but not routed: start the worker first.")
