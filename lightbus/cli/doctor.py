"""`lightbus doctor`: diagnoses a broker and an app, with the next step for each problem."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from lightbus.cli import output, tables

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.inspection.finding import Finding

EPILOG = """\b
Examples:
  lightbus doctor billing.bus:app
  lightbus doctor amqp://user:password@host:5672/vhost
  lightbus doctor billing.bus:app --json | jq '.findings[] | select(.level == "fail")'

\b
Exit codes:
  0  no failures (with --strict: no warnings either)
  1  at least one failure; each finding names the next step
  2  the command line or MODULE:ATTR is invalid
"""

_COLORS = {"ok": "green", "note": "bright_black", "warn": "yellow", "fail": "red"}


@click.command(short_help="Diagnose a broker and an app.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR|URL")
@click.option("--strict", is_flag=True, help="Warnings count as failures.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object with all findings.")
def doctor(target: str, strict: bool, as_json: bool) -> None:
    """Check a broker and an app: connection, version, encryption, exchanges and queues, consumers, waiting events and
    dead letters, permissions, clocks; and the app's outboxes.

    The command changes nothing. It publishes one test message through temporary queues, which no handler receives.
    """
    from lightbus.cli import logs
    from lightbus.cli import target as targets
    from lightbus.connection.dial import BrokerAddresses
    from lightbus.inspection.examination import examine

    logs.configure("error")
    app = None if "://" in target or "@" in target else targets.load_app(target)
    broker = BrokerAddresses.parse(target) if app is None else app.broker
    findings: list[Finding] = []
    for finding in itertools.chain(examine(broker, app, target), _outboxes(app, target)):
        findings.append(finding)
        if not as_json:
            _show(finding)
    bad = [one for one in findings if one.level == "fail" or (strict and one.level == "warn")]
    if as_json:
        found = [
            {"level": one.level, "subject": one.subject, "text": one.text, "next": one.step or None} for one in findings
        ]
        output.write(json.dumps({"ok": not bad, "findings": found}, indent=1))
    else:
        _sum_up(findings)
    sys.exit(1 if bad else 0)


def _outboxes(app: Lightbus | None, target: str) -> Iterator[Finding]:
    from lightbus.cli.outbox import stores

    for relay in [] if app is None else stores.relays(app):
        from lightbus.outbox.examination import examine

        yield from stores.run(relay.store, examine, relay.store, target)


def _show(finding: Finding) -> None:
    from lightbus.cli import logs

    level = f"{finding.level:<4}"
    if logs.use_color(sys.stdout):
        level = click.style(level, fg=_COLORS[finding.level])
    output.write(f"{level}  {finding.subject:<12}  {tables.printable(finding.text)}")
    if finding.step:
        output.write(f"{'':<20}-> {tables.printable(finding.step)}")


def _sum_up(findings: list[Finding]) -> None:
    fails, warnings = (sum(one.level == level for one in findings) for level in ("fail", "warn"))
    if not fails and not warnings:
        output.write("\nNo problems found.")
    else:
        output.write(f"\n{fails} failed, {warnings} warnings. The arrows show the next step.")
