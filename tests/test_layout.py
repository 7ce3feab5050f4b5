"""Imports go one way, importing jaxce starts nothing, and class axes move to the end along with their masks."""

from __future__ import annotations

import ast
import importlib
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce import layout
from jaxce.arguments import Examples

PACKAGE = pathlib.Path(jaxce.__file__).parent

# Each module may import those before it. A new module has to be given its place here.
ORDER = [
    "jaxce.primitives",
    "jaxce.versions",
    "jaxce.checks",
    "jaxce.types",
    "jaxce.selection",
    "jaxce.label_check",
    "jaxce.on_cpu",
    "jaxce.serialization",
    "jaxce.sharding",
    "jaxce.reverse_mode",
    "jaxce.stats",
    "jaxce.targets",
    "jaxce.arguments",
    "jaxce.lookup",
    "jaxce.sums",
    "jaxce.divergence",
    "jaxce.compose",
    "jaxce.layout",
    "jaxce.autodiff",
    "jaxce.gradient",
    "jaxce.softmax",
    "jaxce.log_probabilities",
    "jaxce.distillation",
    "jaxce.linear.blocks",
    "jaxce.linear.mesh",
    "jaxce.linear.vocabulary",
    "jaxce.linear.chips",
    "jaxce.linear.costs",
    "jaxce.linear.pallas_tpu",
    "jaxce.linear.recompute",
    "jaxce.linear.store",
    "jaxce.linear.plan",
    "jaxce.linear.arguments",
    "jaxce.linear",
    "jaxce.linear.log_probabilities",
    "jaxce.linear.distillation",
    "jaxce.linear.tune",
    "jaxce.probs",
    "jaxce.diagnostics.chance",
    "jaxce.diagnostics.outcomes",
    "jaxce.diagnostics.reliability",
    "jaxce.diagnostics.temperature",
    "jaxce.diagnostics.summary",
    "jaxce.diagnostics.findings",
    "jaxce.diagnostics.plots",
    "jaxce.diagnostics.reporting",
    "jaxce.diagnostics",
    "jaxce",
    "jaxce.info",
    "jaxce.examples",
    "jaxce.examples.common",
    "jaxce.examples.cifar10",
    "jaxce.examples.cifar10.data",
    "jaxce.examples.cifar10.convolution",
    "jaxce.examples.cifar10.model",
    "jaxce.examples.cifar10.checkpoint",
    "jaxce.examples.cifar10.training",
    "jaxce.examples.cifar10.report",
    "jaxce.examples.cifar10.program",
    "jaxce.examples.cifar10.__main__",
    "jaxce.examples.language_model",
    "jaxce.examples.language_model.data",
    "jaxce.examples.language_model.model",
    "jaxce.examples.language_model.processes",
    "jaxce.examples.language_model.report",
    "jaxce.examples.language_model.training",
    "jaxce.examples.language_model.distillation",
    "jaxce.examples.language_model.preferences",
    "jaxce.examples.language_model.program",
    "jaxce.examples.language_model.__main__",
]
RUNTIME = {"jax", "jaxlib", "numpy"}
OPTIONAL = {"jaxce.diagnostics.plots": {"matplotlib"}}  # imported only when they are asked for


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: pathlib.Path, package: str) -> set[str]:
    """The full names of the modules that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from jaxce import checks` imports the module jaxce.checks, not what is in jaxce/__init__.py
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return names


def test_every_module_has_a_place():
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    own = {name for name in imports(MODULES[module], package) if name.split(".")[0] == "jaxce"}
    upward = own.difference(ORDER[: ORDER.index(module)])
    assert not upward, f"{module} imports {upward}, which come after it"


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("jaxce.examples")])
def test_runtime_dependencies(module):
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    roots = {name.split(".")[0] for name in imports(MODULES[module], package)}
    assert roots <= RUNTIME | OPTIONAL.get(module, set()) | {"jaxce"} | sys.stdlib_module_names


def test_public_names_live_in_jaxce_alone():
    """__init__.py holds names, nothing else; one of them in an `if`, as it is imported when it is asked for."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Import, ast.Assign, ast.If}
    assert [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)] == ["__version__", "__all__"]


