"""A Sphinx extension: a link to the repository, if the configuration value `repository` has its address."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def add_to_context(app: Sphinx, page: str, template: str, context: dict[str, Any], document: object) -> None:
    context["repository"] = app.config.repository


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("repository", "", "html", types=[str])
    app.connect("html-page-context", add_to_context)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
