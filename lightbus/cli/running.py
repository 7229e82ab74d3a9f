"""The options that `lightbus worker` and `lightbus relay` have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lightbus.cli import logs

Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def grace(what: str) -> Option:
    return click.option(
        "--grace",
        type=click.FloatRange(0, 86_400),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help=f"How long {what} is stopped.",
    )


def log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--log-level`, `--json-logs` and `--no-configure-logging`."""
    level = click.Choice(logs.LEVELS, case_sensitive=False)
    json_help = "One JSON object per line, with the event that is being handled, and everything of extra=."
    own_help = "Configure no logging: what your app has configured applies (dictConfig, structlog)."
    command = click.option("--no-configure-logging", is_flag=True, help=own_help)(command)
    command = click.option("--json-logs", is_flag=True, help=json_help)(command)
    return click.option("--log-level", type=level, default="info", show_default=True)(command)


def health_options(more: str, *, metrics_of: str = "") -> Option:
    """`--health-port`, `--health-host` and `--metrics`.

    Args:
        more: what else `--health-port` does.
        metrics_of: whose metrics are served.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option(
            "--metrics",
            is_flag=True,
            help=f"Serve /metrics for Prometheus on --health-port{metrics_of}. "
            "Needs prometheus_client (pip install 'lightbus-amqp[prometheus]').",
        )(command)
        command = click.option(
            "--health-host", default="127.0.0.1", show_default=True, metavar="HOST", help="Where --health-port listens."
        )(command)
        return click.option(
            "--health-port",
            type=click.IntRange(0, 65_535),
            metavar="PORT",
            help=f"Answer /livez and /readyz over HTTP: 200 or 503, and why, as JSON. {more}",
        )(command)

    return decorate
