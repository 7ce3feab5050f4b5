"""Sphinx builds these pages, the reference from the docstrings: `make docs`. No page loads anything from elsewhere."""

import pathlib
import re
import shutil

import ziamath
from docutils import nodes
from latex2mathml.converter import convert

import jaxce

ROOT = pathlib.Path(__file__).parents[1]

# Sphinx reads what is below this folder. (A symbolic link would do, but links between pages would not work.)
shutil.rmtree(ROOT / "docs/notebooks", ignore_errors=True)
shutil.copytree(
    ROOT / "notebooks", ROOT / "docs/notebooks", ignore=shutil.ignore_patterns("*.py", ".ipynb_checkpoints")
)

project = "jaxce"
author = copyright = "The jaxce authors"
version = release = jaxce.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
default_role = "py:obj"  # `name` in a docstring: a link where it is a public name, code otherwise

html_theme = "furo"
html_title = f"jaxce {version}"
html_static_path = ["static", str(pathlib.Path(ziamath.__file__).parent / "fonts/STIXTwoMath-Regular.ttf")]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
pygments_dark_style = "monokai"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say which shapes and dtypes
napoleon_numpy_docstring = False
# As they are written: a Returns section is a sentence, not "type: description", and attributes may share a line.
napoleon_custom_sections = ["Returns", ("Attributes", "params_style")]
napoleon_attr_annotations = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
nb_execution_mode = "off"  # the notebooks are committed with their outputs: `make notebooks`


def mathml(node, display):
    """A formula as MathML, which browsers show without a script.

    With the thin space that follows log and ln, and bars as high as what they are around.
    """
    found = convert(node.astext(), display=display)
    found = re.sub("(?<!<msub>)<mi>(log|ln)</mi>", r'\g<0><mspace width="0.17em"></mspace>', found)
    return found.replace("<mo>&#x0007C;</mo>", '<mo stretchy="false" lspace="0" rspace="0">|</mo>')


def inline_formula(translator, node):
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def displayed_formula(translator, node):
    translator.body.append(f'<div class="formula">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
