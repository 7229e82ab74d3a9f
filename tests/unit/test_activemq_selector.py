"""Topic patterns as selectors of Artemis: each lets through what RabbitMQ would, or is refused."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightbus.pattern import topic_matches
from lightbus.transport.activemq import names
from lightbus.transport.activemq.selector import clause, clauses_of, dead_selector, selector
from tests import artemis as brokers
from tests.patience import LIMIT, within

WORDS = ("a", "b", "*", "#")
PATTERNS = [".".join(words) for count in range(1, 5) for words in itertools.product(WORDS, repeat=count)]
KEYS = sorted({".".join(words) for count in range(6) for words in itertools.product(("a", "b", ""), repeat=count)})
OF_SHOP = "lightbus.exchange.shop"
ODD_PATTERNS = ["", ".", "#.", "a..b", "a_b.*", "a_b", "a%.#", "a!_b.#", "it's.*", "#.a'b", "*.", ".#", "a-b.#", "A.*"]
ODD_KEYS = [
    "axb",
    "axb.c",
    "a_b",
    "a_b.c",
    "a%.c",
    "a%",
    "ab.c",
    "a!_b",
    "a!_b.c",
    "it's.c",
    "c.a'b",
    "a-b",
    "a",
    "A.b",
]


# --- an interpreter of selectors --------------------------------------------------------------

Fields = dict[str, str | None]
TOKEN = re.compile(r"""\s*('(?:[^']|'')*'|"[^"]*"|[A-Za-z_]+|[=(),])""")


def evaluate(text: str, fields: Fields) -> bool:
    """Whether a selector lets through a message with these fields. NULL is neither true nor false, as in SQL."""
    return parsed(text)(fields) is True


@functools.lru_cache
def parsed(text: str) -> Callable[[Fields], bool | None]:
    tokens = TOKEN.findall(text)
    assert re.sub(r"\s", "", "".join(tokens)) == re.sub(r"\s", "", text)

    def any_of() -> Callable[[Fields], bool | None]:
        return joined(all_of, "OR", True)

    def all_of() -> Callable[[Fields], bool | None]:
        return joined(one, "AND", False)

    def joined(part: Callable[[], Any], word: str, decisive: bool) -> Callable[[Fields], bool | None]:
        parts = [part()]
        while tokens and tokens[0] == word:
            tokens.pop(0)
            parts.append(part())

        def decide(fields: Fields) -> bool | None:
            results = [part(fields) for part in parts]
            return decisive if decisive in results else None if None in results else not decisive

        return decide if len(parts) > 1 else parts[0]

    def expect(*expected: str) -> None:
        for token in expected:
            assert tokens.pop(0) == token

    def literal() -> str:
        token: str = tokens.pop(0)
        assert token[0] == "'"
        return token[1:-1].replace("''", "'")

    def one() -> Callable[[Fields], bool | None]:
        if tokens[0] == "(":
            expect("(")
            inner = any_of()
            expect(")")
            return inner
        field = tokens.pop(0).strip('"')
        operator = tokens.pop(0)
        if operator == "IS":
            negated = tokens[0] == "NOT"
            expect(*(("NOT", "NULL") if negated else ("NULL",)))
            return lambda fields: (fields.get(field) is None) != negated
        if operator == "IN":
            expect("(")
            options = [literal()]
            while tokens[0] == ",":
                expect(",")
                options.append(literal())
            expect(")")
            return lambda fields: None if fields.get(field) is None else fields[field] in options
        if operator == "=":
            equal = literal()
            return lambda fields: None if fields.get(field) is None else fields[field] == equal
        negated = operator == "NOT"
        if negated:
            expect("LIKE")
        alike = literal()
        escape = ""
        if tokens and tokens[0] == "ESCAPE":
            expect("ESCAPE")
            escape = literal()
        expression = ""
        letters = iter(alike)
        for letter in letters:
            if letter == escape:
                expression += re.escape(next(letters))
            else:
                expression += {"%": ".*", "_": "."}.get(letter, re.escape(letter))
        compiled = re.compile(expression, re.DOTALL)
        return lambda fields: (
            None if (value := fields.get(field)) is None else bool(compiled.fullmatch(value)) != negated
        )

    whole = any_of()
    assert not tokens
    return whole


