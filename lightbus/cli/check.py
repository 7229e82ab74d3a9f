"""`lightbus check`: what a change of an app breaks, before it is deployed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lightbus.cli import output, tables

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.catalog.catalog import Catalog
    from lightbus.catalog.compatibility import Break
    from lightbus.catalog.contract import Contract

EPILOG = """\b
Examples:
  lightbus check billing.bus:app
  lightbus check billing.bus:app --against catalog.json      (without a broker, as in CI)
  lightbus check billing.bus:app --against catalog.json --json | jq -r '.breaks[].handler'

\b
Write the file with: lightbus catalog --format json > catalog.json

\b
Exit codes:
  0  nothing breaks
  1  at least one handler breaks
  2  nothing was checked: the command line, MODULE:ATTR or the file is invalid, or the broker is not usable
"""

TITLES = {"break": "breaks", "before": "before", "note": "note"}


@click.command(short_help="What a change of an app breaks, before it is deployed.", epilog=EPILOG)
@click.argument("target", metavar="MODULE:ATTR")
@click.option(
    "--against",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A snapshot of the contracts of all apps (of lightbus catalog --format json), in the place of the broker's.",
)
@click.option("--json", "as_json", is_flag=True, help="A JSON object: app, breaks, before, notes, missing.")
@click.pass_context
def check(ctx: click.Context, target: str, file: Path | None, as_json: bool) -> None:
    """Check this code of an app against the contracts of all apps: which handler can no longer read an event?

    Checked are the events that the app publishes, with the handlers of all apps that get them, and the events that its
    own handlers get. A problem that the app's deployed contract has as well is shown as `before`, and does not fail.
    """
    from lightbus import errors
    from lightbus.catalog import compatibility
    from lightbus.catalog.contract import contract_of
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    try:
        app = targets.load_app(target)
        catalog = _catalog(app, file)
        contract = contract_of(app)
    except errors.LightbusError as error:  # 1 is a result
        logs.show_error(str(error))
        ctx.exit(2)
    found = compatibility.check(contract, catalog)
    missing = list(_missing(contract, catalog))
    if as_json:
        output.write(json.dumps(_described(contract, found, missing), indent=1))
    else:
        output.write("\n".join(_lines(contract, catalog, found, missing)))
    ctx.exit(1 if any(one.verdict == "break" for one in found) else 0)


def _catalog(app: Lightbus, file: Path | None) -> Catalog:
    """The contracts of all apps: of a snapshot, or of the app's broker.

    Raises:
        errors.CatalogError: they cannot be read.
        errors.BrokerError: the broker is not usable.
    """
    from lightbus.catalog import catalog

    return _from_broker(app) if file is None else catalog.from_file(file)


def _from_broker(app: Lightbus) -> Catalog:
    from lightbus.catalog import storage

    return storage.read(app.broker)


def _missing(contract: Contract, catalog: Catalog) -> Iterator[str]:
    """What the catalogue does not have, so that it cannot be compared: in sentences."""
    if catalog.contract(contract.app) is None:
        yield (
            f"The catalogue has no contract of {contract.app}: every problem counts as new, and removed events are not "
            "found."
        )
    if not any(one.app != contract.app for one in catalog.contracts):
        yield "The catalogue has no contract of another app: only this app's own handlers are checked."
    for one in catalog.ignored:
        if catalog.contract(one.writer) is None and one.writer:
            yield f"The contract of {one.writer} is ignored, so its handlers are not checked: {one.reason}"


# --- as text ----------------------------------------------------------------------------------


def _lines(contract: Contract, catalog: Catalog, found: list[Break], missing: list[str]) -> Iterator[str]:
    for one in found:
        yield tables.printable(f"{TITLES[one.verdict]}: {_place(one)}: {one.what}. {one.next}", 1_000)
    yield from (tables.printable(f"note: {one}", 1_000) for one in missing)
    breaks = [one for one in found if one.verdict == "break"]
    handlers = {one.handler for one in breaks}
    apps = len(catalog.replaced(contract).contracts)
    where = f"{contract.app}: checked against {apps - 1:,} other {'app' if apps == 2 else 'apps'}"
    if breaks:
        yield f"{where}. Breaks {len(handlers):,} {'handler' if len(handlers) == 1 else 'handlers'}."
    else:
        yield f"{where}. Nothing breaks."


def _place(one: Break) -> str:
    parts = [one.event, f"field {one.field}" if one.field else "", f"handler {one.handler}" if one.handler else ""]
    return ", ".join(filter(None, parts))


# --- as JSON ----------------------------------------------------------------------------------


def _described(contract: Contract, found: list[Break], missing: list[str]) -> dict[str, object]:
    import attrs

    def those(verdict: str) -> list[dict[str, object]]:
        return [attrs.asdict(one, filter=attrs.filters.exclude("verdict")) for one in found if one.verdict == verdict]

    return {
        "app": contract.app,
        "breaks": those("break"),
        "before": those("before"),
        "notes": those("note"),
        "missing": missing,
    }
