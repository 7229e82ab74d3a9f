"""A Sphinx extension: the links to the repository, if the configuration value `repository` has its address."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config


def link_pages(app: Sphinx, config: Config) -> None:
    """Above each page, the theme links to its source."""
    if config.repository:
        config.html_theme_options |= {
            "source_repository": config.repository,
            "source_branch": "main",
            "source_directory": "docs/",
        }


def add_to_context(app: Sphinx, page: str, template: str, context: dict[str, Any], document: object) -> None:
    context["repository"] = app.config.repository


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("repository", "", "html", types=[str])
    app.connect("config-inited", link_pages)
    app.connect("html-page-context", add_to_context)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
