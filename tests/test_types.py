"""What the types of public arguments say: the same names everywhere; and variables of frameworks, taken as arrays."""

import inspect
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxce
from jaxce import diagnostics, linear, log_probabilities, softmax, types
from jaxce.linear import log_probabilities as linear_log_probabilities

pytestmark = pytest.mark.every_case
LABELS = np.array([0, 2, 1, 1])


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (jaxce.softmax_cross_entropy, softmax.DenseOptions),
        (jaxce.linear_cross_entropy, linear.LinearOptions),
        (jaxce.log_probs, log_probabilities.DenseOptions),
        (jaxce.linear_log_probs, linear_log_probabilities.LinearOptions),
    ],
    ids=["dense", "linear", "log_probs", "linear_log_probs"],
)
def test_an_editor_is_told_of_every_option(function, options):
    """Each overload takes the options of the function itself, and no others."""
    parameters = inspect.signature(function).parameters
    ways = typing.get_overloads(inspect.unwrap(function))
    assert len(ways) == 3  # a record is asked for, is not, or may be
    for way in ways:
        named = dict(inspect.signature(way).parameters)
        assert "Unpack" in str(named.pop("options").annotation)
        assert set(named) | set(options.__annotations__) == set(parameters)
        assert all(parameters[n].default == p.default for n, p in named.items() if n != "return_aux")
    assert not options.__required_keys__


def test_the_modes_have_their_methods():
    assert typing.get_args(types.Mode) == linear.plans.MODES


class Variable:
    """What Keras variables and those of Flax NNX have in common."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


def calls():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 5), (5, 3)))
    weights, by_class = jnp.arange(4.0), jnp.arange(1.0, 4)
    labels, probs = jnp.asarray(LABELS), jax.nn.softmax(logits)
    options = {"weights": weights, "class_weights": by_class, "temperature": weights + 1, "where": logits < 9}
    sparse = jaxce.SparseTargets(labels[:, None], weights[:, None])
    return {
        "dense": (jaxce.softmax_cross_entropy, (logits, labels), options | {"label_smoothing": jnp.float32(0.1)}),
        "probabilities": (jaxce.softmax_cross_entropy, (logits, probs), {"z_loss": jnp.float32(0.1)}),
        "integer": (jaxce.softmax_cross_entropy_with_integer_labels, (logits, labels), {}),
        "given probabilities": (jaxce.cross_entropy_from_probs, (probs, labels), {"weights": weights}),
        "distillation": (jaxce.distillation_loss, (logits, -logits), {"weights": weights, "temperature": weights + 1}),
        "linear": (jaxce.linear_cross_entropy, (hidden, kernel, labels), options | {"bias": by_class}),
        "sparse": (jaxce.linear_cross_entropy, (hidden, kernel, sparse), {"mode": "store", "reduction": "mean"}),
        "log_probs": (jaxce.log_probs, (logits, labels), {"temperature": weights + 1}),
        "linear_log_probs": (jaxce.linear_log_probs, (hidden, kernel, labels), {"bias": by_class, "return_aux": True}),
        "plan": (jaxce.plan_linear_cross_entropy, (hidden, kernel, labels), options),
        "perplexity": (diagnostics.perplexity, (weights,), {}),
        "report": (lambda *x, **o: diagnostics.report(*x, **o).loss, (logits, labels), {"weights": weights}),
        "calibration": (diagnostics.calibration, (logits, labels), {"weights": weights}),
        "brier": (diagnostics.brier, (logits, labels), {}),
        "temperature": (diagnostics.fit_temperature, (logits, labels), {}),
        "summary": (diagnostics.summarize, (logits, labels), {}),
    }


@pytest.mark.parametrize("name", calls())
def test_a_variable_is_its_array(name):
    function, arguments, options = calls()[name]

    def held(x):
        if isinstance(x, jaxce.SparseTargets):
            return jaxce.SparseTargets(Variable(x.indices), Variable(x.probs))
        return Variable(x) if isinstance(x, jax.Array) else x

    wanted = function(*arguments, **options)
    got = function(*map(held, arguments), **{n: held(x) for n, x in options.items()})
    if isinstance(wanted, jaxce.LinearPlan):
        assert got == wanted
    else:
        chex.assert_trees_all_equal(got, wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_the_parameters_of_flax_nnx(tied):
    """Under its own transforms, as if the arrays had been given."""

    class Model(nnx.Module):
        def __init__(self):
            self.embedding = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32))
            self.scale = nnx.Param(jnp.ones(3))

    model, hidden = Model(), jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)

    def loss(model):
        if tied:
            return jaxce.linear_cross_entropy(hidden, model.embedding, LABELS, vocab_axis=0, bias=model.scale).sum()
        return jaxce.softmax_cross_entropy(hidden @ model.embedding.T, LABELS, class_weights=model.scale).sum()

    class Arrays(typing.NamedTuple):
        embedding: jax.Array
        scale: jax.Array

    wanted = jax.grad(loss)(Arrays(jnp.asarray(model.embedding[...]), jnp.asarray(model.scale[...])))
    got = nnx.jit(nnx.grad(loss))(model)
    np.testing.assert_allclose(got.embedding[...], wanted.embedding, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.scale[...], wanted.scale, rtol=1e-5, atol=1e-6)
