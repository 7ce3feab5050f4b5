"""What the package is to someone who installs it: names, version, types, a quick import, true documentation."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

pytestmark = pytest.mark.every_case

PUBLIC = {
    "CrossEntropyAux",
    "LinearPlan",
    "LogProbsAux",
    "SparseTargets",
    "cross_entropy_from_probs",
    "distillation_loss",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_log_probs",
    "log_probs",
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


def printed(code: str) -> str:
    """What a fresh interpreter prints that runs it."""
    command = [sys.executable, "-W", "error", "-c", code]
    root = pathlib.Path(jaxce.__file__).parents[1]
    return subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_importing_jaxce_imports_little_else():
    """Nothing that takes long beside its own modules and those of `jax.numpy`, such as Pallas, jet and checkify."""
    code = """
import sys, jax, jax.numpy
before = set(sys.modules)
import jaxce
print(*(set(sys.modules) - before))
"""
    loaded = printed(code).split()
    assert "jaxce.linear" in loaded
    assert not [name for name in loaded if name.startswith("jaxce.diagnostics")]
    others = {name for name in loaded if name.partition(".")[0] not in {"jaxce", *sys.stdlib_module_names}}
    assert others <= {"jax.experimental.layout"}


@pytest.mark.parametrize(
    "statement",
    [
        "import jaxce; diagnostics = jaxce.diagnostics",
        "from jaxce import diagnostics",
        "from jaxce import *",
        "import jaxce.diagnostics as diagnostics",
    ],
)
def test_diagnostics_are_imported_when_they_are_asked_for(statement):
    code = f"{statement}; import jaxce; print(jaxce.diagnostics is diagnostics, diagnostics.bits.__module__)"
    assert printed(code).split() == ["True", "jaxce.diagnostics.chance"]


def test_other_names_are_not_there():
    assert set(printed("import jaxce; print(*dir(jaxce))").split()) >= PUBLIC | {"diagnostics"}
    with pytest.raises(AttributeError, match="module 'jaxce' has no attribute 'softmax_crossentropy'"):
        jaxce.softmax_crossentropy  # noqa: B018


def test_programs_from_before_jet_and_checkify_are_imported():
    """Both interpret programs that JAX remembers, and does not trace again."""
    code = """
import jax, jax.numpy as jnp, jaxce

def program(implementation):
    return jax.jit(lambda z: jaxce.softmax_cross_entropy(z, jnp.array([0, 7]), implementation=implementation))

logits = jnp.array([[1.0, 0.0], [2.0, 0.5]])
default, plain = program(None), program("autodiff")
default(logits), plain(logits)

from jax.experimental import checkify, jet
for f in default, plain:
    print(checkify.checkify(f)(logits)[0].get().partition(",")[0])
slopes = jet.jet(plain, (logits,), ((jnp.ones((2, 2)),),))[1][0]  # 0 along a common offset
print(abs(slopes[0]) < 1e-6, jnp.isnan(slopes[1]))
try:
    jet.jet(default, (logits,), ((logits,),))
except TypeError as error:
    print(error)
"""
    first, second, slopes, error = printed(code).splitlines()
    assert first == second == "targets: label 7 is not one of the 2 classes"
    assert slopes == "True True"
    assert error.startswith("implementation: expected 'autodiff' for forward mode")


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
    for name in PUBLIC - {"CrossEntropyAux", "LogProbsAux"}:
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