def lets_through(text: str, key: str, origin: str | None = OF_SHOP) -> bool:
    return evaluate(text, {"JMSType": key, "m.x-opt-ORIG-ADDRESS": origin})


# --- patterns ---------------------------------------------------------------------------------


def test_every_pattern_of_up_to_four_words_is_exact_or_refused() -> None:
    refused = []
    for pattern in PATTERNS:
        try:
            text = selector([clause(names.BUS, pattern)])
        except ValueError:
            refused.append(pattern)
            continue
        for key in KEYS:
            assert lets_through(text, key) == topic_matches(pattern, key), (pattern, key, text)
    assert (len(PATTERNS), len(refused)) == (340, 44)
    assert all("*" in pattern and "#" in pattern for pattern in refused)


@pytest.mark.parametrize("pattern", ODD_PATTERNS)
def test_patterns_with_other_letters_are_exact(pattern: str) -> None:
    text = selector([clause(names.BUS, pattern)])
    for key in (*KEYS, *ODD_KEYS):
        assert lets_through(text, key) == topic_matches(pattern, key), (pattern, key, text)


def test_a_binding_with_a_source_lets_through_only_its_events() -> None:
    for pattern in ("#", "a.*", "a.#", "a"):
        text = selector([clause("shop", pattern)])
        assert lets_through(text, "a.b", OF_SHOP) == topic_matches(pattern, "a.b")
        assert lets_through(text, "a.b", "lightbus.delay.shop") == topic_matches(pattern, "a.b")
        assert not lets_through(text, "a.b", "lightbus.exchange.shop2")
        assert lets_through(text, "b.main", None)


def test_copies_of_the_app_are_let_through_whatever_is_bound() -> None:
    for text in (selector([]), selector([clause(names.BUS, "a.*")]), dead_selector("billing")):
        assert lets_through(text, "main", None)
    assert not lets_through(selector([]), "a")


def test_a_message_that_came_over_another_protocol_is_not_let_through() -> None:
    """The broker notes where it was moved from in a property, which an AMQP client can write too."""
    text = selector([clause(names.BUS, "#"), clause("shop", "a")])
    assert not evaluate(text, {"JMSType": "a", "_AMQ_ORIG_ADDRESS": "lightbus.exchange.shop"})
    assert evaluate(text, {"JMSType": "a", "_AMQ_ORIG_ADDRESS": "x", "m.x-opt-ORIG-ADDRESS": OF_SHOP})


def test_a_dead_letter_queue_has_the_brokers_dead_letters_of_its_queues() -> None:
    text = dead_selector("billing")
    fields: Fields = {"m.x-opt-ORIG-ADDRESS": "lightbus.bus"}
    assert not evaluate(text, {"_AMQ_ORIG_ADDRESS": "lightbus.bus", "_AMQ_ORIG_QUEUE": "stats.main"})
    assert evaluate(text, {**fields, "m.x-opt-ORIG-QUEUE": "billing.slow"})
    assert not evaluate(text, {**fields, "m.x-opt-ORIG-QUEUE": "stats.main"})
    assert not evaluate(dead_selector("my_app"), {**fields, "m.x-opt-ORIG-QUEUE": "my-app.main"})


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("*.paid.#", r"'\*.paid.#' cannot be used on Artemis: it has a `\*` apart from its `#`.*Use `#` for both"),
        ("#.a.*", "apart from"),
        ("a.*.*.*.*.*.*.*.*.*.*", "10 words at most.*End it with `#`"),
        ("#.a.#.b.#.c.#.d.#", "4 wildcards at most.*Use fewer"),
        (".".join(["#", "a"] * 60), "4 wildcards at most"),
    ],
)
def test_the_error_names_the_pattern_and_what_to_use_instead(pattern: str, why: str) -> None:
    with within(1), pytest.raises(ValueError, match=why):
        clause(names.BUS, pattern)


