"""Says that a user has registered, and does not know who listens. Try it: python auth.py"""

from lightbus import Lightbus

app = Lightbus("auth")


@app.event  # -> "user.registered"
class UserRegistered:
    user_id: int
    email: str


if __name__ == "__main__":
    with app:
        receipt = app.publish_sync(UserRegistered(user_id=1, email="someone@example.com"))
    print("Confirmed." if receipt.routed else "Confirmed, but nobody has ever listened: start a listener first.")
