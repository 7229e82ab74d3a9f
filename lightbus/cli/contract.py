"""`lightbus contract`: what an app publishes and subscribes to, for the catalogue of the bus."""

from __future__ import annotations

import json

import click

from lightbus.cli import output

EPILOG = """\b
Examples:
  lightbus contract show billing.bus:app | jq '.handlers[].patterns'
  lightbus contract publish billing.bus:app --release 2026.11
  lightbus contract withdraw billing.bus:app         (the app no longer exists)

\b
Each worker publishes its app's contract when it starts, and every 24 hours.
"""

EXAMPLE = """\b
Example:
  {}

\b
Exit codes:
  0  success
  1  the broker is not usable, or the contract cannot be published; the error names the next step
  2  the command line or MODULE:ATTR is invalid
"""

_release = click.option(
    "--release", envvar="LIGHTBUS_RELEASE", default="", metavar="NAME", help="The release, as your team names it."
)


@click.group(short_help="Publish what an app publishes and subscribes to.", epilog=EPILOG)
def contract() -> None:
    """Publish, show or withdraw the contract of an app: its events with their schemas, and its handlers with the fields
    that they read. It stays on the broker while the app is down.
    """


@contract.command(
    short_help="Print an app's contract as JSON.",
    epilog=EXAMPLE.format("lightbus contract show billing.bus:app | jq '.handlers[].patterns'"),
)
@click.argument("target", metavar="MODULE:ATTR")
@_release
def show(target: str, release: str) -> None:
    """Print the contract of an app as JSON, as it would be published. No broker is used."""
    from lightbus.catalog import contract as contracts
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    found = contracts.contract_of(targets.load_app(target), release)
    output.write(json.dumps(contracts.to_json(found), indent=1, ensure_ascii=False))


@contract.command(
    short_help="Publish an app's contract, as in a deployment.",
    epilog=EXAMPLE.format("lightbus contract publish billing.bus:app --release 2026.11"),
)
@click.argument("target", metavar="MODULE:ATTR")
@_release
def publish(target: str, release: str) -> None:
    """Publish the contract of an app. It replaces the earlier one. Workers do so at their start; this is for an app
    without a worker, or before its workers start.
    """
    from lightbus.catalog import storage
    from lightbus.catalog.contract import contract_of
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    app = targets.load_app(target)
    found = contract_of(app, release)
    storage.publish(app.broker, found)
    events, handlers = len(found.events), len(found.handlers)
    output.write(
        f"Published the contract of {app.name}: {events} event{'s' * (events != 1)}, "
        f"{handlers} handler{'s' * (handlers != 1)}."
    )


@contract.command(
    short_help="Remove an app from the catalogue.",
    epilog=EXAMPLE.format("lightbus contract withdraw billing.bus:app"),
)
@click.argument("target", metavar="MODULE:ATTR")
def withdraw(target: str) -> None:
    """Remove an app from the catalogue, until it publishes a contract again. Stop its workers first."""
    from lightbus.catalog import storage
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    app = targets.load_app(target)
    storage.withdraw(app.broker, app.name)
    output.write(f"Withdrew the contract of {app.name}. Its queues are unchanged.")
