"""How Sphinx builds the manual: `make docs` writes it to build/docs."""

from atomcli.version import __version__

project = "atom"
release = __version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"atom {release}"
root_doc = "index"
exclude_patterns = ["conf.py"]
myst_heading_anchors = 3
# Links that leave the manual (the changelog, recipes, directories) are for readers of the repository.
suppress_warnings = ["myst.xref_missing"]
