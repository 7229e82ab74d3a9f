"""Broker URLs in all forms that people write: valid ones are parsed, others rejected, and no secret is shown."""

from __future__ import annotations

import pathlib
import traceback
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightbus import errors
from lightbus.connection.address import parse_address
from lightbus.connection.dial import BrokerAddresses

SECRET = "s3cr3t.Pa55"


def _everything(error: BaseException) -> str:
    """All text that an error may show: messages, causes, contexts, notes, and their tracebacks."""
    parts = ["".join(traceback.format_exception(error))]
    one: BaseException | None = error
    while one is not None:
        parts += [str(one), repr(one), repr(one.args), repr(vars(one))]
        parts += [str(one.__cause__), repr(one.__context__)]
        one = one.__cause__ or one.__context__
    return "\n".join(parts)


def _refused(url: Any, *expected: str, error: type[errors.BrokerError] = errors.InvalidURL) -> str:
    with pytest.raises(error) as refused:
        BrokerAddresses.parse(url)
    text = str(refused.value)
    assert all(part in text for part in expected), text
    assert SECRET not in _everything(refused.value)
    return text


# --- valid URLs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("amqp://ann:pw@rabbit:5672/shop", "amqp://ann:**@rabbit:5672/shop"),
        (" amqp://ann:pw@rabbit/\n", "amqp://ann:**@rabbit/"),
        ("AMQPS://ann:pw@Rabbit", "amqps://ann:**@Rabbit"),
        ("amqp://guest@localhost//", "amqp://guest@localhost//"),
        ("amqp://ann:p:w@[::1]:5672/a%2Fb", "amqp://ann:**@[::1]:5672/a%2Fb"),
        ("amqp://[fe80::1%25eth0]/", "amqp://[fe80::1%25eth0]/"),
        ("amqp://ann:%C3%BC%40@bücher.example./", "amqp://ann:**@bücher.example./"),
        ("amqp://rabbit_1.de-mo/?heartbeat=7.5&connect_timeout=.5", "amqp://rabbit_1.de-mo/"),
        ("sqlite:////var/my bus.db", "sqlite:////var/my%20bus.db"),
        ("SQLITE://", "sqlite://"),
        ("memory://here", "memory://here"),
    ],
)
def test_a_valid_url_is_parsed_and_masked(url: str, masked: str) -> None:
    assert BrokerAddresses.parse(url).masked == masked


@pytest.mark.parametrize(
    ("path", "vhost"), [("", "/"), ("/", "/"), ("//", "/"), ("/%2F", "/"), ("/a%2Fb", "a/b"), ("/shop", "shop")]
)
def test_a_path_is_the_virtual_host(path: str, vhost: str) -> None:
    assert parse_address(f"amqp://localhost{path}").vhost == vhost


def test_url_objects_are_accepted() -> None:
    class Url:  # as pydantic's and yarl's
        scheme = "amqp"

        def __str__(self) -> str:
            return "amqp://ann:pw@rabbit/"

    for url in (Url(), [Url()], urlsplit("amqp://ann:pw@rabbit/"), ("amqp://ann:pw@rabbit/",)):
        assert BrokerAddresses.parse(url).masked == "amqp://ann:**@rabbit/"  # type: ignore[arg-type]


def test_urls_are_separated_by_semicolons_with_optional_spaces() -> None:
    assert BrokerAddresses.parse("amqp://a:1@one; amqp://a:2@two\n").masked == "amqp://a:**@one;amqp://a:**@two"


# --- invalid URLs -----------------------------------------------------------------------------

U = f"amqp://ann:{SECRET}@"

REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "joined by a comma": (f"amqp://ann:pw@one/,{U}two/", ("more than one URL", "';'")),
    "joined by a space": (f"amqp://ann:pw@one/ {U}two/", ("more than one URL", "';'")),
    "joined by a line break": (f"amqp://ann:pw@one/\n{U}two/", ("more than one URL", "';'")),
    "joined by a comma, one scheme": (f"amqp://ann:pw@one,ann:{SECRET}@two/", ("more than one '@'", "';'")),
    "hosts joined by a comma": (f"{U}one:5672,two:5672/", ("port",)),
    "hosts joined by a comma, no ports": (f"{U}one,two/", ("','", "';'")),
    "joined in a list's item": ([f"{U}one;{U}two"], ("more than one URL",)),
    "an empty one between": (f"{U}one;;{U}two", ("One of the broker URLs is empty",)),
    "an empty one at the end": (f"{U}one;", ("One of the broker URLs is empty",)),
    "an empty one in a list": ([f"{U}one", " "], ("One of the broker URLs is empty",)),
    "a semicolon in the password": (f"amqp://ann:{SECRET};x@one/", ("%3B",)),
    "quotes": (f'"{U}one/"', ("quotation marks",)),
    "one quote": (f"'{U}one/", ("quotation marks",)),
    "typographic quotes": (f"“{U}one/”", ("quotation marks",)),
    "brackets around": (f"<{U}one/>", ("not a broker URL",)),
    "a name before it": (f"LIGHTBUS_URL={U}one/", ("not a broker URL",)),
    "blank": ("  \n", ("not a broker URL", "empty")),
    "no slashes": (f"amqp:ann:{SECRET}@one/", ("not a broker URL",)),
    "no host": ("amqp:///shop", ("has no host", "localhost")),
    "nothing": ("amqp://", ("has no host",)),
    "no host after the password": (f"{U}/shop", ("has no host",)),
    "no host before the port": (f"{U}:5672/", ("has no host",)),
    "a line break in the password": (f"amqp://ann:{SECRET}\n@one/", ("line break",)),
    "an escaped line break in it": (f"amqp://ann:{SECRET}%0A@one/", ("control character", "%0A")),
    "a space in the password": (f"amqp://ann:{SECRET} x@one/", ("space", "%20")),
    "a space in the host": (f"{U}one two/", ("space",)),
    "empty label": (f"{U}one..two/", ("host",)),
    "a dot first": (f"{U}.one/", ("host",)),
    "a long label": (f"{U}{'a' * 64}.example/", ("host",)),
    "a long host": (f"{U}{'a.' * 127}ab/", ("host",)),
    "odd letters in the host": (f"{U}one$/", ("host",)),
    "a host that IDNA refuses": (f"{U}{'ü' * 70}/", ("host",)),
    "a number as host": (f"{U}5672/", ("host",)),
    "zero as host": (f"{U}0/", ("host",)),
    "half an address": (f"{U}127.1/", ("host", "four numbers")),
    "an address over the limit": (f"{U}127.0.0.256/", ("host",)),
    "port 0": (f"{U}one:0/", ("port",)),
    "port 99999": (f"{U}one:99999/", ("port",)),
    "port as a word": (f"{U}one:amqp/", ("port",)),
    "port with a sign": (f"{U}one:+5672/", ("port",)),
    "port in other digits": (f"{U}one:५६७२/", ("port",)),
    "no port after the colon": (f"{U}one:/", ("port",)),
    "IPv6 without brackets": (f"{U}::1/", ("port",)),
    "IPv6 half open": (f"{U}[::1/", ("port",)),
    "IPv6 half closed": (f"{U}::1]/", ("port",)),
    "text before an IPv6 address": (f"{U}one[::1]/", ("port",)),
    "text after an IPv6 address": (f"{U}[::1]one:5672/", ("port",)),
    "brackets around a name": (f"{U}[one]/", ("host", "brackets")),
    "an @ in the password": (f"amqp://ann:{SECRET}@x@one/", ("more than one '@'", "%40")),
    "an @ in the virtual host": (f"{U}one/a@b", ("after the host",)),
    "a / in the password": (f"amqp://ann:{SECRET}/x@one/", ("after the host", "%2F")),
    "a % in the password": (f"amqp://ann:{SECRET}%x@one/", ("'%'", "%25")),
    "a % at the end": (f"{U}one/shop%", ("'%'", "%25")),
    "an escape that is not UTF-8": (f"amqp://ann:{SECRET}%FF@one/", ("UTF-8",)),
    "bytes that were not UTF-8": (f"amqp://ann:{SECRET}\udcff@one/", ("UTF-8",)),
    "what Python refuses": (f"amqp://ann:{SECRET}℀@one/", ("Unicode",)),
    "no password": ("amqp://ann:@one/", ("password is empty", "variable")),
    "no user": (f"amqp://:{SECRET}@one/", ("user name",)),
    "neither": ("amqp://@one/", ("user name",)),
    "a fragment": (f"{U}one/#", ("'#'", "%23")),
    "a virtual host that is too long": (f"{U}one/{'ü' * 128}", ("255 bytes",)),
    "an option twice": (f"{U}one/?heartbeat=5&heartbeat=6", ("heartbeat more than once",)),
    "an option without a value": (f"{U}one/?cafile=", ("cafile is empty",)),
    "an unknown option": (f"{U}one/?{SECRET}=1", ("unknown option", "heartbeat")),
    "an option with a typo": (f"{U}one/?hartbeat=1", ("'hartbeat'", "Did you mean 'heartbeat'?")),
    "options that are none": (f"{U}one/?{SECRET}", ("options",)),
    "heartbeat 0": (f"{U}one/?heartbeat=0", ("heartbeat", "1 to 3600")),
    "heartbeat under 1": (f"{U}one/?heartbeat=0.4", ("heartbeat",)),
    "a heartbeat over AMQP's maximum": (f"{U}one/?heartbeat=70000", ("heartbeat",)),
    "a secret as heartbeat": (f"{U}one/?heartbeat={SECRET}", ("heartbeat",)),
    **{
        f"connect_timeout={value}": (f"{U}one/?connect_timeout={value}", ("connect_timeout", "0.1 to 3600"))
        for value in ("0", "-1", "nan", "inf", "1e3", "²", "٣", "1_0", "9999999999")
    },
    "a user for a file": (f"sqlite://ann:{SECRET}@/bus.db", ("which a file URL cannot have",)),
    "a user for memory": (f"memory://ann:{SECRET}@here", ("which a file URL cannot have",)),
    "a line break in a path": ("sqlite:///bus\n.db", ("line break",)),
    "bytes": (f"{U}one/".encode(), ("its type is bytes",)),
    "a path": (pathlib.Path("bus.db"), ("its type is PosixPath",)),
    "a mapping": ({"url": f"{U}one"}, ("its type is dict",)),
    "a set": ({f"{U}one"}, ("its type is set",)),
    "None in a list": ([None], ("its type is NoneType",)),
    "bytes in a list": ([f"{U}one/".encode()], ("its type is bytes",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_url_is_rejected_with_the_reason_and_without_its_secret(case: str) -> None:
    url, expected = REFUSED[case]
    _refused(url, *expected)


def test_the_error_suggests_a_similar_scheme_and_does_not_show_an_unknown_one() -> None:
    _refused(f"ampq://ann:{SECRET}@one/", "Did you mean amqp://?", error=errors.UnsupportedBroker)
    _refused(f"x-{SECRET}://one/".lower().replace(SECRET.lower(), SECRET), error=errors.UnsupportedBroker)


# --- damaged URLs -----------------------------------------------------------------------------

_PIECES = [*"@:/?#[]%;, \n\t\"'&=.\\0aü℀\x00\udcff", "://", "%2", "%00", "amqp://", "localhost", ":99999", "[::1]"]


@st.composite
def _mangled(draw: st.DrawFn) -> str:
    """A URL with parts inserted, removed and repeated, except the user name and the colon before the secret."""
    head = "amqp://ann:"
    tail = f"{SECRET}@rabbit:5672/shop?heartbeat=10"
    for _ in range(draw(st.integers(0, 4))):
        where = draw(st.integers(0, len(tail)))
        if SECRET in tail and abs(tail.index(SECRET) + len(SECRET) // 2 - where) < len(SECRET) // 2 + 1:
            where = tail.index(SECRET) + draw(st.sampled_from((0, len(SECRET))))
        if draw(st.booleans()):
            tail = tail[:where] + draw(st.sampled_from(_PIECES)) + tail[where:]
        else:
            kept = tail[where + draw(st.integers(0, 3)) :]
            tail = tail[:where] + (kept if SECRET in tail[:where] or SECRET in kept else tail[where:])
    return head + tail


@st.composite
def _rearranged(draw: st.DrawFn) -> Any:
    """Parts of URLs in any order: which one is the user, the host or the secret is undefined."""
    return "".join(
        draw(st.lists(st.sampled_from([SECRET, "ann", "rabbit", "5672", *_PIECES]), min_size=1, max_size=12))
    )


def _read(url: Any) -> BrokerAddresses | None:
    refusal: BaseException | None = None
    try:
        return BrokerAddresses.parse(url)
    except (errors.InvalidURL, errors.UnsupportedBroker) as error:
        refusal = error
    assert SECRET not in _everything(refusal)
    assert SECRET.lower() not in str(refusal).lower()
    return None


@given(_mangled())
@example(f"amqp://ann:pw@one/,amqp://ann:{SECRET}@two/")
@example(f"amqp://ann:{SECRET}@")
def test_the_password_of_a_damaged_url_is_not_shown(url: str) -> None:
    broker = _read(url)
    if broker is not None:
        shown = f"{broker.masked} {broker!r} {[address.masked for address in broker.addresses]}"
        assert SECRET not in shown


@given(
    st.one_of(
        _rearranged(), st.text(max_size=40), st.binary(max_size=20), st.none(), st.integers(), st.lists(st.text())
    )
)
def test_any_value_is_parsed_or_rejected_without_quoting_it(url: Any) -> None:
    broker = _read(url)
    for address in broker.addresses if broker is not None else ():
        assert address.port is None or urlsplit(address.plain).hostname
