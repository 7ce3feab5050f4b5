"""The plan of the linear loss: what it promises is what compiled programs need, and what cannot be is said."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jaxce
from jaxce import SparseTargets, linear_cross_entropy, plan_linear_cross_entropy
from jaxce.linear import chips, costs
from jaxce.linear import plan as plans
from jaxce.versions import BFLOAT16_ON_CPU
from tests.pairwise import pairwise


def mesh_of(kind: str, **platform: str) -> AbstractMesh:
    known = platform if "platform" in AbstractDevice.__dataclass_fields__ else {}  # from JAX 0.10.1 on
    return AbstractMesh((1,), ("i",), abstract_device=AbstractDevice(device_kind=kind, num_cores=1, **known))


ON = {
    "TPU v5 lite": mesh_of("TPU v5 lite", platform="tpu"),
    "TPU7x": mesh_of("TPU7x", platform="tpu"),
    "NVIDIA H100": mesh_of("NVIDIA H100", platform="gpu"),
}


def shapes(n: int, d: int, v: int, dtype=jnp.float32, kind: str = "index", vocab_axis: int = 1):
    targets = {
        "index": jax.ShapeDtypeStruct((n,), jnp.int32),
        "probs": jax.ShapeDtypeStruct((n, v), dtype),
        "sparse": SparseTargets(jax.ShapeDtypeStruct((n, 20), jnp.int32), jax.ShapeDtypeStruct((n, 20), jnp.float32)),
    }[kind]
    kernel = (d, v) if vocab_axis else (v, d)
    return jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct(kernel, dtype), targets


def problem(*arrays, **options):
    return jaxce.linear.problem_of(**dict(zip(("hidden", "kernel", "targets"), arrays, strict=True)), **options)


def compiled_temp_bytes(arrays, **options) -> int:
    def loss(hidden, kernel, targets):
        return linear_cross_entropy(hidden, kernel, targets, **options)

    aux = options.get("return_aux", False)
    return (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=aux)).lower(*arrays).compile().memory_analysis()
    ).temp_size_in_bytes


N = 2500  # several blocks of tokens, and a smaller one
CASES = {
    "plain": {},
    "aux": {"return_aux": True},
    "softcap, smoothing, z-loss": {"logit_softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-4},
    "class weights": {"class_weights": np.ones(8000, np.float32), "label_smoothing": 0.1, "return_aux": True},
    "weights": {"weights": np.ones(N, np.float32)},
    "temperature": {"temperature": np.full(N, 2, np.float32)},
    "mask of classes": {"where": np.ones(8000, bool)},
    "mask of all": {"where": np.ones((N, 8000), bool)},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kind", "mode"), pairwise(CASES, ["index", "probs", "sparse"], ["recompute", "store"])
)
def test_predicted_memory_is_an_upper_bound(mode, options, kind):
    arrays = shapes(N, 64, 8000, kind=kind)
    chosen = {"reduction": "mean", "mode": mode, **CASES[options]}
    plan = plan_linear_cross_entropy(*arrays, **chosen)
    needed = compiled_temp_bytes(arrays, **chosen)
    assert needed <= plan.temp_bytes <= 2.5 * needed
    assert plan.logits_bytes == 4 * N * 8000


@pytest.mark.parametrize("mode", ["recompute", "store"])
def test_predicted_memory_of_a_mask_that_tokens_share(mode):
    """One for each sequence of a batch: blocks of tokens, which are of no one sequence, have it written out."""
    hidden, kernel, targets = shapes(N, 64, 8000)
    where = jax.ShapeDtypeStruct((5, 1, 8000), jnp.bool_)
    hidden, targets = (jax.ShapeDtypeStruct((5, N // 5, *x.shape[1:]), x.dtype) for x in (hidden, targets))

    def loss(hidden, kernel, targets, where):
        return linear_cross_entropy(hidden, kernel, targets, where=where, mode=mode, reduction="mean")

    plan = plan_linear_cross_entropy(hidden, kernel, targets, where=where, mode=mode, reduction="mean")
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel, targets, where).compile()
    needed = program.memory_analysis().temp_size_in_bytes
    assert needed <= plan.temp_bytes <= 2.5 * needed


@pytest.mark.every_case
@pytest.mark.parametrize("budget", [20_000_000, 30_000_000])
@pytest.mark.parametrize("options", [{"temperature": np.full(N, 2, np.float32)}, {"logit_softcap": 5.0}])
def test_predicted_memory_of_logits_that_are_changed(options, budget):
    """They are one more array, which a plan within a budget has to count; and the slope of a cap is another."""
    arrays, chosen = shapes(N, 64, 8000), {"reduction": "mean", "mode": "store", "memory_budget": budget, **options}
    needed = compiled_temp_bytes(arrays, **chosen)
    assert needed <= plan_linear_cross_entropy(*arrays, **chosen).temp_bytes <= budget


@pytest.mark.parametrize("mode", ["recompute", "store"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["index", "probs"])
def test_predicted_memory_for_narrow_floats(mode, dtype, kind):
    arrays = shapes(1000, 64, 8000, dtype, kind)
    plan = plan_linear_cross_entropy(*arrays, reduction="mean", mode=mode)
    needed = compiled_temp_bytes(arrays, reduction="mean", mode=mode)
    assert needed <= plan.temp_bytes <= 4 * needed  # which casts are written out depends on the version of XLA


@pytest.mark.parametrize("budget", [100_000_000, 20_000_000, 5_000_000, 2_500_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_budget_is_kept(budget, reduction):
    arrays = shapes(1000, 64, 30011)
    options = {"reduction": reduction, "memory_budget": budget}
    plan = plan_linear_cross_entropy(*arrays, **options)
    assert plan.temp_bytes <= budget

    def total(*arrays):
        return jnp.sum(linear_cross_entropy(*arrays, **options))

    program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arrays).compile()
    assert program.memory_analysis().temp_size_in_bytes <= budget


@pytest.mark.every_case
@pytest.mark.parametrize("budget", [21_000_000, 30_000_000])
def test_predicted_memory_beside_a_large_kernel(budget):
    """What a block of tokens adds to its gradient takes as much as it; the sum of float32 is the gradient itself."""
    arrays, chosen = shapes(1000, 512, 8000), {"reduction": "mean", "mode": "store", "memory_budget": budget}
    plan = plan_linear_cross_entropy(*arrays, **chosen)
    needed = compiled_temp_bytes(arrays, **chosen)
    assert plan.block_n < 1000
    assert needed <= plan.temp_bytes <= min(budget, 2.5 * needed)


@pytest.mark.parametrize("asked", ["loss", "gradient of an aux entry"])
def test_predicted_memory_where_gradients_are_not_kept(asked):
    """Mode "store" has blocks of few tokens, and takes all of them at once where there is nothing to store."""
    n = 16384
    arrays = shapes(n, 8, 8192)
    plan = plan_linear_cross_entropy(*arrays, reduction="mean")
    assert plan.mode == "store"
    assert plan.block_n < n
    loss = functools.partial(linear_cross_entropy, reduction="mean")
    if asked != "loss":
        loss = jax.grad(lambda *x: jnp.sum(linear_cross_entropy(*x, reduction="mean", return_aux=True)[1].entropy))
        plan = plan_linear_cross_entropy(*arrays, reduction="mean", return_aux=True)
        assert plan.mode == "store"
    needed = jax.jit(loss).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert needed <= plan.temp_bytes < plan.logits_bytes


@pytest.mark.parametrize("policy", ["dots_saveable", "dots_with_no_batch_dims_saveable"])
@pytest.mark.parametrize("loss", ["recompute", "store", "log_probs", "distillation"])
def test_a_checkpoint_around_the_loss_that_saves_products_saves_no_logits(loss, policy):
    n, d, v = 1000, 32, 16384
    hidden, kernel, labels = shapes(n, d, v)
    budget = 20_000_000

    def total(hidden, kernel, labels):
        if loss == "log_probs":
            return jnp.sum(jaxce.linear_log_probs(hidden, kernel, labels, memory_budget=budget))
        if loss == "distillation":
            return jaxce.linear_distillation_loss(hidden, kernel, hidden, kernel, mode="recompute", reduction="mean")
        return linear_cross_entropy(hidden, kernel, labels, mode=loss, memory_budget=budget, reduction="mean")

    def needed(f):
        step = jax.jit(jax.grad(f, (0, 1)))
        return step.lower(hidden, kernel, labels).compile().memory_analysis().temp_size_in_bytes

    policy = getattr(jax.checkpoint_policies, policy)
    assert needed(jax.checkpoint(total, policy=policy)) < 1.05 * needed(total) < 4 * n * v


@pytest.mark.parametrize("mode", ["recompute", "store"])
def test_the_gradient_of_a_gradient_holds_no_logits(mode):
    n, d, v = 1000, 32, 16384
    hidden, kernel, labels = shapes(n, d, v)

    def along(hidden, kernel, labels, *direction):
        loss = functools.partial(linear_cross_entropy, mode=mode, memory_budget=20_000_000, reduction="mean")
        return sum(map(jnp.vdot, jax.grad(loss, (0, 1))(hidden, kernel, labels), direction))

    step = jax.jit(jax.grad(along, (0, 1))).lower(hidden, kernel, labels, hidden, kernel)
    assert step.compile().memory_analysis().temp_size_in_bytes < 4 * n * v


def smallest_budget(*arrays, **options) -> int:
    with pytest.raises(ValueError, match=r"memory_budget: expected at least [\d,]+ bytes .*; got 1,000\.") as error:
        plan_linear_cross_entropy(*arrays, memory_budget=1000, **options)
    return int(re.search(r"at least ([\d,]+)", str(error.value))[1].replace(",", ""))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["recompute", "store"])
@pytest.mark.parametrize("kind", ["index", "sparse", "probs"])
def test_the_smallest_budget_is_kept(kind, mode):
    """With many tokens of few features, where what belongs to rows is most of it."""
    arrays, options = shapes(20_000, 8, 700, kind=kind), {"reduction": "mean", "mode": mode}
    budget = smallest_budget(*arrays, **options)
    assert compiled_temp_bytes(arrays, memory_budget=budget, **options) <= budget


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mode", ["recompute", "store"])
@pytest.mark.parametrize("weighted", [False, True])
def test_predicted_memory_of_narrow_probabilities(weighted, mode, dtype):
    """As which they are given, they are neither weighted nor differentiated."""
    n, d, v = 1000, 64, 8000
    arrays = *shapes(n, d, v, dtype)[:2], jax.ShapeDtypeStruct((n, v), jnp.bfloat16)
    options = {"reduction": "mean", "mode": mode} | ({"class_weights": np.ones(v, np.float32)} if weighted else {})
    for budget in None, smallest_budget(*arrays, **options):
        plan = plan_linear_cross_entropy(*arrays, memory_budget=budget, **options)
        loss = functools.partial(linear_cross_entropy, memory_budget=budget, **options)
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        assert step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes <= plan.temp_bytes


def test_a_budget_that_is_too_small():
    arrays = shapes(1000, 64, 30011)
    smallest = smallest_budget(*arrays)
    assert plan_linear_cross_entropy(*arrays, memory_budget=smallest).temp_bytes == smallest
    with pytest.raises(ValueError, match="memory_budget"):
        linear_cross_entropy(
            np.ones((1000, 64), np.float32), np.ones((64, 50), np.float32), np.zeros(1000, int), memory_budget=1
        )


@pytest.mark.parametrize("mode", [None, "recompute", "store"])
def test_a_budget_that_is_too_small_here_and_enough_there(mode):
    arrays, options = shapes(8192, 2048, 131072, jnp.bfloat16), {"reduction": "mean", "mode": mode}
    here = smallest_budget(*arrays, **options)
    there = smallest_budget(*arrays, platform="gpu", **options)
    assert there < here
    plan = plan_linear_cross_entropy(*arrays, platform="gpu", memory_budget=there, **options)
    assert plan.temp_bytes == there
    with pytest.raises(ValueError, match=rf"at least {there:,} bytes .* on gpu\); got {there - 1:,}"):
        plan_linear_cross_entropy(*arrays, platform="gpu", memory_budget=there - 1, **options)
    with pytest.raises(TypeError, match=r"memory_budget: expected None or a number of bytes, an int; got '1GB'"):
        plan_linear_cross_entropy(*arrays, platform="gpu", memory_budget="1GB", **options)


@pytest.mark.parametrize("platform", [None, "cpu", "tpu", "gpu"])
def test_a_budget_for_a_symbolic_batch_is_refused(platform):
    (n,) = jax.export.symbolic_shape("n")
    hidden, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, 64), (64, 8000)))
    with pytest.raises(ValueError, match="memory_budget: expected None for hidden states of unknown length"):
        plan_linear_cross_entropy(
            hidden, kernel, jax.ShapeDtypeStruct((n,), jnp.int32), platform=platform, memory_budget=10**9
        )


@pytest.mark.parametrize("kind", ON)
def test_a_budget_that_is_too_small_for_the_chip_at_hand(kind):
    with (
        jax.sharding.use_abstract_mesh(ON[kind]),
        pytest.raises(ValueError, match=r"^memory_budget: expected at least"),
    ):
        plan_linear_cross_entropy(*shapes(64, 32, 1000), memory_budget=1)


@pytest.mark.every_case
@pytest.mark.parametrize(("kind", "alive"), [("index", 3), ("sparse", 3), ("probs", 5)])
def test_arrays_of_capped_logits(kind, alive):
    """Logits, the capped ones, their gradient; beside probabilities also a block of those, and their logarithms."""
    assert problem(*shapes(8, 4, 16, kind=kind), logit_softcap=5.0).arrays == alive


def test_numbers_of_numpy_are_numbers_of_the_program():
    arrays = shapes(2048, 64, 8000)
    plain = {
        "ignore_index": -1,
        "memory_budget": 10**8,
        "logit_softcap": 30.0,
        "temperature": 1.0,
        "label_smoothing": 0.0,
    }
    as_numpy = {"ignore_index": np.int64(-1), "memory_budget": np.int64(10**8), "logit_softcap": np.float32(30)}
    as_numpy |= {"temperature": np.float64(1), "label_smoothing": np.float64(0)}
    plans_ = [plan_linear_cross_entropy(*arrays, reduction="mean", **options) for options in (plain, as_numpy)]
    assert plans_[0] == plans_[1]


def test_what_belongs_to_classes_is_counted():
    """Of each class four numbers: bias, class weight and their gradients; and hardly more for one token."""
    V = 10**6
    assert 4 * 4 * V <= costs.row_bytes(problem(*shapes(1, 1, V)), "cpu") < 4 * 4 * V + 66_000


def test_what_a_plan_of_blocks_of_tokens_counts():
    """A block's part of probabilities or of a mask; and logits beside their gradient where blocks may be left out."""

    def temp_bytes(kind="index", **options):
        plan = plan_linear_cross_entropy(*shapes(N, 64, 8000, kind=kind), reduction="mean", mode="store", **options)
        assert plan.block_n == 1024
        return plan.temp_bytes

    block = 1024 * 8000
    assert temp_bytes("probs") - temp_bytes("sparse") >= 4 * block
    by_class, by_token = (
        temp_bytes(where=jax.ShapeDtypeStruct(shape, bool), label_smoothing=0.1) for shape in ((8000,), (N, 8000))
    )
    assert by_token - by_class >= block
    for skipping in {"weights": np.ones(N, np.float32)}, {"ignore_index": -1}:
        assert temp_bytes(**skipping) - temp_bytes() == 4 * block


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_parts_of_rows(platform):
    """Not of few logits, and on TPU not of many tokens, which take more cycles in parts."""
    v = 131072
    found = plans.store.blocks(problem(*shapes(65536, 64, v), reduction="mean"), platform, 1)
    assert len(found) > 5
    for n, part in found:
        assert (part == v) == (n * v <= 2**24 or (platform == "tpu" and n > 1024))


