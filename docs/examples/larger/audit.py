"""Another app: it handles the events of all apps. Start its worker: lightbus worker audit:app"""

from typing import Any

from lightbus import Lightbus, Message

app = Lightbus("audit")


@app.on("#")
async def note(event: dict[str, Any], message: Message) -> None:
    print(f"audit: {message.event} from {message.source}", flush=True)
