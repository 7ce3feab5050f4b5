"""Calls that a type checker must accept, with the types that it must see. Never run."""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np

import jaxce
from jaxce import CrossEntropyAux, diagnostics

logits, labels = jnp.zeros((4, 10)), np.zeros(4, np.int32)
hidden, kernel = jnp.zeros((4, 8)), jnp.zeros((8, 10))
sparse = jaxce.SparseTargets(np.zeros((4, 2), np.int32), jnp.ones((4, 2)))


class Param:
    """As Flax NNX and Keras have them."""

    def __jax_array__(self) -> jax.Array:
        return kernel


def dense(aux: bool) -> None:
    assert_type(jaxce.softmax_cross_entropy(logits, labels), jax.Array)
    assert_type(jaxce.softmax_cross_entropy(logits=logits, labels=labels), jax.Array)
    assert_type(jaxce.softmax_cross_entropy(np.zeros((4, 10)), sparse, -1, logits > 0), jax.Array)
    assert_type(jaxce.softmax_cross_entropy(logits, logits, (0, 1), return_aux=False, weights=labels), jax.Array)
    assert_type(jaxce.softmax_cross_entropy(logits, labels, return_aux=True), tuple[jax.Array, CrossEntropyAux])
    both = jaxce.softmax_cross_entropy(logits, labels, return_aux=aux)
    assert_type(both, jax.Array | tuple[jax.Array, CrossEntropyAux])
    loss, record = jaxce.softmax_cross_entropy(
        logits,
        labels,
        return_aux=True,
        where=None,
        weights=None,
        class_weights=np.ones(10),
        label_smoothing=0.1,
        ignore_index=-1,
        z_loss=jnp.float32(1e-4),
        logit_softcap=30,
        temperature=jnp.ones(4),
        reduction="mean_count",
        axis_name=None,
        batch_axis_name=("data", "fsdp"),
        implementation="xla",
    )
    assert_type(loss + record.entropy, jax.Array)
    assert_type(jaxce.softmax_cross_entropy_with_integer_labels(logits, labels), jax.Array)
    assert_type(jaxce.cross_entropy_from_probs(logits, labels, reduction="sum"), jax.Array)
    assert_type(
        jaxce.distillation_loss(logits, np.zeros((4, 10)), divergence="jsd", beta=0.1, weights=labels), jax.Array
    )


def linear(aux: bool) -> None:
    assert_type(jaxce.linear_cross_entropy(hidden, Param(), labels, bias=jnp.zeros(10)), jax.Array)
    loss, record = jaxce.linear_cross_entropy(
        hidden, kernel, sparse, return_aux=True, vocab_axis=-1, mode="store", reduction="mean", precision="highest"
    )
    assert_type(loss + record.prediction, jax.Array)
    both = jaxce.linear_cross_entropy(hidden, kernel, labels, return_aux=aux, memory_budget=2**30)
    assert_type(both, jax.Array | tuple[jax.Array, CrossEntropyAux])

    shape = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    plan = jaxce.plan_linear_cross_entropy(
        shape, kernel, jax.ShapeDtypeStruct((4,), np.int32), platform="tpu", weights=shape, return_aux=aux
    )
    assert_type(plan, jaxce.LinearPlan)
    assert_type(jaxce.tune_linear_cross_entropy(shape, kernel, labels, seconds=1, mode="recompute"), jaxce.LinearPlan)
    jaxce.linear_cross_entropy(hidden, kernel, labels, plan=plan)


def post_training(aux: bool) -> None:
    assert_type(jaxce.log_probs(logits, labels, -1, logits > 0, temperature=Param()), jax.Array)
    chosen, record = jaxce.linear_log_probs(hidden, kernel, labels, return_aux=True, vocab_axis=-1, mode="recompute")
    assert_type(chosen + record.tail, jax.Array)
    both = jaxce.log_probs(logits, labels, return_aux=aux, ignore_index=-100, logit_softcap=30)
    assert_type(both, jax.Array | tuple[jax.Array, jaxce.LogProbsAux])


def about_losses() -> None:
    assert_type(diagnostics.perplexity(1.2), jax.Array)
    assert_type(diagnostics.chance_loss(priors=np.ones(10) / 10), jax.Array)
    assert_type(diagnostics.report(logits, labels, weights=np.ones(4)), diagnostics.Report)
