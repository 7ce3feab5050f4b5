"""Classes masked by a large negative number, as many models mask them, are as good as not there: in every loss.

By −1e9, by the smallest number of the dtype, by −inf; one here and there, and all that a block or a device has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import SparseTargets
from jaxce.linear import distillation
from tests.test_axis_name import mesh_of
from tests.test_linear import blocks

EPS = float(np.finfo(np.float32).eps)
N, D, V = 5, 4, 24
MASKED = np.isin(np.arange(V), [0, 4, *range(15, V)])  # all of the last 6 classes, a block's or a device's, and others
KEPT = np.flatnonzero(~MASKED)
FILLS = np.float32([-1e9, -1e30, np.finfo(np.float32).min, -np.inf])
PLACES = {
    "index": ("one device", "autodiff", "split", "recompute", "store"),
    "probs": ("one device", "split", "store"),
    "sparse": ("autodiff", "recompute"),
    "log_probs": ("one device", "split", "recompute"),
    "forward_kl, whole": ("one device", "split", "recompute"),
    "reverse_kl, whole": ("autodiff", "store"),
    "jsd, whole": ("split", "store"),
    "forward_kl, top-K": ("autodiff", "split"),
    "reverse_kl, top-K": ("one device", "recompute"),
    "jsd, top-K": ("split",),
}


def targets_of(form: str, classes: np.ndarray, v: int, rng: np.random.Generator):
    """The targets or ids of v classes, of which these take part."""
    entries = classes[np.stack([rng.permutation(len(classes))[:3] for _ in range(N)])]
    shares = rng.dirichlet(np.ones(4), N).astype(np.float32)[:, :3]
    probs = np.zeros((N, v), np.float32)
    probs[:, classes] = rng.dirichlet(np.ones(len(classes)), N)
    if form == "probs":
        return probs
    if form in ("sparse", "log_probs") or form.endswith("top-K"):
        return entries if form == "log_probs" else SparseTargets(entries, shares)
    return entries[:, 0]


def loss_of(form: str, place: str, targets):
    """Of a student's and a teacher's logits, or hidden states, kernel and bias, and a temperature: every output."""
    linear = place in ("recompute", "store")
    prefix = "linear_" if linear else ""
    options = {"implementation": "autodiff"} if place == "autodiff" else {"axis_name": "v"} if place == "split" else {}
    if linear and form != "log_probs":
        options["reduction"] = "mean"
    if linear and "," in form:
        options["mode"] = place

    def outputs(student, teacher, temperature):
        given = options | {"temperature": temperature}
        own = targets
        if place == "split" and form == "probs":
            own = lax.dynamic_slice_in_dim(jnp.asarray(targets), lax.axis_index("v") * (V // 4), V // 4, 1)
        if linear:
            *student, given["bias"] = student
        if form == "log_probs":
            return getattr(jaxce, f"{prefix}log_probs")(*student, own, return_aux=True, **given)
        if "," not in form:
            name = "linear_cross_entropy" if linear else "softmax_cross_entropy"
            return getattr(jaxce, name)(*student, own, return_aux=True, z_loss=0.02, **given)
        if form.endswith("whole") and linear:
            *of_teacher, given["teacher_bias"] = teacher
        else:
            of_teacher = teacher if form.endswith("whole") else (own,)
        return getattr(jaxce, f"{prefix}distillation_loss")(
            *student, *of_teacher, divergence=form.split(",")[0], **given
        )

    return outputs


def floats_of(outputs):
    return [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize(("form", "place"), [(form, place) for form, places in PLACES.items() for place in places])
def test_masked_by_a_large_negative_number(rng, form, place, monkeypatch):
    monkeypatch.setattr(distillation.costs, "LANES", 1)  # blocks of 4 classes
    monkeypatch.setattr(distillation, "_PART", dict.fromkeys(distillation._PART, 1))
    linear = place in ("recompute", "store")
    student, teacher = ((3 * rng.normal(size=(N, V)).astype(np.float32),) for _ in range(2))
    if linear:
        student, teacher = (
            tuple(rng.normal(size=shape).astype(np.float32) for shape in ((N, D), (D, V), (V,))) for _ in range(2)
        )
    temperature = rng.uniform(0.3, 2, N).astype(np.float32)
    seed = rng.integers(1000)
    everything, of_kept = (
        loss_of(form, place if v == V else {"split": "one device"}.get(place, place), targets)
        for v, targets in (
            (V, targets_of(form, KEPT, V, np.random.default_rng(seed))),
            (len(KEPT), targets_of(form, np.arange(len(KEPT)), len(KEPT), np.random.default_rng(seed))),
        )
    )
    if place == "split":
        split = (P(None, "v"),)
        everything = jax.shard_map(everything, mesh=mesh_of(4), in_specs=(split, split, P()), out_specs=P())

    def with_gradients(outputs, cotangents):
        """The outputs; the gradients of a sum of them; and the derivative of that in the student along a direction."""

        def total(student, teacher, temperature):
            found = floats_of(outputs(student, teacher, temperature))
            return sum(jnp.vdot(c, x) for c, x in zip(cotangents, found, strict=True)), found

        def run(student, teacher, temperature, along):
            (_, found), gradients = jax.value_and_grad(total, (0, 2), has_aux=True)(student, teacher, temperature)
            if "," in form and linear:
                return found, *gradients, None
            slope = jax.grad(lambda student: total(student, teacher, temperature)[0])
            return found, *gradients, jax.jvp(slope, (student,), (along,))[1]

        return jax.jit(run)

    def kept(model):
        return tuple(x[..., KEPT] if x.shape[-1] == V else x for x in model)

    def others(model):
        return tuple(x[..., MASKED] for x in model if x.shape[-1] == V)

    along = tuple(rng.normal(size=x.shape).astype(np.float32) for x in student)
    with blocks(place, 4, 6) if linear else blocks("recompute"):
        few = kept(student), kept(teacher), temperature
        shapes = [x.shape for x in floats_of(jax.eval_shape(of_kept, *few))]
        cotangents = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
        wanted = with_gradients(of_kept, cotangents)(*few, kept(along))
        program = with_gradients(everything, cotangents)
        for fill in FILLS:
            masked = ((*m[:-1], np.where(MASKED, fill, m[-1])) for m in (student, teacher))
            found, gradients, in_temperature, second = program(*masked, temperature, along)
            unused = others(gradients), second and others(second)
            assert not any(np.any(x) for x in jax.tree.leaves(unused)), fill  # NaN neither
            found = found, kept(gradients), in_temperature, second and kept(second)
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(x, y, atol=1000 * EPS * np.max(np.abs(y)), err_msg=str(fill))
