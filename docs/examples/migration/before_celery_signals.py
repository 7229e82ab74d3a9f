"""Before: signals add a tenant to each task, read it in the worker, and count failures. Needs celery."""

from collections import Counter
from contextvars import ContextVar

from celery import Celery, signals

app = Celery("billing", broker="amqp://guest:guest@localhost:5672//")
current_tenant: ContextVar[str | None] = ContextVar("current_tenant", default=None)
failures: Counter[str] = Counter()


@signals.before_task_publish.connect
def add_tenant(headers, **_):
    headers["tenant"] = current_tenant.get()


@signals.task_prerun.connect
def enter_tenant(task, **_):
    current_tenant.set(task.request.get("tenant"))


@signals.task_postrun.connect
def leave_tenant(**_):
    current_tenant.set(None)


@signals.task_failure.connect
def count_failure(sender, **_):
    failures[sender.name] += 1


@app.task(name="charge")
def charge(order_id: int) -> None:
    print(f"{current_tenant.get()}: order {order_id}")
