"""The command, as `lightbus` and as `python -m lightbus`."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def run() -> None:
    """Run the command. Ctrl-C ends it without a traceback, also while Lightbus itself is still being imported."""
    try:
        import signal

        end_on_sigterm()
        # A process that ignores Ctrl-C, as in the background of a script, goes on to.
        heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if heeds:
            # No exception: on its way out of an import it may be lost, or renamed (Python 3.11: by __set_name__).
            signal.signal(signal.SIGINT, _leave)
        from lightbus.cli import main
    except KeyboardInterrupt:
        _leave()
    main(prog_name="lightbus", obj=_interrupt if heeds else None)


def end_on_sigterm() -> None:
    """Let SIGTERM end process 1, as a container's command is. For any other the kernel does it; there it drops a signal
    that nobody handles. Until a worker is there that stops in good order (`lightbus.worker`), nothing has begun.
    """
    import os
    import signal

    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


def _leave(*_: object) -> NoReturn:
    """End at once: nothing has begun."""
    import os

    os.write(2, b"Interrupted.\n")
    os._exit(130)


def _interrupt() -> None:
    """Let Ctrl-C be a KeyboardInterrupt from here on."""
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    run()