def test_importing_jaxce_starts_no_backend():
    """A program must still be able to choose devices after it has imported jaxce (jax.distributed, XLA_FLAGS)."""
    code = "import jaxce; from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)


# --- the functions of layout.py -------------------------------------------------------------------------------------


def numpy_classes_last(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """An independent way to say it: index by index."""
    batch = [i for i in range(x.ndim) if i not in axes]
    shape = [x.shape[i] for i in batch]
    out = np.empty((*shape, int(np.prod([x.shape[i] for i in axes]))), x.dtype)
    for b in np.ndindex(*shape):
        for flat, c in enumerate(np.ndindex(*(x.shape[i] for i in axes))):
            at = dict(zip(batch, b, strict=True)) | dict(zip(axes, c, strict=True))
            out[(*b, flat)] = x[tuple(at[i] for i in range(x.ndim))]
    return out


AXES = [(3,), (0,), (1,), (2, 3), (3, 2), (0, 2), (3, 0, 1), (0, 1, 2, 3), (2, 0, 3, 1)]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("with_indices", [False, True])
def test_classes_last(axes, with_indices):
    shape = (2, 3, 4, 5)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    indices = jnp.zeros((7, 1), jnp.int32) if with_indices else None  # these have no class axis: they stay
    examples = Examples(indices=indices, probs=jnp.asarray(-x), where=jnp.asarray(x % 3 == 0))
    logits, moved = layout.classes_last(jnp.asarray(x), examples, axes)
    wanted = numpy_classes_last(x, axes)
    np.testing.assert_array_equal(logits, wanted)
    np.testing.assert_array_equal(moved.where, wanted % 3 == 0)
    assert moved.indices is indices
    np.testing.assert_array_equal(moved.probs, -x if with_indices else -wanted)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 5), (2, 1, 1, 1), (1, 3, 4, 1), (1, 1, 1, 1), (2, 3, 4, 5)])
def test_masks_still_broadcast_to_the_logits(axes, mask_shape, rng):
    shape = (2, 3, 4, 5)
    mask = rng.random(mask_shape) < 0.6
    moved = layout.classes_last(jnp.zeros(shape), Examples(where=jnp.asarray(mask)), axes)[1].where
    wanted = numpy_classes_last(np.broadcast_to(mask, shape), axes)
    assert moved.ndim == wanted.ndim
    np.testing.assert_array_equal(jnp.broadcast_to(moved, wanted.shape), wanted)
    count = layout.class_count(moved, wanted.shape)
    assert count.dtype == jnp.int32
    np.testing.assert_array_equal(count, wanted.sum(-1))


def test_without_a_mask_there_is_none():
    assert layout.classes_last(jnp.zeros((2, 3)), Examples(), (1,))[1].where is None


@pytest.mark.parametrize("axes", [(0,), (2, 3), (3, 0, 1), (2, 0, 3, 1)])
@pytest.mark.parametrize("kind", ["index", "probs"])
def test_the_loss_along_any_axes(axes, kind, rng):
    """Index targets are row-major numbers of the classes; probabilities and gradients keep the shape of logits."""
    shape = (2, 3, 4, 5)
    x = rng.normal(size=shape).astype(np.float32)
    moved = numpy_classes_last(x, axes)
    if kind == "index":
        targets = moved_targets = rng.integers(0, moved.shape[-1], moved.shape[:-1]).astype(np.int32)
    else:
        targets = rng.random(shape).astype(np.float32)
        moved_targets = numpy_classes_last(targets, axes)

    def mean(z, t, axis):
        return jaxce.softmax_cross_entropy(z, t, axis, label_smoothing=0.1, reduction="mean")

    value, grad = jax.value_and_grad(mean)(x, targets, axes)
    wanted, wanted_grad = jax.value_and_grad(mean)(moved, moved_targets, -1)
    # Each is within 16 ε of the truth, but may sum in another order.
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(value, wanted, rtol=32 * eps)
    np.testing.assert_allclose(
        numpy_classes_last(np.asarray(grad), axes), wanted_grad, atol=32 * eps * np.abs(wanted_grad).max()
    )
