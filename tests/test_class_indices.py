"""Labels of every integer dtype, from NumPy and JAX, mean the same in every public function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxce
from jaxce import diagnostics

NARROW = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
TINY = [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2]
LOGITS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
KERNEL = np.eye(3, dtype=np.float32)
PROBS = np.asarray(jax.nn.softmax(LOGITS))


def sparse(y):
    return jaxce.SparseTargets(y[:, None], np.ones((4, 1), np.float32))


FUNCTIONS = {
    "dense": lambda y, **k: jaxce.softmax_cross_entropy(LOGITS, y, **k),
    "autodiff": lambda y, **k: jaxce.softmax_cross_entropy(LOGITS, y, implementation="autodiff", **k),
    "sparse": lambda y, **k: jaxce.softmax_cross_entropy(LOGITS, sparse(y), **k),
    "linear": lambda y, **k: jaxce.linear_cross_entropy(LOGITS, KERNEL, y, **k),
    "linear sparse": lambda y, **k: jaxce.linear_cross_entropy(LOGITS, KERNEL, sparse(y), **k),
    "from probs": lambda y, **k: jaxce.cross_entropy_from_probs(PROBS, y, **k),
    "brier": lambda y, **k: diagnostics.brier(LOGITS, y, **k),
    "fit_temperature": lambda y, **k: diagnostics.fit_temperature(LOGITS, y, **k),
    "calibration": lambda y, **k: diagnostics.calibration(LOGITS, y, **k).expected_error,
    "report": lambda y, **k: np.float32(diagnostics.report(LOGITS, y, **k).loss),
}


def as_jax(y):
    with jax.enable_x64(True) if y.dtype.itemsize == 8 else jax.enable_x64(jax.config.jax_enable_x64):
        return jnp.asarray(y)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("wide", [False, True])
def test_every_dtype_gives_the_same(function, wide):
    f = FUNCTIONS[function]
    with jax.enable_x64(wide):
        wanted = f(np.array([0, 1, 2, 1], np.int32))
        for dtype in NARROW:
            y = np.array([0, 1, 2, 1], dtype)
            np.testing.assert_array_equal(f(y), wanted, err_msg=f"numpy {dtype}")
            np.testing.assert_array_equal(f(jnp.asarray(y)), wanted, err_msg=f"jax {dtype}")
        wanted = f(np.array([0, 1, 1, 1], np.int32))
        for dtype in TINY:
            y = np.array([0, 1, 1, 1], dtype)
            np.testing.assert_array_equal(f(y), wanted, err_msg=f"numpy {y.dtype}")
            np.testing.assert_array_equal(f(jnp.asarray(y)), wanted, err_msg=f"jax {y.dtype}")


LARGE = {"uint32": [2**31, 2**32 - 1], "int64": [2**32, -(2**40), 2**63 - 1], "uint64": [2**32, 2**63, 2**64 - 1]}


def labels_of(dtype, number, wide):
    """NumPy labels that hold the number, and JAX's where it has the dtype."""
    y = np.array([0, 1, number, 1], dtype)
    return [y, jnp.asarray(y)] if wide or dtype == "uint32" else [y]


SOME_WIDE = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("wide", SOME_WIDE)
def test_a_number_too_large_for_32_bits_is_no_class(function, wide):
    """Not the class that it would wrap to, and not the ignored label either."""
    f = FUNCTIONS[function]
    with jax.enable_x64(wide):
        unknown = f(np.array([0, 1, 17, 1]))
        assert np.isnan(unknown).any() or function == "calibration"
        for dtype, numbers in LARGE.items():
            for number in numbers:
                for y in labels_of(dtype, number, wide):
                    for options in {}, {"ignore_index": -1}, {"ignore_index": 2**31 - 1}, {"ignore_index": -(2**31)}:
                        np.testing.assert_array_equal(f(y, **options), unknown, err_msg=f"{dtype} {number} {options}")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("wide", SOME_WIDE)
def test_it_can_be_the_ignored_label(function, wide):
    f = FUNCTIONS[function]
    with jax.enable_x64(wide):
        ignored = f(np.array([0, 1, -1, 1]), ignore_index=-1)
        unknown = f(np.array([0, 1, 17, 1]), ignore_index=-1)
        for dtype, numbers in LARGE.items():
            for number in numbers:
                for y in labels_of(dtype, number, wide):
                    np.testing.assert_array_equal(f(y, ignore_index=number), ignored, err_msg=f"{dtype} {number}")
                other = number - 1 if number > 0 else number + 1
                for y in labels_of(dtype, other, wide):
                    np.testing.assert_array_equal(f(y, ignore_index=number), unknown, err_msg=f"{dtype} {other}")


def test_the_smallest_number_is_not_taken_for_the_ignored_one():
    y = np.array([0, 1, -(2**31), 1], np.int64)
    np.testing.assert_array_equal(jaxce.softmax_cross_entropy(LOGITS, y, ignore_index=2**40)[2], np.nan)
