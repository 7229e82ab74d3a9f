"""What is to be done before a process ends without Python's own exit handlers (`atexit`)."""

from __future__ import annotations

from collections.abc import Callable

before_exit: list[Callable[[], object]] = []
"""A worker that cannot wait for a handler any more calls these, in a thread, for a limited time, and then ends with
`os._exit`. They do not replace `atexit`: all other processes end with that."""
