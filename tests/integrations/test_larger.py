"""docs/examples/larger: an app whose handlers are in several modules."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.integrations.example import PYTHON, Example
from tests.patience import wait_until
from tests.processes import LIGHTBUS

PUBLISH = (*LIGHTBUS, "publish")


def test_the_worker_runs_the_handlers_of_all_included_modules(example: Callable[[str], Example], url: str) -> None:
    billing = example("larger")
    with billing.start("worker", "billing.bus:app", url=url) as worker:
        worker.wait_for("Ready")
        order = billing.run(*PUBLISH, "tests.elsewhere:shop", "order.placed", "order_id=o-1", "amount=9.50", url=url)
        assert order.stdout.endswith("confirmed, routed.\n"), order.stderr
        worker.wait_for("Invoice o-1 over 9.50 sent.")
        payment = billing.run(*PUBLISH, "tests.elsewhere:bank", "payment.received", "invoice_id=o-1", url=url)
        assert payment.stdout.endswith("confirmed, routed.\n"), payment.stderr
        worker.wait_for("Invoice o-1 paid.")
        cancelled = billing.run(*PYTHON, "-m", "billing.cancel", "o-1", url=url)
        assert (cancelled.returncode, cancelled.stderr) == (0, "")
        worker.wait_for("Invoice o-1 cancelled.")
        assert worker.end(signal.SIGTERM) == 0


def test_a_program_that_only_publishes_imports_no_handlers(example: Callable[[str], Example], url: str) -> None:
    code = "import sys; from billing.cancel import cancel; cancel('o-1'); print('billing.handlers' in sys.modules)"
    done = example("larger").run(*PYTHON, "-c", code, url=url)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_commands_show_the_handlers_of_all_included_modules(example: Callable[[str], Example]) -> None:
    done = example("larger").run(*LIGHTBUS, "events", "billing.bus:app", url="memory://")
    for handler in ("send_invoice", "forget_invoice", "settle_invoice"):
        assert handler in done.stdout


def test_two_apps_run_in_one_process(example: Callable[[str], Example], url: str) -> None:
    billing = example("larger")
    with billing.start("both.py", program=PYTHON, url=url) as both:
        wait_until(lambda: {"billing is ready", "audit is ready"} <= {*both.output.splitlines()}, "both are ready")
        order = billing.run(*PUBLISH, "tests.elsewhere:shop", "order.placed", "order_id=o-1", "amount=9.50", url=url)
        assert order.returncode == 0, order.stderr
        expected = {
            "audit: order.placed from shop",
            "Invoice o-1 over 9.50 sent.",
            "audit: invoice.sent from billing",
        }
        wait_until(lambda: expected <= {*both.output.splitlines()}, "both have handled it")
        assert both.end(signal.SIGTERM) == 0


def test_its_tests_pass(example: Callable[[str], Example]) -> None:
    assert "4 passed" in example("larger").run_its_tests("-m", "pytest", "-q")


def test_a_circular_import_is_shown_with_its_cause(example: Callable[[str], Example]) -> None:
    """The bus imports its handlers, as without include=, and above the line that creates the app."""
    billing = example("larger")
    bus = billing.folder / "billing" / "bus.py"
    bus.write_text("import billing.handlers.orders\n" + bus.read_text())
    done = billing.run(*LIGHTBUS, "events", "billing.bus:app", url="memory://")
    assert done.returncode == 2
    assert "cannot import name 'app' from partially initialized module 'billing.bus'" in done.stderr
