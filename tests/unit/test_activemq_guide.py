"""docs/howto/activemq.md lists what is impossible on Artemis: each reason for which a conformance test is skipped."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path

from lightbus.transport.activemq import broker_xml
from lightbus.transport.activemq.names import BUS
from lightbus.transport.activemq.selector import clause, selector

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "activemq.md"
MARKER = "pytest.mark.impossible_on_artemis"
MOST = 10


def marked() -> Iterator[tuple[str, int]]:
    """The reason of each marked test of tests/conformance, and its number of parametrized variants."""
    for path in sorted((ROOT / "tests" / "conformance").glob("test_*.py")):
        text = path.read_text()
        found = 0
        for test in ast.walk(ast.parse(text)):
            if not isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            calls = [each for each in test.decorator_list if isinstance(each, ast.Call)]
            named = [(ast.unparse(each.func), each) for each in calls]
            for marker in (each for name, each in named if name == MARKER):
                found += 1
                variants = [len(listed(each)) for name, each in named if name == "pytest.mark.parametrize"]
                yield ast.literal_eval(marker.args[0]), math.prod(variants)
        assert found == text.count("impossible_on_artemis"), f"{path.name}: only decorators are counted"


def listed(parametrize: ast.Call) -> list[ast.expr]:
    values = parametrize.args[1]
    assert isinstance(values, ast.List | ast.Tuple), "only a literal list can be counted"
    return values.elts


def reasons_on_the_page() -> set[str]:
    _, _, section = PAGE.read_text().partition("\n## What is impossible\n")
    rows = re.findall(r"^\| (.+?) \|", section.partition("\n## ")[0], re.MULTILINE)
    return {normal(each) for each in rows} - {"on artemis"}


def normal(text: str) -> str:
    return " ".join(text.replace("`", "").lower().split())


def test_the_page_lists_each_reason_of_a_skipped_conformance_test_and_no_other() -> None:
    assert reasons_on_the_page() == {normal(reason) for reason, _ in marked()}


def test_at_most_ten_conformance_tests_are_skipped_on_artemis_and_the_page_has_their_number() -> None:
    skipped = sum(variants for _, variants in marked())
    assert 0 < skipped <= MOST
    words = ("None", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    assert f" {words[skipped]} are skipped, for these reasons:" in PAGE.read_text().replace("\n", " ")


def test_figures_and_settings_on_the_page_are_those_of_the_printed_parts() -> None:
    text = PAGE.read_text()
    acceptors = re.findall(r"<acceptor name=.*\?(.*)</acceptor>", text)
    assert len(acceptors) == 2
    assert all(options.startswith(broker_xml.ACCEPTOR_OPTIONS) for options in acceptors)
    assert f"after {broker_xml.DELIVERY_ATTEMPTS} counted deliveries" in text
    assert f"the newest {broker_xml.CATALOG_SIZE:,} contracts, for {broker_xml.CATALOG_DAYS} days" in text
    assert f"{broker_xml.SHARED_ROLE} = auth,billing,welcome" in text
    assert f"{broker_xml.app_role('billing')} = billing" in text
    (shown,) = re.findall(r"<queue name=.*", text)
    element = broker_xml.queues({"billing.main": selector([clause(BUS, "invoice.paid")])})
    assert shown.partition("...")[0] in element
