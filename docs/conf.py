"""Configuration of the site that `make docs` builds. The site loads nothing from elsewhere: no fonts, no scripts."""

import sys
import tomllib
from pathlib import Path

import lightbus

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs" / "site"), str(ROOT)]

project = "Lightbus"
author = "the authors of Lightbus"
release = version = lightbus.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "as_on_github",
    "repository",
]
exclude_patterns = ["_build", "examples", "site"]
nitpicky = True
# Names of other packages have no page here.
nitpick_ignore_regex = [("py:.*", r"(?!lightbus\.|errors\.).*")]
# Type variables, a type that only type checkers use, protocols between the parts of Lightbus, and a worker.
nitpick_ignore = [
    ("py:class", f"lightbus.{name}")
    for name in (
        *("app.C", "app.F", "app.M", "app.Observer", "app.P", "app._EventDecorator"),
        *("handler.Inbox", "options.R", "outbox.store.Store", "testing.bus.E"),
        *("worker.services.ServiceRunner", "worker.worker.Worker"),
    )
]
smartquotes = False
highlight_language = "none"

# --- pages: Markdown that GitHub can show

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
myst_links_external_new_tab = False

# --- reference: docstrings in which `this` is code

default_role = "code"
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# --- the site

html_theme = "furo"
html_title = f"Lightbus {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_favicon = "site/static/favicon.svg"
html_theme_options = {
    "navigation_with_keys": True,
    "light_logo": "logo-light.svg",
    "dark_logo": "logo-dark.svg",
}
templates_path = ["site/templates"]
# The theme's parts without those for Read the Docs, and with a link to the repository.
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "repository.html",
        "sidebar/scroll-end.html",
    ]
}
# The repository's URL: `Repository` in [project.urls] of pyproject.toml. Without it, the site has no link to it.
repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {}).get("Repository", "")

# --- copy buttons: of commands, without prompt and output

copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"
