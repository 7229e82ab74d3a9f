"""The objects of a kind that are in use."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Living(Generic[T]):
    """A set that keeps none of its objects alive. Any thread may add to it while others iterate.

    A WeakSet raises RuntimeError when another thread adds to it during an iteration.
    """

    def __init__(self) -> None:
        self._by_id: weakref.WeakValueDictionary[int, T] = weakref.WeakValueDictionary()

    def add(self, one: T) -> None:
        self._by_id[id(one)] = one

    def __iter__(self) -> Iterator[T]:
        """Over those that are in the set now."""
        return (one for reference in self._by_id.valuerefs() if (one := reference()) is not None)
