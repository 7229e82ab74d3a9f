"""`--metrics`: `/metrics` beside `/readyz`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.telemetry.processes import SharedFolder
    from lightbus.telemetry.prometheus import Metrics
    from lightbus.worker.health_server import Page
    from lightbus.worker.services import ServiceRunner
    from lightbus.worker.worker import Worker


def check(wanted: bool, health_port: int | None) -> None:
    """
    Raises:
        click.UsageError: `--health-port` is missing.
        errors.WorkerError: prometheus_client is not installed.
    """
    from lightbus import errors

    if wanted and health_port is None:
        raise click.UsageError("--metrics needs a port: add --health-port 8080. /metrics is served there.")
    if wanted and importlib.util.find_spec("prometheus_client") is None:
        raise errors.WorkerError("--metrics needs prometheus_client: pip install 'lightbus-amqp[prometheus]'")


def paths(with_metrics: bool) -> str:
    """What the health port serves, for the log."""
    return "/livez, /readyz and /metrics" if with_metrics else "/livez and /readyz"


def shared_folder() -> SharedFolder:
    from lightbus.telemetry.processes import SharedFolder

    return SharedFolder()


class MetricsPage:
    """The page of one process."""

    def __init__(self, number: int = 0) -> None:
        """Before the app is imported, since it may create metrics.

        Args:
            number: of this worker among those of its supervisor, from 1; 0 without one.

        Raises:
            errors.WorkerError: PROMETHEUS_MULTIPROC_DIR names no folder.
        """
        from lightbus.telemetry import processes

        self._metrics: Metrics | None = None
        self._membership = processes.Membership(number)

    def of(self, app: Lightbus) -> Mapping[str, Page]:
        """Count what happens in this app. Before its worker is made."""
        from lightbus.telemetry.prometheus import Metrics

        self._metrics = Metrics.of(app)
        return {"/metrics": self._metrics.page}

    def watch(self, worker: Worker | ServiceRunner) -> None:
        assert self._metrics is not None
        self._metrics.watch(worker)

    def close(self) -> None:
        """The worker has ended."""
        assert self._metrics is not None
        self._metrics.close()
        self._membership.close()
