"""Dependencies of dependencies, for async handlers. Try it: lightbus worker tenants:app"""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from lightbus import Depends, Lightbus, Message, Reject

app = Lightbus("mails")


def tenant_of(message: Message) -> str:
    tenant = message.headers.get("tenant")
    if not isinstance(tenant, str):
        raise Reject("the event has no header `tenant`")
    return tenant


Tenant = Annotated[str, Depends(tenant_of)]


class Mailer:
    def __init__(self, tenant: Tenant) -> None:
        self.sender = f"hello@{tenant}.example.com"
        self.outbox: list[str] = []

    async def send(self, to: str, text: str) -> None:
        self.outbox.append(f"{self.sender} to {to}: {text}")

    async def flush(self) -> None:
        for mail in self.outbox:
            print(mail, flush=True)


async def open_mailer(mailer: Annotated[Mailer, Depends(Mailer)]) -> AsyncIterator[Mailer]:
    yield mailer
    await mailer.flush()  # only if the handler has not raised


@app.on("user.registered")
async def greet(user: dict[str, Any], mailer: Annotated[Mailer, Depends(open_mailer)], tenant: Tenant) -> None:
    await mailer.send(user["email"], f"Welcome to {tenant}!")
