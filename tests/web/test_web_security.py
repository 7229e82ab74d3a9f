"""Who may read the page, and who may use its actions: each attack is refused, and what is meant works."""

from __future__ import annotations

import functools
import http.client
import http.server
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser
from tests.patience import LIMIT, silent_server
from tests.processes import Program, environment, lightbus
from tests.web.conftest import Answer, ask, serving

TOKEN = "correct-horse-battery-staple"
LETTER = "0" * 32


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Without a token, with actions, on an empty broker."""
    folder = tmp_path_factory.mktemp("open")
    with serving(
        "--allow-actions", "--allow-name", "Bus.example", folder=folder, url=f"sqlite:///{folder}/bus.db"
    ) as one:
        yield one


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With a token, and without actions."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text(TOKEN + "\n")
    with serving("--token-file", "token", folder=folder, url=f"sqlite:///{folder}/bus.db") as one:
        yield one


def cookies(answer: Answer) -> str:
    """What a browser sends back. (The tests look at answers with one cookie.)"""
    return answer.headers["set-cookie"].partition(";")[0]


# --- names: DNS rebinding


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:8765", "bus.example", "LOCALHOST"])
def test_a_page_is_answered_under_its_own_names(address: str, host: str) -> None:
    assert ask(address, host=host).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "192.168.0.9", "", "a@b[", "127.0.0.1.evil"]
)
def test_a_page_is_not_answered_under_other_names(address: str, host: str) -> None:
    answer = ask(address, host=host)
    assert answer.status == 421 if host else answer.status in (400, 421)
    assert "Lightbus web" not in answer.text


# --- other sites


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_may_link_but_not_load(address: str, site: str) -> None:
    def status(mode: str, dest: str) -> int:
        sent = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": mode, "Sec_Fetch_Dest": dest}
        return ask(f"{address}/health", **sent).status

    assert status("navigate", "document") == 200
    loaded = [("no-cors", "image"), ("cors", "empty"), ("navigate", "iframe"), ("no-cors", "script"), ("navigate", "")]
    assert {status(*one) for one in loaded} == {403}


def test_in_a_browser_another_origin_loads_nothing(address: str, chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>Another site.</p>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)

    def fetched(url: str) -> str:
        script = f"fetch({url!r}, {{mode: 'no-cors'}}).then(() => 'loaded', () => 'refused')"
        answer = chromium.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return str(answer["result"]["value"])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        chromium.visit(f"http://localhost:{other.server_port}/")
        assert fetched(f"http://127.0.0.1:{other.server_port}/") == "loaded"
        assert fetched(f"{address}/health") == "refused"
        other.shutdown()


# --- headers


@pytest.mark.parametrize("path", ["/", "/tail", "/nothing", "/apps/nobody", "/static/style.css", "/login", "/dead/!"])
def test_each_answer_has_the_headers_that_browsers_need(address: str, path: str) -> None:
    headers = ask(address + path).headers
    assert headers["content-security-policy"].startswith("default-src 'self'; ")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert "server" not in headers


def test_the_pages_need_no_inline_scripts_or_styles(address: str) -> None:
    for path in ("/", "/apps", "/events", "/dead", "/tail", "/health"):
        text = ask(address + path).text
        assert not re.search(r"<style|\bstyle=|\bon\w+=|<script(?! src=\"/static/)|https?:", text), path


# --- the token


def test_another_address_than_the_loopback_needs_a_token(tmp_path: Path) -> None:
    done = lightbus("web", "--host", "0.0.0.0", "--port", "0", folder=tmp_path, url="memory://")
    assert done.returncode == 2
    assert "it needs a token: set LIGHTBUS_WEB_TOKEN, or give --token-file" in done.stderr


@pytest.mark.parametrize(("token", "problem"), [("short", "it needs 16"), ("", "is empty")])
def test_a_token_that_protects_nothing_is_refused(tmp_path: Path, token: str, problem: str) -> None:
    (tmp_path / "token").write_text(token)
    done = lightbus("web", "--token-file", "token", "--port", "0", folder=tmp_path, url="memory://")
    assert done.returncode == 2
    assert problem in done.stderr


def test_with_a_token_nothing_is_read_without_it(guarded: str) -> None:
    for path in ("/", "/apps", "/dead/billing", "/health", "/tail/events", "/nothing"):
        assert ask(guarded + path).status == 401
        assert ask(guarded + path, Accept="text/html").headers["location"] == "/login"
    for wrong in ("Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer \xff"):
        assert ask(guarded, Authorization=wrong).status == 401
    for forged in ("lightbus_session=", "lightbus_session=9999999999.", f"lightbus_session=9999999999.{'0' * 64}"):
        assert ask(guarded, Cookie=forged).status == 401
    assert ask(guarded, Authorization=f"Bearer {TOKEN}").status == 200


def test_the_login_form_sets_a_cookie_that_only_this_page_uses(guarded: str) -> None:
    page = ask(guarded + "/login")
    assert page.status == 200
    assert TOKEN not in page.text
    for path in ("/login", "/static/nothing"):  # what needs no token shows nothing of the bus
        assert "sqlite" not in ask(guarded + path).text

    wrong = ask(guarded + "/login", method="POST", body="token=wrong", Origin=guarded)
    assert (wrong.status, "This is not the token." in wrong.text) == (401, True)
    assert "lightbus_session" not in wrong.headers.get("set-cookie", "")
    assert ask(guarded + "/login", method="POST", body=f"token={TOKEN}", Origin="http://evil.example").status == 403

    right = ask(guarded + "/login", method="POST", body=f"token={TOKEN}", Origin=guarded)
    assert (right.status, right.headers["location"]) == (303, "/")
    attributes = right.headers["set-cookie"].lower().split("; ")
    assert {"httponly", "samesite=strict", "path=/"} <= set(attributes)
    assert TOKEN not in right.headers["set-cookie"]
    assert ask(guarded, Cookie=cookies(right)).status == 200
    assert ask(guarded, Cookie=cookies(right) + "0").status == 401


# --- actions


def form_of(address: str) -> tuple[str, str]:
    """The cookie of a browser that has opened a page, and the field of its forms."""
    page = ask(address + "/dead/billing")
    found = re.search(r'name="form" value="(\w+)"', page.text)
    assert found is not None, page.text
    return cookies(page), found[1]


def retry(address: str, cookie: str, form: str, **headers: str) -> int:
    body = f"form={form}&letter={LETTER}&confirmed=yes"
    return ask(address + "/dead/billing/retry", method="POST", body=body, Cookie=cookie, **headers).status


@pytest.fixture(scope="module")
def with_letter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With actions, and a dead letter of billing."""
    from tests.integration.test_dead import put_dead_letters

    folder = tmp_path_factory.mktemp("letter")
    url = f"sqlite:///{folder}/bus.db"
    put_dead_letters(url, 1)
    with serving("--allow-actions", folder=folder, url=url) as one:
        yield one


