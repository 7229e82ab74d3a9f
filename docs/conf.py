"""How `make docs` makes a site of these pages. It needs nothing from outside: no fonts, no scripts, no inventories."""

import sys
from pathlib import Path

import lightbus

sys.path.insert(0, str(Path(__file__).parent / "site"))

project = "Lightbus"
author = "the authors of Lightbus"
release = version = lightbus.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "as_on_github"]
exclude_patterns = ["_build", "examples", "site"]
nitpicky = True
# What is not ours has no page here.
nitpick_ignore_regex = [("py:.*", r"(?!lightbus\.|errors\.).*")]
# Type variables, and a type that only type checkers meet.
nitpick_ignore = [
    ("py:class", f"lightbus.{name}") for name in ("app.C", "app.F", "app._EventDecorator", "options.R", "testing.bus.E")
]
smartquotes = False
highlight_language = "none"

# --- pages: Markdown as GitHub shows it

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
myst_links_external_new_tab = False

# --- reference: docstrings, in which `this` is code

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
html_theme_options = {"navigation_with_keys": True}
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"
