"""A few cases of `tests.sweep` in every run of the tests; and that the sweep notices what is wrong."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from tests import sweep

SEED, CHUNKS, EACH = 20261127, 12, 10  # two seconds a case: `make fuzz` runs more
FIRST = CHUNKS * EACH if jax.__version_info__ >= (0, 12) else 0  # other cases under each JAX that is tested


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_few_cases(chunk):
    run(FIRST + chunk * EACH)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_few_cases_as_other_platforms_compute(platform):
    run(FIRST + 1000, platform)


def run(first: int, platform: str | None = None) -> None:
    found = sweep.failures(SEED, range(first, first + EACH), platform=platform)
    command = f"python -m tests.sweep --seed {SEED}" + (f" --platform {platform}" if platform else "")
    lines = [f"{command} --only {i}\n  " + "\n  ".join(problems) for i, problems in found.items()]
    assert not found, "\n".join(lines)


def test_a_case_is_its_seed_and_number():
    a, b = (sweep.draw(3, 14) for _ in range(2))
    assert a.describe() == b.describe()
    np.testing.assert_equal(jax.tree.map(sweep.up, a.params), jax.tree.map(sweep.up, b.params))
    assert sweep.draw(3, 15).describe() != a.describe()


def a_case(**wanted) -> sweep.Case:
    """The first plain dense case with the given properties, or properties that are as given functions say."""

    def fits(case: sweep.Case) -> bool:
        return all(wish(case) if callable(wish) else getattr(case, name) == wish for name, wish in wanted.items())

    wanted = {
        "function": "dense",
        "transform": "jit",
        "mesh": None,
        "kind": "index",
        "x64": False,
        "form": None,
    } | wanted
    cases = (sweep.draw_arguments(np.random.default_rng([SEED, i])) for i in itertools.count())  # all there is of dense
    return next(case for case in cases if fits(case) and size(case) and "logit_softcap" not in case.constants)


def size(case: sweep.Case) -> int:
    return int(np.prod(case.batch, dtype=int)) * (case.V > 1)


def of_the_loss(case: sweep.Case) -> bool:
    return set(case.cotangents) == {"loss"} and "return_aux" not in case.constants


def weighted(case: sweep.Case) -> bool:
    return of_the_loss(case) and "weights" in case.params


FAULTS = {
    "no gradient in weights": (
        {"regime": "normal", "cotangents": weighted},
        lambda loss: lambda *a, weights, **k: loss(*a, weights=jax.lax.stop_gradient(weights), **k),
    ),
    "a loss 64 ε off": (
        {"regime": "normal", "reduction": "none", "cotangents": of_the_loss},
        lambda loss: lambda *a, **k: loss(*a, **k) * jnp.float32(1 + 64 * np.finfo(np.float32).eps),
    ),
    "0 for NaN": (
        {"regime": "poison", "cotangents": of_the_loss, "poison": lambda case: case.poison.any()},
        lambda loss: lambda *a, **k: jnp.nan_to_num(loss(*a, **k)),
    ),
    "a gradient without the divisor's": (
        {"regime": "normal", "reduction": "mean", "cotangents": weighted},
        lambda loss: (
            lambda z, t, weights, reduction, **k: (
                loss(z, t, weights=weights, reduction="sum", **k)
                / jax.lax.stop_gradient(loss(z, t, weights=weights, reduction="sum", **k))
                * loss(z, t, weights=jax.lax.stop_gradient(weights), reduction="mean", **k)
            )
        ),
    ),
    "a divergence 1e-5 off": (
        {
            "regime": "normal",
            "kind": "probs",
            "reduction": "none",
            "form": "distillation",
            "data": lambda case: "teacher_logits" in case.data,
        },
        lambda loss: lambda *a, **k: loss(*a, **k) * jnp.float32(1 + 1e-5),
    ),
    "log-probabilities 64 ε off": (
        {"regime": "normal", "form": "log_probs", "cotangents": of_the_loss},
        lambda log_p: lambda *a, **k: log_p(*a, **k) * jnp.float32(1 + 64 * np.finfo(np.float32).eps),
    ),
    "an error": ({"cotangents": of_the_loss}, lambda loss: lambda *a, **k: 1 / 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_sweep_notices(fault, monkeypatch):
    wanted, broken = FAULTS[fault]
    case = a_case(**wanted)
    assert sweep.check(case) == []
    monkeypatch.setattr(jaxce, case.name, broken(getattr(jaxce, case.name)))
    assert sweep.check(case), case.describe()
