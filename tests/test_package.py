"""What the package is to someone who installs it: names, version, types, and documentation that is true."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import pathlib
import pkgutil
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

PUBLIC = {
    "CrossEntropyAux",
    "LinearPlan",
    "SparseTargets",
    "cross_entropy_from_probs",
    "linear_cross_entropy",
    "plan_linear_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "tune_linear_cross_entropy",
}
FUNCTIONS = {
    name: function
    for place in (jaxce, jaxce.diagnostics)
    for name in place.__all__
    if inspect.isfunction(function := getattr(place, name))
}
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(jaxce.__path__, "jaxce.") if not info.name.startswith("jaxce.examples")
)


def test_public_names():
    assert set(jaxce.__all__) == PUBLIC | {"diagnostics"}
    assert list(jaxce.__all__) == sorted(jaxce.__all__)
    modules = {name.removeprefix("jaxce.") for name in MODULES} | {"examples"}
    assert {name for name in vars(jaxce) if not name.startswith("_")} - modules == PUBLIC


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", jaxce.__version__)


def test_types_are_shipped():
    """PEP 561: without this file type checkers take no notice of the annotations."""
    assert (pathlib.Path(jaxce.__file__).parent / "py.typed").is_file()


class NearlyEqual(doctest.OutputChecker):
    """Numbers may differ in the last digit of a float32, which changes with the compiler; the rest must be the same."""

    NUMBER = re.compile(r"[-+]?\d+\.\d*(?:e[-+]?\d+)?")

    def check_output(self, want, got, optionflags):
        if " ".join(self.NUMBER.sub("#", want).split()) != " ".join(self.NUMBER.sub("#", got).split()):
            return super().check_output(want, got, optionflags)
        numbers = [[float(x) for x in self.NUMBER.findall(text)] for text in (want, got)]
        return np.allclose(*numbers, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("module", ["jaxce", *MODULES])
def test_doctests(module):
    report: list[str] = []
    with np.printoptions(precision=8, suppress=False, linewidth=75):  # the defaults, as a reader has them
        runner = doctest.DocTestRunner(NearlyEqual())
        for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module)):
            runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_every_public_name_has_a_doctest_or_is_only_returned():
    finder = doctest.DocTestFinder()
    for name in PUBLIC - {"CrossEntropyAux"}:
        examples = [example for test in finder.find(getattr(jaxce, name), name) for example in test.examples]
        assert any("jaxce." in example.source for example in examples), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_have_every_section(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    first, blank = doc.split("\n")[:2]
    assert first.endswith(".")
    assert blank == ""
    assert ".. math::" in doc
    sections = re.findall(r"^(Args|Returns|Raises|Example|Note):$", doc, re.MULTILINE)
    assert sections == ["Args", "Returns", "Raises", "Example", "Note"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_name_every_argument(name):
    function = FUNCTIONS[name]
    args = inspect.getdoc(function).split("\nArgs:\n")[1].split("\nReturns:\n")[0]
    documented = re.findall(r"^  (\w+(?:, \w+)*): ", args, re.MULTILINE)
    names = [n for entry in documented for n in entry.split(", ")]
    assert names == list(inspect.signature(function).parameters)


def test_signatures_are_those_of_optax():
    """Code with optax's positional arguments runs with the import changed."""
    optax = pytest.importorskip("optax")
    for name in ("softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"):
        theirs = list(inspect.signature(getattr(optax, name)).parameters.values())
        accepted = inspect.signature(getattr(jaxce, name)).parameters
        ours = list(accepted.values())[: len(theirs)]
        # Theirs may come as `labels` instead of `targets`, so neither has to be there; one of them does.
        assert [p.default for p in ours if p.name != "targets"] == [
            p.default for p in theirs if name.endswith("labels") or p.name != "labels"
        ]
        assert [p.kind for p in ours] == [p.kind for p in theirs]
        assert {p.name for p in theirs} <= set(accepted)
        # The targets have another name in one of them: they are more than probabilities here.
        assert [p.name for p in ours if p.name != "targets"] == [
            p.name for p in theirs if name.endswith("labels") or p.name != "labels"
        ]
    assert jaxce.softmax_cross_entropy(jnp.zeros((2, 3)), jnp.full((2, 3), 1 / 3), -1, None).shape == (2,)


def test_the_options_after_the_targets_are_keywords():
    for name in ("softmax_cross_entropy", "cross_entropy_from_probs"):
        parameters = inspect.signature(getattr(jaxce, name)).parameters
        assert parameters["weights"].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters["reduction"].default == "none"


@pytest.mark.parametrize("module", ["jaxce", *MODULES])
def test_every_module_says_what_it_is_for(module):
    source = pathlib.Path(importlib.import_module(module).__file__).read_text()
    assert len(ast.get_docstring(ast.parse(source)).split("\n")[0]) > 20