@pytest.mark.parametrize(("mode", "matmuls"), [("recompute", 4), ("store", 3)])
def test_operations_are_those_of_the_matmuls(mode, matmuls):
    plan = plan_linear_cross_entropy(*shapes(3000, 64, 8000), reduction="mean", mode=mode)
    assert plan.flops == matmuls * 2 * 3000 * 64 * 8000


def test_an_unknown_number_of_tokens_gets_the_blocks_of_many():
    (n,) = jax.export.symbolic_shape("n")
    plan = plan_linear_cross_entropy(*shapes(n, 64, 8000), reduction="mean")
    assert (plan.mode, plan.block_v) == ("recompute", 2**22 // 8192)
    assert re.search(r"blocks +512 classes\n.*; the logits would be 32000\*n bytes\n", str(plan))
    with pytest.raises(ValueError, match=r"^shape: expected a plan for a number of tokens; got \(n, 64, 8000\)"):
        plan.to_json()


def test_sizes_near_the_preferred_one_are_tried_first():
    tried = plans.alternatives(problem(*shapes(16384, 64, 32768), reduction="mean"), "cpu", "store", None)
    assert [plan.block_n for plan in tried] == [1024, 2048, 512, 4096, 256, 128]


def test_a_tight_budget_changes_the_mode():
    """Before its blocks of tokens get so small that adding up dkernel takes the time."""
    arrays = shapes(1000, 8, 100_003)
    plan = {
        budget: plan_linear_cross_entropy(*arrays, reduction="mean", memory_budget=budget)
        for budget in (10**9, 200_000_000, 10_000_000)
    }
    assert [p.mode for p in plan.values()] == ["store", "store", "recompute"]
    assert plan[10**9].block_n > plan[200_000_000].block_n >= 256
    assert plan_linear_cross_entropy(*arrays, reduction="mean", mode="store", memory_budget=10_000_000).block_n < 256


def test_allowed_memory_is_used_on_tpu():
    """Three matmuls in blocks of many tokens take fewer of the cycles that the compiler estimates than four."""
    arrays = shapes(32768, 2048, 131072, jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(ON["TPU v5 lite"]):
        plan = {
            budget: plan_linear_cross_entropy(*arrays, reduction="mean", memory_budget=budget)
            for budget in (None, 10**10, 15 * 10**9, 2 * 10**10)
        }
        tried = plans.alternatives(problem(*arrays, reduction="mean"), "tpu", None, None)
        assert plan_linear_cross_entropy(*arrays, reduction="mean", mode="store").block_n <= 1024
    assert [p.mode for p in plan.values()] == ["recompute", "recompute", "store", "store"]
    assert [(p.block_n, p.block_v) for p in plan.values()][2:] == [(4096, 131072), (8192, 131072)]
    assert tried[0] == plan[None]
    assert {512, 1024} <= {p.block_n for p in tried if p.mode == "store"}


def test_default_modes():
    arrays = shapes(64, 32, 1000)
    assert plan_linear_cross_entropy(*arrays).mode == "recompute"  # one loss for each token
    assert plan_linear_cross_entropy(*arrays, reduction="mean").mode == "store"
    for kind, mesh in ON.items():
        with jax.sharding.use_abstract_mesh(mesh):
            plan = plan_linear_cross_entropy(*arrays, reduction="mean")
            assert plan.mode == "recompute"
            assert plan.platform == ("gpu" if "NVIDIA" in kind else "tpu")


def test_what_tpu_programs_are_divided_into():
    wanted = {
        (8192, 131072): 1024,
        (8192, 130816): 896,  # divides the number of classes
        (8192, 128256): 1024,
        (8192, 151936): 1024,  # 128 times a prime
        (8192, 50257): 1024,
        (65536, 131072): 512,
        (16, 7): 7,
        (1, 1): 1,
    }
    with jax.sharding.use_abstract_mesh(ON["TPU v5 lite"]):
        blocks = {
            (n, v): plan_linear_cross_entropy(*shapes(n, 2048, v, jnp.bfloat16), reduction="mean").block_v
            for n, v in wanted
        }
    assert blocks == wanted


@pytest.mark.parametrize("length", [1, 7, 128, 1000, 50257])
def test_sizes_go_down_to_one(length):
    sizes = costs.sizes(length, 1024, 128)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] <= min(length, 1024)
    assert sizes[-1] == 1


def test_a_platform_by_name_and_one_that_nobody_knows(monkeypatch):
    with jax.default_device("cpu"):
        assert chips.chip() == ("cpu", jax.devices()[0].device_kind)
    monkeypatch.setattr(chips, "platform_of", lambda device: "other")
    assert chips.chip()[0] == "gpu"  # what it compiles


@pytest.mark.parametrize("function", [plan_linear_cross_entropy, jaxce.tune_linear_cross_entropy])
def test_plain_jax_has_no_plan(function):
    with pytest.raises(ValueError, match=r"implementation: expected 'xla' or 'pallas_tpu'.*It holds all the logits"):
        function(*shapes(8, 4, 10), implementation="autodiff")


def test_it_prints():
    text = str(plan_linear_cross_entropy(*shapes(4096, 512, 50304), reduction="mean"))
    assert re.fullmatch(
        r"mode          store, on cpu\n"
        r"blocks        1,024 tokens\n"
        r"extra memory  [\d.]+ MB for loss and gradient; the logits would be 824\.2 MB\n"
        r"kept          111\.4 MB from the loss for its gradient\n"
        r"matmuls       633\.0 GFLOP",
        text,
    )


def test_it_takes_what_the_loss_takes(rng):
    """Arrays as well as shapes, and the same errors."""
    hidden, kernel = np.ones((4, 3), np.float32), np.ones((3, 5), np.float32)
    options = {
        "bias": np.zeros(5, np.float32),
        "label_smoothing": 0.1,
        "where": None,
        "weights": np.ones(4, np.float32),
    }
    plan = plan_linear_cross_entropy(hidden, kernel, np.zeros(4, np.int32), **options)
    assert isinstance(plan, plans.LinearPlan)
    with pytest.raises(ValueError, match=r"^kernel: "):
        plan_linear_cross_entropy(hidden, kernel.T, np.zeros(4, np.int32))
    with pytest.raises(TypeError, match="no_such_option"):
        plan_linear_cross_entropy(hidden, kernel, np.zeros(4, np.int32), no_such_option=1)
    assert jaxce.plan_linear_cross_entropy is plan_linear_cross_entropy


# --- precision --------------------------------------------------------------------------------------------------------

DTYPES = ", ".join(2 * [r"tensor<(?:\d+x)*(\w+)>"])
PRODUCT = re.compile(rf"dot_general .*?precision = \[(\w+), (\w+)\] : \({DTYPES}\) -> tensor<(?:\d+x)*(\w+)>")


@pytest.mark.parametrize("precision", [None, "highest"])
@pytest.mark.parametrize("mode", ["recompute", "store"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_every_product_is_of_the_given_precision_and_narrow_where_the_inputs_are(platform, mode, precision):
    """Lowered for each platform: what is handed to its compiler."""
    n, d, v = 256, 48, 4096
    for dtype, vocab_axis in itertools.product((jnp.float32, jnp.bfloat16), (0, 1)):
        options = {"reduction": "mean", "mode": mode, "memory_budget": 2**23, "precision": precision}
        loss = functools.partial(linear_cross_entropy, vocab_axis=vocab_axis, **options)
        kernel = (d, v) if vocab_axis else (v, d)
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((n, d), kernel)]
        traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*arrays, jax.ShapeDtypeStruct((n,), jnp.int32))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = PRODUCT.findall(text)
        assert len(products) == text.count("dot_general ") >= 3
        name = "DEFAULT" if precision is None else "HIGHEST"
        factors = {"f32" if dtype == jnp.float32 else "bf16"}
        if dtype == jnp.bfloat16 and platform == "cpu":  # only those of the logits, and before 0.12 none
            factors = {"f32", "bf16"} if BFLOAT16_ON_CPU else {"f32"}
        assert set(products) == {(name, name, factor, factor, "f32") for factor in factors}
