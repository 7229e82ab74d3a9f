"""Who may read the pages and use their actions.

- A browser sends the name that a page was opened with in the header `Host`. A page of another site, whose name leads to
  this address (DNS rebinding), is refused: only IP addresses, `localhost` and names that were given are answered.
- Pages of other sites may link to a page, but not load it in a frame, as an image, or with a script: reading dead
  letters takes them out of their queue for a moment.
- With a token, each page needs it: as `Authorization: Bearer`, or as a cookie that the login form sets.
- An action needs a POST from this page: the header `Origin` must name this host, and a field of the form must fit to a
  cookie that browsers do not send from other sites (SameSite=Strict).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

import attrs
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightbus.web import text

HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Other sites get nothing. With `no-referrer`, browsers would send `Origin: null` with the forms of this page, too.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of each answer."""
SESSION = "lightbus_session"
BROWSER = "lightbus_browser"
HOURS = 12
"""How long a login lasts."""
SHORTEST = 16
"""Characters of a token."""
OPEN = ("/login", "/static/")
"""Paths that need no token."""


@attrs.define
class Guard:
    """Keys, names and the token of one server."""

    token: str | None
    names: Collection[str]
    """Names in the header `Host` that are allowed, besides `localhost` and addresses of this machine."""
    local: bool
    """Whether only this machine can connect. Then IP addresses other than those of the loopback are refused."""
    _key: bytes = attrs.field(factory=lambda: secrets.token_bytes(32), repr=False)

    def allows_host(self, host: str) -> bool:
        """Whether a page with this `Host` is answered. The port does not count: it may be forwarded."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.local

    # --- the token

    def is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    def session(self) -> str:
        """The value of the cookie after a login."""
        until = f"{time.time() + HOURS * 3600:.0f}"
        return f"{until}.{self._sign('session', until)}"

    def is_session(self, given: str) -> bool:
        until, _, signature = given.partition(".")
        signed = hmac.compare_digest(signature.encode(errors="replace"), self._sign("session", until).encode())
        return signed and float(until) > time.time()

    def knows(self, headers: Headers) -> bool:
        """Whether a request may read pages."""
        if self.token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.is_token(given.strip())
        return self.is_session(cookie(headers, SESSION))

    # --- forms

    def form_token(self, browser: str) -> str:
        """The field of a form, for the browser with this cookie."""
        return self._sign("form", browser)

    def allows_form(self, headers: Headers, given: str) -> bool:
        """Whether a form was sent by a page of this server."""
        browser = cookie(headers, BROWSER)
        fits = hmac.compare_digest(given.encode(errors="replace"), self.form_token(browser).encode())
        return bool(browser) and fits and is_own_origin(headers)

    def _sign(self, purpose: str, value: str) -> str:
        return hmac.new(self._key, f"{purpose}:{value}".encode(errors="replace"), hashlib.sha256).hexdigest()


def is_own_origin(headers: Headers) -> bool:
    """Whether `Origin` names this host. All browsers send it with a POST."""
    try:
        origin = urlsplit(headers.get("origin", ""))
    except ValueError:
        return False
    return origin.scheme in ("http", "https") and origin.netloc == headers.get("host", "")


def is_foreign(headers: Headers) -> bool:
    """Whether a page of another site loads this one as a part of itself. Browsers say so to secure origins, which those
    of this machine are.
    """
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    return (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) != ("navigate", "document")


def cookie(headers: Headers, name: str) -> str:
    """The value of a cookie; "" if there is none."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value


def new_browser() -> str:
    """The value of the cookie to which forms are bound."""
    return secrets.token_urlsafe(24)


def set_cookie(response: Response, name: str, value: str, *, secure: bool, seconds: int | None = None) -> None:
    """A cookie that no script reads, and that no other site sends."""
    response.set_cookie(name, value, max_age=seconds, path="/", httponly=True, samesite="strict", secure=secure)


class Guarded:
    """The pages behind a guard."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self.app = app
        self.guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    if name != "cache-control" or not scope["path"].startswith("/static/"):
                        headers[name] = value
            await send(message)

        await self._answer(scope)(scope, receive, send_with_headers)

    def _answer(self, scope: Scope) -> ASGIApp:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.guard.allows_host(host):
            return PlainTextResponse(
                f"This server does not answer to the name {text.printable(host)[:200]!r}. Open it as it was printed "
                "when it started, or start it with --allow-name.\n",
                421,
            )
        if is_foreign(headers):
            return PlainTextResponse("Pages of other sites may link to this one, but not load it.\n", 403)
        if self.guard.knows(headers) or scope["path"].startswith(OPEN):
            return self.app
        if "text/html" in headers.get("accept", "") and scope["method"] in ("GET", "HEAD"):
            return RedirectResponse("/login", 303)
        return PlainTextResponse("The token is missing or wrong. Send it as `Authorization: Bearer TOKEN`.\n", 401)
