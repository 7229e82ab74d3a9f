"""AMQP topic patterns: which routing keys does `invoice.*` or `user.#` match?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=65536)
def topic_matches(pattern: str, routing_key: str) -> bool:
    """Whether a topic exchange routes `routing_key` to a binding with `pattern`, as in RabbitMQ.

    `*` matches exactly one word, `#` zero or more, anywhere in the pattern. A word may be empty (`a..b` has three
    words). The empty key has no words: `#` matches it, and `*` does not.
    """
    return _words_match(split_words(pattern), split_words(routing_key))


@lru_cache(maxsize=4096)
def split_words(key: str) -> tuple[str, ...]:
    """The words of a routing key or pattern; the empty key has none."""
    return tuple(key.split(".")) if key else ()


def _words_match(pattern: Sequence[str], words: Sequence[str]) -> bool:
    # Only the last `#` needs to match more words: a later one can match whatever an earlier one could. So there is one
    # point to go back to, and no exponential search.
    at, word = 0, 0
    hash_at, hash_word = -1, 0
    while word < len(words):
        if at < len(pattern) and pattern[at] == "#":
            hash_at, hash_word = at, word
            at += 1
        elif at < len(pattern) and pattern[at] in ("*", words[word]):
            at, word = at + 1, word + 1
        elif hash_at >= 0:
            hash_word += 1
            at, word = hash_at + 1, hash_word
        else:
            return False
    return all(rest == "#" for rest in pattern[at:])
