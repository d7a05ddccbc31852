"""Sphinx settings: ``launch/docs.sh`` builds the pages in docs/_build/html."""

from __future__ import annotations

import shardema

project = "shardema"
author = copyright = "the shardema developers"
version = release = shardema.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# the pages need none of them
autodoc_mock_imports = [
    "accelerate",
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "transformers",
    "triton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"shardema {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

myst_heading_anchors = 3
nb_execution_mode = "force"  # tour.ipynb
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds of a cell, also on a machine that is busy
html_extra_path = ["llms.txt"]
default_role = "py:obj"  # the docstrings name things in single backticks
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