# --- selectors --------------------------------------------------------------------------------

compiled = st.sampled_from([pattern for pattern in PATTERNS if not re.search(r"#.*[ab].*\*|\*.*[ab].*#", pattern)])
bindings = st.lists(st.tuples(st.sampled_from([names.BUS, "shop", "ware-house"]), compiled), max_size=6)


@given(bindings)
def test_the_clauses_of_a_selector_can_be_read(bound: list[tuple[str, str]]) -> None:
    clauses = [clause(exchange, pattern) for exchange, pattern in bound]
    assert clauses_of(selector(clauses)) == sorted(set(clauses))
    assert selector(clauses) == selector(reversed([*clauses, *clauses]))


def test_strings_may_contain_what_separates_clauses() -> None:
    clauses = sorted(clause(names.BUS, pattern) for pattern in ("a') OR (JMSType = 'b", "''", "x')", "(.*"))
    assert clauses_of(selector(clauses)) == clauses


@pytest.mark.parametrize(
    "text",
    [
        "",
        "JMSType = 'a'",
        "\"m.x-opt-ORIG-ADDRESS\" IS NULL OR JMSType = 'a'",
        "\"m.x-opt-ORIG-ADDRESS\" IS NULL OR (color = 'red')",
        "\"m.x-opt-ORIG-ADDRESS\" IS NULL OR (JMSType = 'b') OR (JMSType = 'a')",
        "\"m.x-opt-ORIG-ADDRESS\" IS NULL OR (JMSType = 'a') OR (JMSType = 'a')",
        "\"m.x-opt-ORIG-ADDRESS\" IS NULL OR (JMSType = 'a')  OR (JMSType = 'b')",
        "\"m.x-opt-ORIG-ADDRESS\" IS NULL OR (JMSType = 'a'",
        '"m.x-opt-ORIG-ADDRESS" IS NULL OR ',
        '"m.x-opt-ORIG-ADDRESS" IS NULL OR (JMSType = \'a)',
    ],
)
def test_another_selector_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="not the selector of a queue of Lightbus"):
        clauses_of(text)


# --- on a broker ------------------------------------------------------------------------------


@pytest.mark.artemis
def test_artemis_lets_through_what_the_patterns_match(artemis: brokers.Artemis) -> None:
    from proton import Described, Message, symbol
    from proton.utils import BlockingConnection

    class Selecting:
        def __init__(self, text: str) -> None:
            self.text = text

        def apply(self, link: Any) -> None:
            described = Described(symbol("apache.org:selector-filter:string"), self.text)
            link.source.filter.put_dict({symbol("jms-selector"): described})

        def test(self, link: Any) -> bool:
            return bool(link.is_receiver)

    artemis.reset()
    patterns = [*(one for one in PATTERNS if one.count(".") < 3), *ODD_PATTERNS]
    keys = [key for key in (*KEYS, *ODD_KEYS) if key.count(".") < 4]
    connection = BlockingConnection(artemis.url(scheme="amqp"), timeout=LIMIT, allowed_mechs="PLAIN")
    try:
        receivers = {}
        for number, pattern in enumerate(patterns):
            try:
                text = clause("selected", pattern)
            except ValueError:
                continue
            receivers[pattern] = connection.create_receiver(
                names.BUS_ADDRESS,
                credit=len(keys) + 1,
                name=f"selected-{number}",
                options=[Selecting(selector([text, clause("selected", "the.last")]))],
            )
        sender = connection.create_sender(names.exchange_address("selected"))
        for key in (*keys, "the.last"):
            sender.send(Message(subject=key, body=b""))
        for pattern, receiver in receivers.items():
            received = []
            while not received or received[-1] != "the.last":
                received.append(receiver.receive(timeout=LIMIT).subject)
                receiver.accept()
            assert received[:-1] == [key for key in keys if topic_matches(pattern, key)], pattern
    finally:
        connection.close()
