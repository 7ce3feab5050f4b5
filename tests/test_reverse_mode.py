"""Forward mode of the default says what to do instead; everything that is made of reverse mode works."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

LABELS = jnp.array([0, 1])
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
POINT = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])


def linear(mode):
    return lambda h: jaxce.linear_cross_entropy(h, KERNEL, LABELS, reduction="mean", mode=mode)


LOSSES = {
    "dense": lambda z: jaxce.softmax_cross_entropy(z, LABELS, reduction="mean"),
    "recompute": linear("recompute"),
    "store": linear("store"),
}
FORWARD = {
    "jvp": lambda f: jax.jvp(f, (POINT,), (POINT,)),
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(POINT),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (POINT,), (POINT,)),
    "jacfwd": lambda f: jax.jacfwd(f)(POINT),
    "linearize": lambda f: jax.linearize(f, POINT)[1](POINT),
    "grad of jvp": lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (x,))[1])(POINT),
}


@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode_names_the_other_implementation(loss, forward):
    message = r"^implementation: expected 'autodiff' for forward mode \(jvp, jacfwd.* Pass implementation='autodiff' to"
    with pytest.raises(TypeError, match=message):
        FORWARD[forward](LOSSES[loss])


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_what_reverse_mode_is_made_of(loss):
    """One program: every entry is the same second or first derivative."""
    f = LOSSES[loss]

    def steps(x):
        return jax.lax.scan(jax.checkpoint(lambda total, h: (total + f(h), None)), 0.0, jnp.stack([x, x]))[0] / 2

    @jax.jit
    def derivatives(x):
        first = {
            "grad": jax.grad(f)(x),
            "checkpoint": jax.grad(jax.checkpoint(f))(x),
            "scan": jax.grad(steps)(x),
            "vmap": jax.vmap(jax.grad(f))(x[None])[0],
            "vmap of checkpoint": jax.vmap(jax.grad(jax.checkpoint(f)))(x[None])[0],
            "vmap inside": jax.grad(lambda x: jnp.sum(jax.vmap(f)(x[None])))(x),
        }
        second = {
            "hessian": jax.hessian(f)(x),
            "jacrev twice": jax.jacrev(jax.jacrev(f))(x),
            "jvp of grad": jax.vmap(
                jax.vmap(lambda t: jax.jvp(jax.grad(f), (x,), (t,))[1])
            )(jnp.eye(x.size).reshape(*x.shape, *x.shape)),
        }  # fmt: skip
        return first, second

    first, second = derivatives(POINT)
    for found, wanted in (first, "grad"), (second, "hessian"):
        for name, x in found.items():
            np.testing.assert_allclose(x, found[wanted], rtol=1e-5, atol=1e-6, err_msg=name)
    autodiff = jax.hessian(
        lambda z: jaxce.softmax_cross_entropy(z, LABELS, reduction="mean", implementation="autodiff")
    )
    logits = POINT if loss == "dense" else POINT @ KERNEL
    wanted = autodiff(logits)
    if loss != "dense":
        wanted = jnp.einsum("avbw,dv,ew->adbe", wanted, KERNEL, KERNEL)
    np.testing.assert_allclose(second["hessian"], wanted, rtol=1e-4, atol=1e-5)


def test_what_does_not_pass_the_rule_has_a_forward_mode():
    weights = jnp.array([0.5, 2.0])
    _, slope = jax.jvp(lambda w: jaxce.softmax_cross_entropy(POINT, LABELS, weights=w), (weights,), (jnp.ones(2),))
    np.testing.assert_array_equal(slope, jaxce.softmax_cross_entropy(POINT, LABELS))


def test_forward_mode_of_a_gradient_in_another_argument():
    """As of one in the same: mixed second derivatives, by forward and by reverse mode."""
    z, k, labels = jnp.array([[1.0, 2, 0]]), jnp.arange(6.0).reshape(3, 2), jnp.array([0])

    def dense(z, T):
        return jaxce.softmax_cross_entropy(z, labels, temperature=T, reduction="sum")

    def linear(z, k):
        return jaxce.linear_cross_entropy(z, k, labels, reduction="mean")

    for loss, x in (dense, jnp.float32(2)), (linear, k):
        forward, reverse = (jac(jax.grad(loss), 1)(z, x) for jac in (jax.jacfwd, jax.jacrev))
        np.testing.assert_allclose(forward, reverse, rtol=1e-5, atol=1e-6)
        with pytest.raises(TypeError, match="implementation='autodiff'"):
            jax.jacfwd(loss, 1)(z, x)
