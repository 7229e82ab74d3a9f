"""Two apps on one bus, with anyio's plugin, on asyncio and trio. Try it: pytest test_two_apps.py"""

import auth
import pytest
import welcome

from lightbus.testing import TestBus


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.anyio
async def test_a_new_user_is_greeted() -> None:
    async with TestBus(auth.app, welcome.app) as bus:
        await auth.app.publish(auth.UserRegistered(user_id=1, email="someone@example.com"))
        await bus.drain()
        [greeted] = bus.handled(welcome.greet)
        assert greeted.payload == welcome.NewUser(email="someone@example.com")
        assert greeted.message.source == "auth"
