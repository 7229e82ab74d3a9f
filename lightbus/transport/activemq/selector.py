"""The selectors of queues on Artemis: an app's bindings as one condition. Pure.

A topic pattern becomes comparisons of the routing key, which is the JMSType. In `LIKE`, `%` also matches dots, so not
every pattern can be expressed: such a pattern is refused, since a queue must not get more or less than its bindings.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from lightbus.pattern import split_words
from lightbus.transport.activemq import names

_DIRECT = f'("m.{names.ORIG_ADDRESS}" IS NULL AND _AMQ_ORIG_ADDRESS IS NULL)'
"""Sent to the queue itself: a copy of the app's own. Not a message that a divert or the broker has moved: of one that
came over another protocol (STOMP), the broker notes the address in a property, which an AMQP client could forge."""
_MOVED = f'"m.{names.ORIG_ADDRESS}" IS NOT NULL'
"""By the broker, as a message of AMQP. Nothing else is an event."""
_EVERYTHING = f'"m.{names.ORIG_ADDRESS}" IS NOT NULL'
_NOTHING_BUT = f'"m.{names.ORIG_ADDRESS}" IN '
_QUEUES = f'"m.{names.ORIG_QUEUE}" LIKE '
_ESCAPE = "!"

# The broker compares by trial, which takes exponential time in the number of wildcards.
_MOST_WORDS = 10
_MOST_WILDCARDS = 4

_TERM = r"JMSType (?:= ''|(?:NOT )?LIKE ''(?: ESCAPE '')?)"
_TERMS = rf"(?:{_TERM}(?: OR {_TERM})*|{_TERM}(?: AND {_TERM})+)"
_SOURCE = re.escape(_NOTHING_BUT) + r"\(''(?:,'')+\)"
_CLAUSE = re.compile(rf"{_TERMS}|{re.escape(_EVERYTHING)}|{_SOURCE}(?: AND \({_TERMS}\))?")
"""A clause without the contents of its strings."""
_STRING = re.compile(r"'(?:[^']|'')*'")


def selector(clauses: Iterable[str]) -> str:
    """The selector of a consumed queue with these bindings. Equal bindings give equal selectors."""
    return _written(sorted(set(clauses)))


def _written(clauses: Sequence[str]) -> str:
    bound = " OR ".join(f"({clause})" for clause in clauses)
    return f"{_DIRECT} OR {_MOVED} AND ({bound})" if clauses else _DIRECT


def subscription(clauses: Iterable[str]) -> str:
    """The selector of a subscription without a queue."""
    bound = " OR ".join(f"({clause})" for clause in sorted(set(clauses)))
    return f"{_MOVED} AND ({bound})"


def clauses_of(selector: str) -> list[str]:
    """The clauses of a queue's selector.

    Raises:
        ValueError: `selector()` has not written it.
    """
    if selector == _DIRECT:
        return []
    start_of_all, end_of_all = f"{_DIRECT} OR {_MOVED} AND (", ")"
    if not selector.startswith(start_of_all) or not selector.endswith(end_of_all):
        raise ValueError(f"{selector!r} is not the selector of a queue of Lightbus")
    bound = selector[len(start_of_all) : -len(end_of_all)]
    clauses: list[str] = []
    depth, start = 0, 0
    strings = [(found.start(), found.end()) for found in _STRING.finditer(bound)]
    hidden = list(bound)
    for begin, end in strings:
        hidden[begin:end] = "x" * (end - begin)
    for position, letter in enumerate(hidden):
        if letter == "(":
            depth += 1
            start = position + 1 if depth == 1 else start
        elif letter == ")":
            depth -= 1
            if depth == 0:
                clauses.append(bound[start:position])
    canonical = all(_CLAUSE.fullmatch(_STRING.sub("''", clause)) for clause in clauses)
    if not canonical or selector != _written(clauses) or clauses != sorted(set(clauses)):
        raise ValueError(f"{selector!r} is not the selector of a queue of Lightbus")
    return clauses


def dead_selector(app: str) -> str:
    """The selector of an app's dead-letter queue: its own dead letters, and the broker's from any of its queues."""
    return f"{_DIRECT} OR {_MOVED} AND {_QUEUES}{_quote(f'{_escape(app)}.%')} ESCAPE '{_ESCAPE}'"


def clause(exchange: str, pattern: str) -> str:
    """The condition of a binding: `pattern` on the bus, or on the exchange of another app (`source=`).

    Raises:
        ValueError: the pattern cannot be expressed.
    """
    condition = _condition(pattern)
    if exchange == names.BUS:
        return condition or _EVERYTHING
    source = _NOTHING_BUT + _list([names.EXCHANGES + exchange, names.DELAYS + exchange])
    return f"{source} AND ({condition})" if condition else source


def _condition(pattern: str) -> str:
    """The condition on the routing key; empty if every one matches."""
    words = split_words(pattern)
    if "#" not in words:
        return _of_fixed_length(pattern, words) if "*" in words else _compared(words)
    choices: list[list[list[str | None]]] = []  # for each run of words, the alternatives
    for wild, group in itertools.groupby(words, lambda word: word in ("*", "#")):
        run = list(group)
        if not wild:
            choices.append([[*run]])
        elif "#" in run:  # no words have no dot before them
            least = run.count("*")
            choices.append([[None] * least] if least else [[], [None]])
        else:
            raise ValueError(
                f"the pattern {pattern!r} cannot be used on Artemis: it has a `*` apart from its `#`, and a selector "
                "cannot express that. Use `#` for both and let the handler skip the other events, or name the words."
            )
    if choices == [[[], [None]]]:
        return ""
    if sum(longest.count(None) for *_, longest in choices) > _MOST_WILDCARDS:
        raise ValueError(
            f"the pattern {pattern!r} cannot be used on Artemis: with a `#`, it may have {_MOST_WILDCARDS} wildcards "
            "at most, because the broker compares by trial. Use fewer, or name the words."
        )
    alternatives = (list(itertools.chain(*chosen)) for chosen in itertools.product(*choices))
    return " OR ".join(_compared(words) for words in alternatives if words != [""])  # the empty key has no word


def _of_fixed_length(pattern: str, words: Sequence[str]) -> str:
    """For a pattern with `*` and no `#`: as many words as it has, and not one more."""
    if len(words) > _MOST_WORDS:
        raise ValueError(
            f"the pattern {pattern!r} cannot be used on Artemis: with a `*`, it may have {_MOST_WORDS} words at most, "
            "because the broker compares by trial. End it with `#` instead."
        )
    longer = ".".join("%" * (len(words) + 1))
    return f"JMSType NOT LIKE {_quote(longer)} AND {_compared([None if word == '*' else word for word in words])}"


def _compared(words: Sequence[str | None]) -> str:
    """A comparison with words. None: any words, at least one."""
    if None not in words:
        return f"JMSType = {_quote('.'.join(word or '' for word in words))}"
    if len(words) == 1:
        return "JMSType LIKE '_%'"  # not the empty key
    alike = ".".join("%" if word is None else _escape(word) for word in words)
    return f"JMSType LIKE {_quote(alike)}" + (f" ESCAPE '{_ESCAPE}'" if _ESCAPE in alike else "")


def _escape(word: str) -> str:
    return re.sub(f"([%_{_ESCAPE}])", rf"{_ESCAPE}\1", word)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _list(texts: Iterable[str]) -> str:
    return "(" + ",".join(map(_quote, texts)) + ")"
