"""docs/howto/activemq.md lists what is impossible on Artemis: each reason for which a conformance test is skipped."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "activemq.md"
MARKER = "pytest.mark.impossible_on_artemis"
MOST = 10


def marked() -> Iterator[tuple[str, str, int]]:
    """The name of each marked test of tests/conformance, its reason, and its number of parametrized variants."""
    for path in sorted((ROOT / "tests" / "conformance").glob("test_*.py")):
        found = 0
        for test in ast.walk(ast.parse(path.read_text())):
            if not isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            decorators = [each for each in test.decorator_list if isinstance(each, ast.Call)]
            variants = [
                len(ast.literal_eval(each.args[1])) for each in decorators if ends(each, "pytest.mark.parametrize")
            ]
            for each in decorators:
                if ends(each, MARKER):
                    found += 1
                    yield test.name, ast.literal_eval(each.args[0]), math.prod(variants)
        assert found == path.read_text().count("impossible_on_artemis"), f"{path.name}: not all markers are decorators"


def ends(call: ast.Call, name: str) -> bool:
    return ast.unparse(call.func) == name


def reasons_on_the_page() -> set[str]:
    _, _, section = PAGE.read_text().partition("\n## What is impossible\n")
    rows = re.findall(r"^\| (.+?) \|", section.partition("\n## ")[0], re.MULTILINE)
    return {normal(each) for each in rows} - {"on artemis"}


def normal(text: str) -> str:
    return " ".join(text.replace("`", "").lower().split())


def test_the_page_lists_each_reason_of_a_skipped_conformance_test_and_no_other() -> None:
    assert reasons_on_the_page() == {normal(reason) for _, reason, _ in marked()}


def test_at_most_ten_conformance_tests_are_skipped_on_artemis_and_the_page_has_their_number() -> None:
    skipped = sum(variants for _, _, variants in marked())
    assert 0 < skipped <= MOST
    words = ("None", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    assert f" {words[skipped]} are skipped, for these reasons:" in PAGE.read_text().replace("\n", " ")
