"""How the pages are built: `python -m sphinx -W -c docs . build/docs`, without network.

The source folder is the project's root, so that a page's relative links are the same here and where the files are read
as they lie; `include_patterns` says which of its files are pages.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from nas import __version__

project = "mixnas"
author = "the mixnas authors"
copyright = "the mixnas authors, Apache-2.0"
version = release = __version__
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "benchmarks/*.md",
    "results/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = [".venv", ".git", "build", "dist", "results/*/**"]
templates_path = ["_templates"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # reports begin their tables with smaller headings
default_role = "code"  # docstrings write `names` as Markdown does
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"mixnas {__version__}"
html_additional_pages = {"index": "redirect.html"}  # to the first page, which lies in docs/
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}


def setup(app):
    """A dataclass's `<factory>` is no Python: with it a signature could not be set in lines."""

    def without_factories(app, what, name, obj, options, signature, returned):
        return signature and (signature.replace("<factory>", "{}"), returned)

    app.connect("autodoc-process-signature", without_factories)
