"""The sums of a row in each of their forms, against float64, and what the compiled programs do."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from oracle import assert_within

import jaxce
from jaxce import sums
from jaxce.arguments import Options
from jaxce.stats import Gap, RowStats

pytestmark = pytest.mark.optimized
EPS = float(jnp.finfo(jnp.float32).eps)


def in_chunks(options: Options, rows: sums.Rows) -> RowStats:
    like = jnp.zeros(rows.logits.shape[:-1], jnp.float32)
    of_label, of_probs = (None if x is None else like for x in (rows.indices, rows.probs))
    likes = sums._Sums(RowStats(like, like, of_label, None if of_probs is None else Gap(like, like)))
    return sums._on_cpu(options, False, likes, rows).stats


def in_one_piece(options: Options, rows: sums.Rows) -> RowStats:
    return sums._fused(options, rows).stats


@pytest.fixture(params=["fused", "short", "one chunk", "chunks", "groups"])
def form(request, monkeypatch):
    """Each form that a program may have, for rows of a few classes."""
    if request.param in ("one chunk", "chunks", "groups"):
        monkeypatch.setattr(sums, "_SHORT", 0)
        monkeypatch.setattr(sums, "_COMPARED", 0)
    if request.param in ("one chunk", "chunks"):
        monkeypatch.setattr(sums, "_GROUP", 0)
    if request.param == "chunks":
        monkeypatch.setattr(sums, "_CHUNK", 100)
    of_rows = in_one_piece if request.param == "fused" else in_chunks
    return lambda options, rows: of_rows(options, rows)  # one of its own, or jit would take another form's program


@pytest.mark.parametrize("label", [True, False])
def test_the_sum_without_one_class(rng, form, label):
    """On both sides of every threshold; the label has the maximum, or there is none."""
    share = np.linspace(0.004, 1, 250)[:, None]
    below = np.concatenate([np.broadcast_to(share, (250, k)) * rng.uniform(0.99, 1, (250, k)) for k in (1, 2, 3)], -1)
    for classes in (1, 3, 5, 6):  # and one more: some of them make groups
        top = rng.uniform(-3, 3, (250, 1))
        logits = np.concatenate([top + np.log(below[:, :classes]), top], -1).astype(np.float32)
        logits = np.concatenate([logits, np.full_like(logits[:1], -np.inf)])
        labels = jnp.full((251, 1), classes) if label else None
        stats = jax.jit(form, static_argnums=0)(Options(), sums.Rows(jnp.asarray(logits), labels))
        assert_within(stats.max, logits.max(-1), np.zeros(251), "max")
        assert stats.rest[-1] == -1
        exact = np.expm1(oracle.softmax(oracle.lift(logits[:-1])).log_sum)
        assert_within(stats.rest[:-1], exact, 4 * EPS * exact, f"rest of {classes + 1} classes")


def test_a_label_of_another_shard_leaves_nothing_out(rng, form):
    logits = rng.uniform(-3, 3, (5, 6)).astype(np.float32)
    labels = jnp.array([[-1], [6], [7], [-5], [2**30]])
    stats = jax.jit(form, static_argnums=0)(Options(), sums.Rows(jnp.asarray(logits), labels))
    exact = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True)).sum(-1)
    assert_within(stats.rest + 1, exact, 4 * EPS * exact, "the whole sum")


@pytest.mark.parametrize("v", [10, 128, 1025, 32768, 32769, 131072])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_of_every_length(rng, v, dtype):
    """As compiled for this machine: rows that are short and long, in one chunk and in several."""
    n = 2 if v > 100_000 else 2**20 // v + 2
    logits = 3 * rng.standard_normal((n, v)).astype(np.float32)
    logits[::2, 1] = 40
    logits = jnp.asarray(logits, dtype)
    labels = rng.integers(0, v, n)
    labels[::4] = 1
    probs = rng.dirichlet(np.ones(8), n).astype(np.float32)
    probs = jnp.asarray(np.pad(probs, ((0, 0), (0, v - 8))))
    options, more = Options(label_smoothing=True), Options(label_smoothing=True, return_aux=True)
    by_label = jax.jit(lambda z, y: sums.row_stats(options, sums.Rows(z, y[:, None])))(logits, jnp.asarray(labels))
    alone = jax.jit(lambda z, y: sums.row_stats(Options(), sums.Rows(z, y[:, None])))(logits, jnp.asarray(labels))
    by_probs = jax.jit(lambda z, t: sums.row_stats(more, sums.Rows(z, probs=t)))(logits, probs)
    probs_alone = jax.jit(lambda z, t: sums.row_stats(Options(), sums.Rows(z, probs=t)))(logits, probs)
    z = np.asarray(logits).astype(np.float64)
    exact = oracle.softmax(z)
    rest = np.expm1(exact.log_sum)
    # All of these are sums of positive numbers, in parts. And max − z is rounded before its exponential is taken.
    of_sums, e = 16 * EPS, np.exp(-exact.below)
    rounded = EPS * (e * exact.below).sum(-1)
    sure = labels == np.argmax(z, -1)
    for stats in by_label, alone:
        assert_within(stats.rest, rest, of_sums * np.where(sure, rest, 1 + rest) + rounded, "rest, label")
    for stats in by_probs, probs_alone:
        assert_within(stats.rest, rest, of_sums * rest + rounded, "rest, maximum")
    assert_within(by_label.picked[:, 0], z[np.arange(n), labels], np.zeros(n), "picked")
    t = np.asarray(probs, np.float64)
    for name, got, terms in (
        ("smoothing", by_label.smoothing.sum, exact.below),
        ("smoothing", by_probs.smoothing.sum, exact.below),
        ("target", by_probs.target.sum, t * exact.below),
        ("mass", by_probs.target.mass, t),
        ("target", probs_alone.target.sum, t * exact.below),
        ("mass", probs_alone.target.mass, t),
        ("spread", by_probs.spread, e * exact.below),
    ):
        assert_within(got, terms.sum(-1), of_sums * terms.sum(-1) + EPS * (e * exact.below**2).sum(-1), name)
    chex.assert_trees_all_equal(by_label.smoothing.mass, jnp.full(n, v, jnp.float32))


@pytest.mark.parametrize("v", [10, 1000])  # 1000 are added up in groups
def test_weighted_sums_beside_what_is_not_finite(v):
    """0 times anything is 0; what else there is counts, however small its probability."""
    tiny = float(jnp.finfo(jnp.float32).tiny)
    z, t = np.zeros((10, v), np.float32), np.zeros((10, v), np.float32)
    t[:, 1], z[:, 2] = 1, -np.inf
    t[1, 2], t[2, 2], t[3, 2] = 0.1, tiny, -0.1
    z[4, 3], t[4, 3] = -3e38, tiny
    z[5, 3], t[5, 3] = -3e38, -0.5
    t[6, 3], t[7, 3] = np.nan, np.inf
    z[8] = -np.inf
    z[9, 3] = np.nan
    stats = jax.jit(lambda z, t: sums.row_stats(Options(), sums.Rows(z, probs=t)))(z, t)
    expected = [0, np.inf, np.inf, -np.inf, tiny * 3e38, -1.5e38, np.nan, np.nan, np.inf]
    np.testing.assert_allclose(stats.target.sum[:9], expected, rtol=2 * EPS)
    np.testing.assert_allclose(stats.target.mass, t.astype(np.float64).sum(-1), rtol=2 * EPS)
    assert np.isnan(stats.rest[9])


@pytest.mark.parametrize("v", [5, 256])
def test_one_row_of_probabilities_for_many_rows_of_logits(rng, form, v):
    """As `jax.vmap` over the logits alone gives them."""
    z = jnp.asarray(rng.normal(size=(257, v)), jnp.float32)
    t = rng.dirichlet(np.ones(v), 1).astype(np.float32)
    of_rows = jax.jit(form, static_argnums=0)
    one, each = (of_rows(Options(), sums.Rows(z, probs=jnp.asarray(p))).target for p in (t, np.tile(t, (257, 1))))
    for got, wanted in zip(one, each, strict=True):
        np.testing.assert_allclose(np.broadcast_to(got, 257), wanted, rtol=8 * EPS)
    below = np.asarray(z, np.float64).max(-1, keepdims=True) - np.asarray(z, np.float64)
    np.testing.assert_allclose(each.sum, (t.astype(np.float64) * below).sum(-1), rtol=16 * EPS)


ROWS = (517, 2053)  # about a million numbers: in one piece it would be no chunk at all


def loss_of_rows(z, y):
    return jaxce.softmax_cross_entropy(z, y)


def text(f, *args) -> str:
    return jax.jit(f).lower(*args).compile().as_text()


def arguments(rng) -> tuple[jax.Array, jax.Array]:
    n, v = ROWS
    return jnp.asarray(rng.standard_normal(ROWS), jnp.float32), jnp.asarray(rng.integers(0, v, n))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (1, 0)])
def test_vmap_works_on_all_rows_in_chunks(rng, axes):
    """A loss of one row, lifted to many, is the loss of many rows."""
    z, y = arguments(rng)
    if axes[1] is None:
        z, y = z[:, None], y[:1]
    if axes[0]:
        z = z.T
    f = jax.vmap(loss_of_rows, in_axes=axes)
    assert "while" in text(f, z, y)
    rows = z.T if axes[0] else z
    expected = loss_of_rows(rows.reshape(-1, ROWS[1]), jnp.broadcast_to(y.reshape(-1), ROWS[0]))
    np.testing.assert_array_equal(f(z, y).reshape(-1), expected)


def test_rows_on_several_devices_stay_where_they_are(rng):
    """In chunks, rows would be gathered first: Auto sharding has none, and each device of a shard_map has its own."""
    z, y = (x[:512] for x in arguments(rng))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("x"))
    compiled = text(lambda z, y: loss_of_rows(z, y), jax.device_put(z, split), jax.device_put(y, split))
    assert not re.search(r"all-gather|all-to-all|collective-permute|while", compiled)
    z, y = (jnp.concatenate([x] * 8) for x in (z, y))
    mapped = jax.shard_map(loss_of_rows, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
    compiled = text(mapped, z, y)
    assert "while" in compiled
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled)
    np.testing.assert_array_equal(jax.jit(mapped)(z, y), loss_of_rows(z, y))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 10), (517, 8209), (64, 50257)])
@pytest.mark.parametrize("gradient", [False, True])
def test_memory(shape, gradient, dtype):
    """No more than optax, and a chunk; for probabilities, whose exponentials are added up in two parts, three."""
    z, y = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:1], jnp.int32)

    def temporary(loss, targets) -> int:
        f = jax.value_and_grad(lambda z, t: loss(z, t).mean()) if gradient else loss
        with jax.numpy_dtype_promotion("standard"):  # for optax
            return jax.jit(f).lower(z, targets).compile().memory_analysis().temp_size_in_bytes

    theirs = temporary(optax.softmax_cross_entropy_with_integer_labels, y)
    assert temporary(loss_of_rows, y) <= theirs + 4 * sums._CHUNK + 64 * shape[0]
    theirs = temporary(optax.softmax_cross_entropy, z)
    assert temporary(loss_of_rows, z) <= theirs + 3 * 4 * sums._CHUNK + 64 * shape[0]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"logit_softcap": 30.0}, {"where": True}])
@pytest.mark.parametrize("shape", [(300, 10), (11, 4, 2053), (11, 47, 2053)])
def test_the_gradient_computes_no_exponential_again(rng, options, shape):
    """It is made in place from those of the forward pass, if one program has both."""
    z = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    y = jnp.asarray(rng.integers(0, shape[-1], shape[:-1]))
    if "where" in options:
        options = {"where": jnp.arange(shape[-1]) % 7 > 0}
    f = jax.value_and_grad(lambda z: jaxce.softmax_cross_entropy(z, y, reduction="sum", **options))
    exponentials = re.findall(rf"= f32\[[0-9,]*{shape[-1]}\]\S* exponential\(", text(f, z))
    # Smoothed, it could not be made in place: what is more than a chunk is recomputed.
    assert len(exponentials) == 1 + (shape == (11, 47, 2053) and "label_smoothing" in options)
