"""Welcomes whoever registers anywhere. Try it: lightbus worker welcome:app"""

import attrs

from lightbus import Lightbus, Message

app = Lightbus("welcome")


@attrs.frozen
class NewUser:  # this app's own view of somebody else's event: the fields that it needs, no others
    email: str


@app.on("user.registered")
async def greet(user: NewUser, message: Message) -> None:
    print(f"Welcome, {user.email}! ({message.event} from {message.source})", flush=True)
