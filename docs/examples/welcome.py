"""Welcomes each new user. Try it: lightbus worker welcome:app"""

import attrs

from lightbus import Lightbus, Message

app = Lightbus("welcome")


@attrs.frozen
class NewUser:  # this app's view of the event: only the fields that it needs
    email: str


@app.on("user.registered")
async def greet(user: NewUser, message: Message) -> None:
    print(f"Welcome, {user.email}! ({message.event} from {message.source})", flush=True)
