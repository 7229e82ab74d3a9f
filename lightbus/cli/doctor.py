"""`lightbus doctor`: what is wrong, and what to do about it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from lightbus.cli import output, tables

if TYPE_CHECKING:
    from lightbus.inspection import Finding

EPILOG = """\b
Examples:
  lightbus doctor billing.bus:app
  lightbus doctor amqp://user:password@host:5672/vhost
  lightbus doctor billing.bus:app --json | jq '.findings[] | select(.level == "fail")'

\b
Exit codes:
  0  nothing has failed (with --strict: nor is there a warning)
  1  something has; each finding names its next step
  2  the command line, or what MODULE:ATTR names, is wrong
"""

_COLOURS = {"ok": "green", "note": "bright_black", "warn": "yellow", "fail": "red"}


@click.command(short_help="What is wrong here, and what to do about it.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR|URL")
@click.option("--strict", is_flag=True, help="Warnings count as failures.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with all findings.")
def doctor(target: str, strict: bool, as_json: bool) -> None:
    """Examine a broker, and an app on it: is it reachable, its version, encryption, are the exchanges and queues as
    the app declares them, does anybody consume, what waits or is dead, may this user do all it must, are clocks right?

    It changes nothing, and no handler hears what it tries (a message of its own, through queues of its own).
    """
    from lightbus import inspection
    from lightbus.cli import logs
    from lightbus.cli import target as targets
    from lightbus.connection import Broker

    logs.configure("error")
    app = None if "://" in target or "@" in target else targets.load_app(target)
    broker = Broker.parse(target) if app is None else app.broker
    findings: list[Finding] = []
    for finding in inspection.examine(broker, app, target):
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


def _show(finding: Finding) -> None:
    from lightbus.cli import logs

    level = f"{finding.level:<4}"
    if logs.in_colour(sys.stdout):
        level = click.style(level, fg=_COLOURS[finding.level])
    output.write(f"{level}  {finding.subject:<12}  {tables.printable(finding.text)}")
    if finding.step:
        output.write(f"{'':<20}-> {tables.printable(finding.step)}")


def _sum_up(findings: list[Finding]) -> None:
    fails, warnings = (sum(one.level == level for one in findings) for level in ("fail", "warn"))
    if not fails and not warnings:
        output.write("\nAll is well.")
    else:
        output.write(f"\n{fails} failed, {warnings} to be warned of. The arrows say what to do next.")
