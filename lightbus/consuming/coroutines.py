"""A handler's coroutine runs within a task that it shares with others: its context variables, and who ended it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dis
import functools
import signal
import threading
import types
from collections.abc import Callable, Generator
from typing import Any

from lightbus import errors

RAISE = dis.opmap["RAISE_VARARGS"]


class TaskClosed(GeneratorExit):
    """The task is closed, with what runs in it, as its event loop has ended."""


@types.coroutine
def run_in_context(
    context: contextvars.Context, coroutine: Any, before_it_waits: Callable[[], object]
) -> Generator[Any, Any, Any]:
    """Await a coroutine in this context, as a separate task would, at a tenth of the cost.

    `before_it_waits` is called once, unless it ends without having to wait.
    """
    try:
        yielded = context.run(coroutine.send, None)
    except StopIteration as stop:
        return stop.value
    before_it_waits()
    step: Callable[..., Any]
    while True:
        try:
            value = yield yielded
        except GeneratorExit:
            coroutine.close()
            raise TaskClosed from None
        except BaseException as error:  # noqa: BLE001  # the coroutine handles it
            step = functools.partial(coroutine.throw, error)
        else:
            step = functools.partial(coroutine.send, value)
        try:
            yielded = context.run(step)
        except StopIteration as stop:
            return stop.value


def context_of_callbacks() -> contextvars.Context:
    """A copy of the context here, in which anyio finds its event loop outside of tasks too.

    Where sniffio is installed, anyio asks it alone; sniffio knows the loop by the task, which a callback does
    not have, or by a variable that `anyio.run` sets and `asyncio.run` does not.
    """
    context = contextvars.copy_context()
    make_loop_known_in(context)
    return context


def make_loop_known_in(context: contextvars.Context) -> None:
    with contextlib.suppress(ImportError):
        import sniffio

        context.run(sniffio.current_async_library_cvar.set, sniffio.current_async_library())


def cancel_requests() -> Callable[[], int]:
    """How often this task has been cancelled, whatever cancelled it. Under trio, only scopes can be cancelled."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return _never if task is None else task.cancelling


def _never() -> int:
    return 0


async def forget_cancellation() -> None:
    """Let this task end normally, though a handler has cancelled it: else asyncio would cancel the whole worker."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)  # one that was not delivered yet is delivered here
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


def is_interrupt(error: BaseException) -> bool:
    """Whether a signal (Ctrl-C) raised it while a handler happened to run, and not the handler itself."""
    if not errors.is_a(error, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread():
        return False
    on_signal: Any = signal.getsignal(signal.SIGINT)
    while isinstance(on_signal, functools.partial):
        on_signal = on_signal.func
    code = getattr(on_signal, "__code__", None)
    trace, last = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code is code:
            return True
        trace, last = trace.tb_next, trace
    # Python's own handler leaves no frame: it is raised between two instructions, or within a call.
    return (
        last is not None
        and on_signal is signal.default_int_handler
        and last.tb_frame.f_code.co_code[last.tb_lasti] != RAISE
    )