def test_only_a_form_of_the_page_itself_retries(with_letter: str) -> None:
    cookie, form = form_of(with_letter)
    assert retry(with_letter, cookie, form, Origin=with_letter) == 200
    for origin in ("http://evil.example", "null", with_letter + "0", "https://127.0.0.1", ""):
        assert retry(with_letter, cookie, form, Origin=origin) == 403
    assert retry(with_letter, cookie, form) == 403
    assert retry(with_letter, cookie, "", Origin=with_letter) == 403
    assert retry(with_letter, cookie, "0" * 64, Origin=with_letter) == 403
    assert retry(with_letter, "", form, Origin=with_letter) == 403
    other, _ = form_of(with_letter)
    assert retry(with_letter, other, form, Origin=with_letter) == 403
    assert ask(f"{with_letter}/dead/billing/retry?confirmed=yes&letter={LETTER}").status == 404


def test_without_allow_actions_there_is_no_action(guarded: str) -> None:
    answer = ask(
        guarded + "/dead/billing/purge",
        method="POST",
        body=f"letter={LETTER}&confirmed=yes",
        Origin=guarded,
        Authorization=f"Bearer {TOKEN}",
    )
    assert (answer.status, "--allow-actions" in answer.text) == (403, True)


def test_a_form_is_bounded(address: str) -> None:
    body = "letter=" + "0" * 100_000
    assert ask(address + "/dead/billing/purge", method="POST", body=body, Origin=address).status == 413


# --- what goes wrong


def test_a_broker_that_is_down_is_shown_without_its_password_or_a_traceback(tmp_path: Path) -> None:
    url = "amqp://billing:s3cret@127.0.0.1:1/"
    with serving(folder=tmp_path, url=url) as address:
        for path in ("/", "/health", "/apps", "/dead/billing"):
            answer = ask(address + path)
            assert answer.status == 503, path
            assert "s3cret" not in answer.text
            assert "Traceback" not in answer.text
            assert "127.0.0.1:1" in answer.text
            assert "Connection refused" in answer.text


def test_ctrl_c_ends_the_server_with_an_open_stream_and_without_a_traceback(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bus.db"
    with Program("web", "--port", "0", folder=tmp_path, url=url) as program:
        found = program.wait_for(r"^Lightbus web: http://127.0.0.1:(\d+)/$")
        stream = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=LIMIT)
        stream.request("GET", "/tail/events")
        assert stream.getresponse().readline() == b"retry: 2000\n"
        assert program.end(signal.SIGINT) == 0
        assert "Traceback" not in program.output
        stream.close()


def test_ctrl_c_ends_the_server_while_a_page_waits_for_the_broker(tmp_path: Path) -> None:
    with silent_server() as broker:
        url = f"amqp://127.0.0.1:{broker.getsockname()[1]}/"
        with Program("web", "--port", "0", folder=tmp_path, url=url) as program:
            found = program.wait_for(r"^Lightbus web: http://127.0.0.1:(\d+)/$")
            page = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=LIMIT)
            page.request("GET", "/")
            with broker.accept()[0]:  # the page has connected to the broker
                assert program.end(signal.SIGINT) == 0
            assert "Traceback" not in program.output
            page.close()


def test_without_the_extra_the_error_names_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['uvicorn'] = None; sys.argv[1:] = ['web']; from lightbus.__main__ import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1
    assert "needs the extra [web]" in done.stderr
    assert "pip install 'lightbus-amqp[web]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_an_error_with_the_next_step(address: str, tmp_path: Path) -> None:
    port = address.rpartition(":")[2]
    done = lightbus("web", "--port", port, folder=tmp_path, url="memory://")
    assert done.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{port}: Address already in use. Choose another port: --port 0" in done.stderr


def test_a_host_that_is_no_name_is_an_error(tmp_path: Path) -> None:
    done = lightbus("web", "--host", "a..b", folder=tmp_path, url="memory://", extra={"LIGHTBUS_WEB_TOKEN": "t" * 16})
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Cannot listen on a..b:8765: ")
    assert done.stderr.count("\n") == 1
