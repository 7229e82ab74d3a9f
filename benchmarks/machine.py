"""Describes the machine and the versions, without names of hosts or people."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks import environment

_SHOWN = {
    "own": ("amqp", "anyio", "kombu", "msgspec", "psycopg", "python-qpid-proton", "sqlalchemy"),
    "peers": (
        "aio-pika",
        "aiormq",
        "celery",
        "dramatiq",
        "faststream",
        "nameko",
        "pika",
        "pydantic",
        "taskiq-aio-pika",
    ),
}


def describe(own: Path, peers: Path, rabbitmq: str, missing: list[str]) -> dict[str, Any]:
    libraries: dict[str, str] = {}
    for python, names in ((own, _SHOWN["own"]), (peers, _SHOWN["peers"])):
        installed = {name.lower(): version for name, version in environment.versions(python).items()}
        libraries |= {name: installed[name] for name in names if name in installed}
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "rabbitmq": rabbitmq,
        "libraries": libraries,
        "missing": missing,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load": round(os.getloadavg()[0], 1),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
