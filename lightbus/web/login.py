"""The page where a reader enters the token."""

from __future__ import annotations

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from lightbus.web import security
from lightbus.web.frame import Frame, first, form_of

PAUSE = 0.5
"""Seconds until a wrong token is answered."""


class Login:
    """A form, and the cookie that it sets."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    async def page(self, request: Request) -> Response:
        problem = ""
        if request.method == "POST":
            form = await form_of(request)
            if not security.is_own_origin(request.headers):
                raise HTTPException(403, "This form is not from this page. Open the page again.")
            if self.frame.guard.is_token(first(form, "token").strip()):
                response: Response = RedirectResponse("/", 303)
                security.set_cookie(
                    response,
                    security.SESSION,
                    self.frame.guard.session(),
                    secure=request.url.scheme == "https",
                    seconds=security.HOURS * 3600,
                )
                return response
            await anyio.sleep(PAUSE)
            problem = "This is not the token."
        elif self.frame.guard.token is None or self.frame.guard.knows(request.headers):
            return RedirectResponse("/", 303)
        return self.frame.page(request, "login.html", problem=problem, status=401 if problem else 200)
