"""A seeded random sweep over the public losses: every kind of argument, option, transform and mesh, against float64.

    python -m tests.sweep --cases 1000 --seed 1
    python -m tests.sweep --seed 1 --only 123
    python -m tests.sweep --cases 300 --platform tpu

A case is drawn from its seed and number alone. What it should give is worked out in NumPy from `tests.oracle`, and
what may be off follows from the arithmetic that jaxce promises; `Truth` says how.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import sys
import time
import traceback
import warnings
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import on_cpu
from jaxce.linear import distillation
from tests import oracle
from tests.interpreting import interpreted

AUX = ("nll", "log_normalizer", "entropy")
FUNCTIONS = {
    "dense": "softmax_cross_entropy",
    "integer": "softmax_cross_entropy_with_integer_labels",
    "linear": "linear_cross_entropy",
    "probs": "cross_entropy_from_probs",
}
OTHERS = {  # which give the same numbers: log-probabilities, and a divergence from targets that a teacher's logits make
    "log_probs": {"dense": "log_probs", "linear": "linear_log_probs"},
    "distillation": {"dense": "distillation_loss", "linear": "linear_distillation_loss"},
}
POSITIONAL = ("logits", "hidden", "kernel", "targets", "labels", "teacher_logits", "teacher_hidden", "teacher_kernel")
POSITIONAL += ("teacher_indices", "teacher_probs")
MAIN = {"dense": ("logits",), "integer": ("logits",), "linear": ("hidden", "kernel", "bias"), "probs": ("logits",)}
TOKENS = ("logits", "hidden", "targets", "weights", "temperature", "labels", "teacher_logits", "teacher_hidden")
TOKENS += ("teacher_indices", "teacher_probs")
F16, BF16, F32, F64 = (np.dtype(x) for x in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
LABELS = [np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
LABELS += [np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)]
TRANSFORMS = {  # how often
    "jit": 48,
    "value": 9,
    "eager": 4,
    "vmap": 6,
    "scan": 4,
    "hvp": 5,
    "checkpoint": 4,
    "discard": 5,
    "export": 5,
    "symbolic": 3,
    "debug_nans": 4,
    "debug_infs": 3,
}
MESHES = {"explicit": 8, "unplaced": 4, "auto": 4, "shard_map": 8}
HAS_FLATBUFFERS = importlib.util.find_spec("flatbuffers") is not None


@dataclasses.dataclass
class Case:
    """One call: arrays as they are passed, and all that is constant."""

    function: str
    kind: str  # of target: index, probs, sparse
    batch: tuple[int, ...]
    V: int
    axis: int  # of the classes, in the logits
    transform: str
    mesh: str | None
    steps: int | None  # the length of the axis that vmap or scan go over
    regime: str
    x64: bool
    form: str | None  # of `OTHERS`
    params: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # floats, differentiated
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # labels, where
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    cotangents: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tangents: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    placement: dict[str, str] = dataclasses.field(default_factory=dict)
    jax_labels: bool = True
    poison: np.ndarray | None = None  # rows that must be NaN

    @property
    def name(self) -> str:
        return OTHERS.get(self.form, FUNCTIONS)[self.function]

    @property
    def aux(self) -> tuple[str, ...]:
        return tuple(name for name in AUX if not (self.form and name == "nll"))

    @property
    def teacher_vocab_axis(self) -> int:
        return self.constants.get("teacher_vocab_axis", self.constants.get("vocab_axis", 1))

    @property
    def reduction(self) -> str:
        return self.constants.get("reduction", "none")

    @property
    def dtype(self) -> np.dtype:
        """The working dtype."""
        main = [self.params[n].dtype for n in MAIN[self.function][:2] if n in self.params]
        return F64 if F64 in main else F32

    def describe(self) -> str:
        arrays = {n: f"{x.dtype}{list(x.shape)}" for n, x in {**self.params, **self.data}.items()}
        words = [self.transform, self.mesh, self.name, self.kind, self.regime, "x64" if self.x64 else None]
        if "labels" in self.data:
            words.append("JAX labels" if self.jax_labels else "NumPy labels")
        rest = f"axis={self.axis}" if self.function != "linear" else ""
        return f"{' '.join(w for w in words if w)} {arrays} {self.constants} {rest} d/d{sorted(self.cotangents)}"


# --- drawing --------------------------------------------------------------------------------------------------------


def draw(seed: int, index: int) -> Case:
    rng = np.random.default_rng([seed, index])
    case = draw_arguments(rng)
    if case.function == "linear":
        _draw_method(case, rng)
    return case


def draw_arguments(rng: np.random.Generator) -> Case:
    """A case but for how a linear loss is computed, which takes plans to draw."""

    def pick(*choices: Any, p: Any = None) -> Any:
        return choices[rng.choice(len(choices), p=None if p is None else np.array(p) / np.sum(p))]

    def maybe(probability: float) -> bool:
        return rng.random() < probability

    function = pick("dense", "integer", "linear", "probs", p=[35, 7, 44, 14])
    kind = "index" if function == "integer" else pick("index", "probs", "sparse", p=[50, 25, 25])
    transform = pick(*TRANSFORMS, p=list(TRANSFORMS.values()))
    if transform == "symbolic" and function == "integer":
        function = "dense"
    if transform == "discard":
        function, kind = pick("dense", "linear"), pick("index", "probs", "sparse")
    mesh = pick(None, *MESHES, p=[60, *MESHES.values()]) if transform in ("jit", "eager") else None
    if function in ("integer", "probs") and mesh == "shard_map":
        mesh = None
    linear = function == "linear"
    form = None
    if function in ("dense", "linear") and maybe(0.35):
        form = "log_probs" if kind != "probs" else "distillation"
        if (form, transform) in (("log_probs", "symbolic"), ("distillation", "hvp")):
            form = None
        if (form, transform, kind) == ("log_probs", "debug_infs", "sparse"):
            form = None  # the log of what is left beside ids that are all there is is -inf, and rightly stopped at
    log_probs, distilled = form == "log_probs", form == "distillation"

    # Sizes that divide nothing, but for what a mesh splits.
    rank = pick(0, 1, 2, 3, p=[10, 50, 25, 15])
    batch = tuple(int(pick(1, 2, 3, 5, 7)) for _ in range(rank)) if rank > 1 else (int(rng.integers(1, 25)),) * rank
    batch = batch if math.prod(batch) <= 40 else (3, *batch[1:-1], 2)
    V = int(pick(1, 2, 3, 5, 7, 13, 29, 60, p=[4, 8, 12, 16, 16, 16, 16, 12]))
    D = int(rng.integers(1, 17))
    if rank and maybe(0.04):
        batch = (0, *batch[1:])
    if mesh is not None or transform == "symbolic":
        batch, V = (int(pick(2, 4, 6)), *batch[1:][: max(rank - 1, 0)]), int(pick(2, 6, 14, 30))
    steps = int(rng.integers(2, 4)) if transform in ("vmap", "scan") else None
    N = math.prod(batch)
    total = N * (steps or 1)

    main_dtype = pick(F32, BF16, F16, F64, p=[40, 25, 15, 20])
    if transform == "hvp":
        main_dtype = pick(F32, F64)
    if transform == "symbolic":
        main_dtype = F32
    x64 = main_dtype == F64 or maybe(0.08)

    def other_dtype() -> np.dtype:
        return pick(F32, BF16, F16, F64 if x64 else F32, p=[55, 20, 10, 15])

    reduction = pick("none", "sum", "mean", "mean_count", p=[30, 15, 35, 20])
    if function == "integer" or log_probs:
        reduction = "none"
    elif transform in ("discard", "symbolic"):
        reduction = pick("sum", "mean", "mean_count")
    axis = int(rng.integers(-1 - len(batch), len(batch) + 1)) if not linear and maybe(0.5) else -1
    regimes = ["normal", "confident", "offset", "tied", "minus_inf", "bad_row", "poison"]
    regime = pick(*regimes, p=[40, 10, 8, 8, 10, 14, 10])
    if transform == "discard":
        # A NaN logit and no other: where a label that is no class, or a NaN in hidden states, is multiplied by the
        # cotangent 0, NaN is what plain JAX gives as well.
        regime = "poison"
    if transform in ("hvp", "debug_infs", "symbolic") and regime in ("minus_inf", "bad_row", "poison"):
        regime = "normal"
    if transform == "debug_nans" and regime in ("minus_inf", "poison"):
        regime = pick("normal", "bad_row")
    if (regime == "poison" and N == 0) or (regime == "offset" and function == "probs"):
        regime = "normal"
    constants: dict[str, Any] = {} if function == "integer" or log_probs else {"reduction": reduction}
    case = Case(function, kind, batch, V, axis, transform, mesh, steps, regime, x64, form, constants=constants)
    params, data = case.params, case.data

    # Which classes take part, and which may be targets.
    lead = () if steps is None else (steps,)
    where = np.ones((*lead, *batch, V), bool)
    shape = None
    if function != "probs" and maybe(0.25) and N:
        ones = (1,) * len(batch)
        of_batch = batch == (V,) or mesh == "shard_map"  # [V] could be meant for it, on one device too
        classes = (*ones, V) if of_batch else (V,)
        shape = pick(classes, (*batch, V), (*ones, V), (*batch, 1)) if steps is None else classes
        mask = rng.random(shape) < (0.7 if shape[-1] == V else 0.8)
        if shape[-1] == V:
            np.put_along_axis(mask, rng.integers(0, V, (*shape[:-1], 1)), True, -1)
        where = where & mask
        data["where"] = mask
    constants["return_aux"] = function in ("dense", "linear") and not distilled and maybe(0.35)
    if function not in ("dense", "linear") or (shape and shape[-1] == 1):
        constants["return_aux"] = False  # a row without any class has no entropy
    if not constants["return_aux"]:
        del constants["return_aux"]
    if "where" in data and not linear and axis != -1 and data["where"].ndim == len(batch) + 1:
        data["where"] = np.moveaxis(data["where"], -1, axis)
    elif "where" in data and not linear and axis % (len(batch) + 1) != len(batch):
        data["where"] = np.moveaxis(mask.reshape(*(1 for _ in batch), V), -1, axis)
    allowed = where.reshape(total, V).copy()
    allowed[~allowed.any(-1)] = True
    gone = np.zeros((total, V), bool)
    if regime == "minus_inf":
        gone = np.broadcast_to(rng.random((1 if linear else total, V)) < 0.3, (total, V)).copy()
        gone[:, rng.integers(V)] = False
        if not (allowed & ~gone).any(-1).all():
            gone[:] = False
        allowed &= ~gone

    # Labels.
    label_dtype = pick(*LABELS, p=[10, 6, 40, 10, 8, 6, 10, 6, 6, 6])
    case.jax_labels = steps is not None or mesh is not None or transform in ("export", "symbolic") or maybe(0.6)
    if case.jax_labels and label_dtype.itemsize == 8 and not x64:
        label_dtype = np.dtype(np.int32)
    K = int(rng.integers(1, 4))
    limits = ml_dtypes.iinfo(label_dtype)
    if int(limits.max) + 1 < V:
        label_dtype, limits = np.dtype(np.int32), np.iinfo(np.int32)
    chances = rng.random((K, total, V)) * allowed
    indices = chances.argmax(-1).T.astype(object)  # Python integers: labels may be large
    if kind == "probs" and not distilled:
        t = rng.dirichlet(np.full(V, 0.5), total) * allowed
        hot = rng.random(total) < 0.2
        t[hot] = (np.arange(V) == indices[:, :1].astype(int))[hot]
        t = t / np.maximum(t.sum(-1, keepdims=True), 1e-6)
        t = t.reshape(*lead, *batch, V).astype(other_dtype() if maybe(0.5) else main_dtype)
        params["targets"] = np.moveaxis(t, -1, axis if axis < 0 else axis + len(lead))
    elif kind == "sparse":
        shares = rng.dirichlet(np.ones(K), total)
        if K > 1 and maybe(0.3) and not log_probs:
            shares[:, -1] = 0
        params["targets"] = shares.reshape(*lead, *batch, K).astype(other_dtype())
    else:
        indices = indices[:, :1]
    if "targets" in params and params["targets"].dtype == F64:
        case.x64 = True

    # Weights and options.
    options: tuple[str, ...] = ("weights", "class_weights", "label_smoothing", "ignore", "z_loss", "cap")
    if function == "integer" or form:
        options = {"log_probs": ("ignore", "cap"), "distillation": ("weights", "cap")}.get(form, ())
    unused = np.zeros(total, bool)
    if "ignore" in options and kind != "probs" and maybe(0.35):
        choices = [-1, -100, 0, int(limits.max) if label_dtype.itemsize < 8 else V]
        constants["ignore_index"] = ignore = pick(*choices)
        if limits.min <= ignore <= limits.max and ignore not in range(V):
            rows = rng.random(total) < 0.3
            entries = rows[:, None] if kind == "index" or maybe(0.5) else rng.random((total, K)) < 0.3
            indices[np.broadcast_to(entries, indices.shape)] = ignore
        unused |= (indices == ignore).all(-1)
    if "weights" in options and (maybe(0.35) or (regime == "bad_row" and not unused.any())):
        shape = (*lead, *batch)
        if regime != "bad_row" and steps is None and batch and maybe(0.25):
            shape = pick((), batch[1:], (1,) * len(batch), (*batch[:-1], 1))
        weights = rng.uniform(0.2, 2, shape)
        if maybe(0.6) or regime == "bad_row":
            weights = weights * (rng.random(shape) < pick(0.2, 0.7))
        params["weights"] = np.asarray(weights, pick(F32, F32, BF16, F16, F64 if case.x64 else F32))
        unused |= np.broadcast_to(params["weights"] == 0, (*lead, *batch)).reshape(total)
    if "class_weights" in options and maybe(0.3):
        params["class_weights"] = rng.uniform(0.2, 2, V).astype(pick(F32, F32, BF16))
    cap = "cap" in options and function != "probs" and maybe(0.2)
    if cap:
        constants["logit_softcap"] = float(pick(2.0, 4.0, 30.0))
    if options and function != "probs" and maybe(0.25):
        shape = (*lead, *batch)
        if steps is None and batch and maybe(0.4):
            shape = pick((), batch[1:], (1,) * len(batch), (*batch[:-1], 1))
        powers = rng.uniform(-3, 3, shape)
        powers = np.round(powers) if case.x64 else powers  # so that the quotients of the oracle are exact
        temperature = np.asarray(2**powers, pick(F32, F32, BF16, F16, F64 if case.x64 else F32))
        (data if distilled else params)["temperature"] = temperature  # its gradient is not known here
    if "label_smoothing" in options and maybe(0.3) and (not gone.any() or cap):
        if maybe(0.6):
            params["label_smoothing"] = np.asarray(pick(0.1, 0.2, 1.0, 0.0), F32)
        else:
            constants["label_smoothing"] = 0.125
    if "z_loss" in options and function != "probs" and maybe(0.25):
        if maybe(0.6):
            params["z_loss"] = np.asarray(0.03, F32)
        else:
            constants["z_loss"] = 0.0625

    # What is not finite: in rows that do not count, and in one that does.
    bad = unused & (rng.random(total) < 0.6) if regime == "bad_row" else np.zeros(total, bool)
    case.poison = np.zeros(total, bool)
    if regime == "poison":
        candidates = np.flatnonzero(~unused & where.reshape(total, V).any(-1))
        if len(candidates):
            row = pick(*candidates)
            case.poison[row] = True
            outside = [V, -1, -7, int(limits.max), 2**31 + 1, 2**32, 2**32 + V - 1]
            outside = [x for x in outside if x >= V or x < 0]
            outside = [x for x in outside if limits.min <= x <= limits.max and x != constants.get("ignore_index")]
            if kind == "index" and outside and maybe(0.6) and transform != "discard":
                indices[row, 0] = pick(*outside)
            elif transform == "discard" and linear:
                case.poison[:] = ~unused
            else:
                bad[row] = True
    value = pick(np.nan, np.inf) if regime == "bad_row" else np.nan
    if kind != "probs":
        shape = (*lead, *batch, *((K,) if kind == "sparse" else ()))
        data["labels"] = (
            np.array([int(x) for x in indices.ravel()], object)
            .reshape(shape)
            .astype(np.uint64 if label_dtype == np.uint64 else np.int64)
            .astype(label_dtype)
        )

    # Logits, or what makes them.
    scale, offset = {"confident": 30.0, "tied": 0.0}.get(regime, 2.0), 1e4 * (regime == "offset")
    if linear:
        hidden = rng.normal(size=(total, D)) * (0 if regime == "tied" and maybe(0.5) else 1)
        hidden[bad, rng.integers(D)] = value
        kernel_dtype = pick(main_dtype, other_dtype(), p=[75, 25]) if transform != "hvp" else main_dtype
        kernel = rng.normal(size=(D, V)) * scale / D**0.5
        if maybe(0.5):
            constants["vocab_axis"] = 0
            kernel = kernel.T
        params["hidden"] = hidden.reshape(*lead, *batch, D).astype(main_dtype)
        params["kernel"] = kernel.astype(kernel_dtype)
        if maybe(0.5) or offset or gone.any() or transform == "discard":
            bias = rng.normal(size=V) + offset
            bias[gone[0] if total else np.zeros(V, bool)] = -np.inf
            if transform == "discard" and case.poison.any():
                data.pop("where", None)  # which might take the class out
                bias[rng.integers(V)] = np.nan
            params["bias"] = bias.astype(pick(main_dtype, other_dtype()) if transform != "hvp" else main_dtype)
    else:
        z = rng.normal(size=(total, V)) * scale
        if regime == "confident":
            z[np.arange(total), rng.integers(0, V, total)] += 30
        if function == "probs":
            z = np.exp(z - z.max(-1, keepdims=True, initial=-1e300))
            z /= z.sum(-1, keepdims=True)
            z = np.maximum(z, 1e-4)  # representable in every dtype, and above 0: a target on 0 costs inf
            z[gone] = 0
            z = np.minimum(z, 1)
        else:
            z = z + offset
            z[gone] = -np.inf
        column = rng.integers(V)
        if regime == "poison" and bad.any():  # in a class that takes part
            parts = np.flatnonzero(where.reshape(total, V)[bad][0])
            column = parts[column % len(parts)]
        z[bad, column] = value
        params["logits"] = np.moveaxis(z.reshape(*lead, *batch, V), -1, axis if axis < 0 else axis + len(lead)).astype(
            main_dtype
        )
    if distilled:
        _draw_teacher(case, rng, lead, bad & unused, gone)
        _draw_divergence(case, rng, lead, allowed)
    if function == "probs" and gone.any() and ("label_smoothing" in params or "label_smoothing" in constants):
        params.pop("label_smoothing", None)
        constants.pop("label_smoothing", None)

    # Cotangents: of the loss, of the aux record, of both; of one aux entry alone.
    wanted = ["loss"]
    if "return_aux" in constants and transform != "discard" and maybe(0.7):
        wanted = pick(["loss", *case.aux], ["loss", pick(*case.aux)], [pick(*case.aux)], p=[40, 20, 40])
    if transform == "symbolic":
        wanted = ["loss"]
    for name in wanted:
        shape = lead if name == "loss" and reduction != "none" else (*lead, *batch)
        c = rng.normal(size=shape) if maybe(0.8) else np.ones(shape)
        if name != "loss":
            c = c * ~(bad & ~case.poison).reshape((*lead, *batch))
        case.cotangents[name] = np.asarray(c, case.dtype)
    if transform == "hvp":
        case.tangents = {n: rng.normal(size=params[n].shape).astype(main_dtype) for n in MAIN[function] if n in params}
    if mesh is not None:
        for name in (*params, *data):
            case.placement[name] = pick("spec", "replicated", "no", p=[60, 20, 20])
        case.placement |= dict.fromkeys(MAIN[function][:2], "spec")
        case.placement["axes"] = pick("b", "v", "bv", p=[30, 20, 50])
    return case


def _draw_method(case: Case, rng: np.random.Generator) -> None:
    N, constants = math.prod(case.batch), case.constants
    stores = constants.get("reduction", "none") != "none" and case.transform != "symbolic"
    modes = [None, "recompute"] + ["store"] * (stores and "teacher_indices" not in case.data)
    if (mode := modes[rng.choice(len(modes))]) is not None:
        constants["mode"] = mode
    if case.mesh is None and case.transform != "symbolic" and N:
        choice = ("default", "budget", "blocks")[rng.choice(3)] if not case.form else "default"
        if choice == "budget":
            constants["memory_budget"] = budget(case, rng)
        elif choice == "blocks":  # of a few tokens or classes, which no budget leads to
            plan = planned(case, None)
            block_n, block_v = (int(rng.integers(1, n + 1)) for n in (N, case.V))
            constants["plan"] = dataclasses.replace(plan, block_n=block_n, block_v=block_v)
            constants.pop("mode", None)
    if _kernels_take(case) and rng.random() < 0.6:
        for name in ("mode", "memory_budget", "plan"):
            constants.pop(name, None)
        constants["implementation"] = "pallas_tpu"


def _kernels_take(case: Case) -> bool:
    """Whether the kernels for TPU compute it, and can be interpreted with this transform."""
    main = {case.params[name].dtype for name in ("hidden", "kernel")}
    mask = case.data.get("where")
    refused = case.kind == "probs" or case.form == "distillation" or "temperature" in case.params
    refused |= case.form == "log_probs" and "return_aux" in case.constants
    refused |= mask is not None and any(n != 1 for n in mask.shape[:-1])
    transforms = ("jit", "eager", "vmap", "scan", "hvp", "checkpoint", "discard")
    return not refused and case.mesh is None and case.transform in transforms and main <= {F32, BF16}


def _draw_teacher(
    case: Case, rng: np.random.Generator, lead: tuple[int, ...], bad: np.ndarray, gone: np.ndarray
) -> None:
    """A teacher's logits, or hidden states and kernel, whose products are exact; -inf where the student's are."""
    total, V, data = len(bad), case.V, case.data
    dtype = case.params[MAIN[case.function][0]].dtype
    if "logit_softcap" in case.constants and rng.random() < 0.5:
        case.constants["teacher_logit_softcap"] = case.constants["logit_softcap"]
    if case.function == "dense":
        z = rng.normal(size=(total, V)) * 2
        z[gone], z[bad] = -np.inf, np.nan
        z = z.reshape(*lead, *case.batch, V)
        data["teacher_logits"] = np.moveaxis(z, -1, case.axis if case.axis < 0 else case.axis + len(lead)).astype(dtype)
        return
    D = int(rng.integers(1, 17))
    hidden, kernel = (rng.integers(-4, 5, shape) / 4 for shape in ((total, D), (D, V)))
    hidden[bad] = np.nan
    data["teacher_hidden"] = hidden.reshape(*lead, *case.batch, D).astype(dtype)
    if rng.random() < 0.3:
        case.constants["teacher_vocab_axis"] = 1 - case.teacher_vocab_axis
    data["teacher_kernel"] = (kernel if case.teacher_vocab_axis else kernel.T).astype(case.params["kernel"].dtype)
    if gone.any():
        data["teacher_bias"] = np.where(gone[0], -np.inf, 0).astype(dtype)


def _draw_divergence(case: Case, rng: np.random.Generator, lead: tuple[int, ...], allowed: np.ndarray) -> None:
    """Which one, and whether no more is known of the teacher than the probabilities of a few classes."""
    name = ("forward_kl", "reverse_kl", "jsd")[rng.choice(3, p=(0.45, 0.3, 0.25))]
    if name != "forward_kl":
        case.constants["divergence"] = name
    if name == "jsd" and rng.random() < 0.5:
        case.constants["beta"] = 0.1
    most = min(4, int(allowed.sum(-1).min(initial=case.V)) - 1)  # one class at least for the rest
    if most < 1 or rng.random() < 0.7:
        return
    for key in [key for data in (case.data, case.constants) for key in data if key.startswith("teacher")]:
        case.data.pop(key, None)
        case.constants.pop(key, None)
    total, K = len(allowed), int(rng.integers(1, most + 1))
    indices = np.argsort(rng.random(allowed.shape) * allowed, -1)[:, ::-1][:, :K]
    probs = rng.dirichlet(np.ones(K), total) * rng.uniform(0.3, 0.95, (total, 1))
    dtype = case.params[MAIN[case.function][0]].dtype
    case.data["teacher_indices"] = indices.reshape(*lead, *case.batch, K).astype(np.int32)
    case.data["teacher_probs"] = probs.reshape(*lead, *case.batch, K).astype(dtype)
    if name == "forward_kl" and rng.random() < 0.3:
        case.constants["tail"] = False


def planned(case: Case, memory_budget: int | None) -> jaxce.LinearPlan:
    params, data = case.params, case.data
    lead = 0 if case.steps is None else 1

    def shape(name: str) -> jax.ShapeDtypeStruct | None:
        x = params.get(name, data.get(name))
        return x if x is None else jax.ShapeDtypeStruct(x.shape[lead if name in TOKENS else 0 :], x.dtype)

    # A plan looks at which arguments there are, not at the dtype of labels.
    indices = None if case.kind == "probs" else jax.ShapeDtypeStruct(data["labels"].shape[lead:], np.int32)
    probs = shape("targets")
    targets = indices if probs is None else probs if indices is None else jaxce.SparseTargets(indices, probs)
    names = ("bias", "where", "weights", "temperature", "class_weights", "label_smoothing", "z_loss")
    options = {n: shape(n) for n in names if n in params or n in data} | case.constants
    if "ignore_index" in options:
        options["ignore_index"] = -1
    with settings(case):
        return jaxce.plan_linear_cross_entropy(
            shape("hidden"), shape("kernel"), targets, **options, memory_budget=memory_budget
        )


def budget(case: Case, rng: np.random.Generator) -> int:
    """A memory budget that the plan can keep: the smallest one, or something above it."""
    most = planned(case, None).temp_bytes
    low, smallest = 0, most
    while smallest - low > 1:
        middle = (low + smallest) // 2
        try:
            planned(case, middle)
            smallest = middle
        except ValueError:
            low = middle
    return smallest if rng.random() < 0.6 else int(rng.integers(smallest, most + 1))


@contextlib.contextmanager
def settings(case: Case):
    """x64, and standard promotion where hidden states and kernel are promoted together."""
    mixed = case.function == "linear" and case.params["hidden"].dtype != case.params["kernel"].dtype
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(case.x64))
        if mixed:
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
        if case.form == "distillation":  # in blocks of eight tokens
            stack.enter_context(mock.patch.dict(distillation._KEPT, cpu=8 * case.V))
            stack.enter_context(mock.patch.object(distillation, "_LEAST", 1))
        if case.constants.get("implementation") == "pallas_tpu":
            stack.enter_context(interpreted(shape=(8, 16), lanes=8))
        if case.transform.startswith("debug"):
            stack.enter_context(getattr(jax, case.transform)(True))
        yield


# --- running --------------------------------------------------------------------------------------------------------


def call(case: Case, params: dict[str, Any], data: dict[str, Any], **extra: Any) -> tuple[Any, Any]:
    """The loss, or less the log-probabilities, and the aux record, or None."""
    loss_of = getattr(jaxce, case.name)
    options = {n: x for n, x in (params | data).items() if n not in POSITIONAL}
    options |= case.constants | extra
    if case.form == "distillation":
        names = ("teacher_hidden", "teacher_kernel") if case.function == "linear" else ("teacher_logits",)
        if "teacher_indices" in data:
            targets = (jaxce.SparseTargets(data["teacher_indices"], data["teacher_probs"]),)
        else:
            targets = tuple(data[name] for name in names)
        given = [params[name] for name in MAIN[case.function][:2] if name in params]
        axis = {} if case.function == "linear" else {"axis": case.axis}
        return loss_of(*given, *targets, **axis, **options), None
    if case.kind == "index" or case.form == "log_probs":
        targets = data["labels"]
    elif case.kind == "sparse":
        targets = jaxce.SparseTargets(data["labels"], params["targets"])
    else:
        targets = params["targets"]
    if case.function == "linear":
        result = loss_of(params["hidden"], params["kernel"], targets, **options)
    else:
        result = loss_of(params["logits"], targets, axis=case.axis, **options)
    loss, aux = result if isinstance(result, tuple) else (result, None)
    if case.form == "log_probs" and case.kind == "sparse":  # K of them, weighted
        loss = jnp.sum(jnp.asarray(params["targets"], loss.dtype) * loss, -1)
    return -loss if case.form == "log_probs" else loss, aux


def evaluate(case: Case) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """The loss, the aux record, the gradients, and the directional derivatives of the gradients."""
    with settings(case):
        return _evaluate(case)


def _evaluate(case: Case) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    transform = case.transform
    params = dict(case.params)
    data = dict(case.data)
    if case.jax_labels or case.kind == "probs":
        with jax.debug_nans(False), jax.debug_infs(False):  # what is given may hold some
            data = {n: jnp.asarray(x) for n, x in data.items()}
    loss_of = functools.partial(call, case)
    if transform == "checkpoint":
        loss_of = jax.checkpoint(loss_of)
    if case.steps is not None:
        loss_of = _over_steps(case, loss_of)
    mesh = None
    if case.mesh is not None:
        kind = AxisType.Explicit if case.mesh in ("explicit", "unplaced") else AxisType.Auto
        mesh = jax.make_mesh((2, 2), ("b", "v"), axis_types=(kind, kind), devices=jax.devices()[:4])
    if case.mesh == "shard_map":
        loss_of = _sharded(case, mesh)

    def total(params: Any, data: Any) -> tuple[Any, Any]:
        loss, aux = loss_of(params, data)
        outputs = {"loss": loss}
        if transform == "discard":
            outputs["loss"] = jnp.where(jnp.isfinite(loss), loss, jnp.zeros_like(loss))
        if aux is not None:
            outputs |= {name: getattr(aux, name) for name in case.aux}
        return sum(jnp.sum(jnp.asarray(c) * outputs[name]) for name, c in case.cotangents.items()), (loss, aux)

    gradient = jax.value_and_grad(total, has_aux=True)
    with contextlib.ExitStack() as stack:
        if mesh is not None and case.mesh != "shard_map":
            stack.enter_context(jax.set_mesh(mesh))
            if case.mesh != "unplaced":
                params, data = (_placed(case, mesh, x) for x in (params, data))
        if transform == "value":
            return *loss_of(params, data), {}, {}
        traced = {n: x for n, x in data.items() if isinstance(x, jax.Array)}
        closed = {n: x for n, x in data.items() if n not in traced}

        def program(params: Any, traced: Any) -> Any:
            if transform != "hvp":
                return *gradient(params, traced | closed), {}

            def some(chosen: Any) -> Any:
                (value, result), grads = gradient(params | chosen, traced | closed)
                return {n: grads[n] for n in chosen}, (value, result, grads)

            chosen = {n: params[n] for n in case.tangents}
            tangents = {n: jnp.asarray(x) for n, x in case.tangents.items()}
            _, second, (value, result, grads) = jax.jvp(some, (chosen,), (tangents,), has_aux=True)
            return (value, result), grads, second

        if transform in ("export", "symbolic"):
            (_, (loss, aux)), grads, second = _exported(case, program, params, traced)
        else:
            eagerly = transform == "eager" or transform.startswith("debug")
            if eagerly and case.mesh is None:
                with jax.debug_nans(False), jax.debug_infs(False):
                    params = {n: jnp.asarray(x) for n, x in params.items()}
            (_, (loss, aux)), grads, second = (program if eagerly else jax.jit(program))(params, traced)
        return loss, aux, grads, second


def _over_steps(case: Case, loss_of: Any) -> Any:
    def mapped(params: Any, data: Any) -> Any:
        def part(tree: dict[str, Any], tokens: bool) -> dict[str, Any]:
            return {n: x for n, x in tree.items() if (n in TOKENS) == tokens}

        def step(x: Any) -> Any:
            return loss_of(part(params, False) | x[0], part(data, False) | x[1])

        tokens = part(params, True), part(data, True)
        if case.transform == "vmap":
            return jax.vmap(step)(tokens)
        return jax.lax.scan(lambda carry, x: (carry, step(x)), None, tokens)[1]

    return mapped


def dims(case: Case, name: str) -> tuple[Any, ...]:
    """What each axis of an array is: "b" is the first batch axis, "v" the classes, None the others."""
    batch = ("b", None, None)[: len(case.batch)]
    x = case.params.get(name, case.data.get(name))
    rows = [*batch, "v"]
    if case.function != "linear":
        axis = case.axis % len(rows)
        rows.insert(axis, rows.pop())
    full = {
        "logits": rows,
        "hidden": (*batch, None),
        "kernel": ("v", None) if case.constants.get("vocab_axis") == 0 else (None, "v"),
        "bias": ("v",),
        "teacher_logits": rows,
        "teacher_hidden": (*batch, None),
        "teacher_kernel": ("v", None) if case.teacher_vocab_axis == 0 else (None, "v"),
        "teacher_bias": ("v",),
        "teacher_indices": (*batch, None),
        "teacher_probs": (*batch, None),
        "targets": rows if case.kind == "probs" else (*batch, None),
        "labels": (*batch, None) if case.kind == "sparse" else batch,
        "weights": batch,
        "temperature": batch,
        "class_weights": ("v",),
        "where": rows,
    }.get(name, ())
    full = tuple(full)[len(full) - x.ndim :]
    return tuple(None if n == 1 else d for n, d in zip(x.shape, full, strict=True))


def spec(case: Case, name: str, axes: str) -> P:
    return P(*(d if d and d in axes else None for d in dims(case, name)))


def _placed(case: Case, mesh: Any, tree: dict[str, Any]) -> dict[str, Any]:
    def put(name: str, x: Any) -> Any:
        how = case.placement[name]
        if how == "no":
            return x
        return jax.device_put(
            x, NamedSharding(mesh, spec(case, name, case.placement["axes"]) if how == "spec" else P())
        )

    return {name: put(name, x) for name, x in tree.items()}


def _sharded(case: Case, mesh: Any) -> Any:
    axes = case.placement["axes"] if case.batch else "v"
    rows = P("b") if "b" in axes else P()
    extra = {"axis_name": "v"} if "v" in axes else {}
    if "b" in axes and case.reduction != "none":
        extra["batch_axis_name"] = "b"
    loss = rows if case.reduction == "none" else P()

    def mapped(params: Any, data: Any) -> Any:
        specs = tuple({name: spec(case, name, axes) for name in tree} for tree in (params, data))
        aux = rows if "return_aux" in case.constants else None
        return jax.shard_map(lambda p, d: call(case, p, d, **extra), mesh=mesh, in_specs=specs, out_specs=(loss, aux))(
            params, data
        )

    return mapped


def _exported(case: Case, program: Any, params: Any, data: Any) -> Any:
    def shape(name: str, x: Any) -> jax.ShapeDtypeStruct:
        sizes = x.shape
        if case.transform == "symbolic":
            sizes = tuple(n if d != "b" else b for n, d in zip(x.shape, dims(case, name), strict=True))
        return jax.ShapeDtypeStruct(sizes, x.dtype)

    (b,) = jax.export.symbolic_shape("b")
    shapes = [{n: shape(n, x) for n, x in tree.items()} for tree in (params, data)]
    exported = jax.export.export(jax.jit(program))(*shapes)
    if HAS_FLATBUFFERS:
        exported = jax.export.deserialize(exported.serialize())
    return exported.call(params, data)


# --- what it should be ----------------------------------------------------------------------------------------------


def up(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@dataclasses.dataclass
class Step:
    """One call of the loss in float64: outputs as (value, error), gradients as (value, size, error).

    Notation: ε of the working dtype (doubled for float64, which the oracle works in as well); `size` is the oracle's
    sum of magnitudes; `off` is the error of a row's logits. A logit of hidden @ kernel + bias is a sum of D products
    and a bias: off by at most (D + 2) ε Σ|h||k|. Then −log p is off by twice that, and so is p relatively. Exponentials
    of z − max carry |z − max| ε more, and a loss far below 1 that of the runner-up. A sum over n terms adds n ε of
    their magnitudes. Matmuls in bfloat16 round the gradient of the logits to it first.
    """

    outputs: dict[str, Any]
    grads: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    bad: np.ndarray  # rows that are not finite
    dead: np.ndarray  # those of them that do not count
    second: tuple[np.ndarray, ...] | None  # what the bound of second derivatives is made from


def step_of(case: Case, params: dict[str, np.ndarray], labels: Any, cot: dict[str, Any], poison: np.ndarray) -> Step:
    """`params` in float64, without the axis of steps."""
    N, V = math.prod(case.batch), case.V
    eps = float(np.finfo(case.dtype).eps) * (2 if case.dtype == F64 else 1)
    tiny = float(np.finfo(case.dtype).smallest_normal)
    cap = case.constants.get("logit_softcap")
    given = case.constants.get("label_smoothing", params.get("label_smoothing", 0.0))
    smoothing, z_loss = float(given), float(case.constants.get("z_loss", params.get("z_loss", 0.0)))
    from_probs = case.function == "probs"

    def rows(x: np.ndarray) -> np.ndarray:
        x = np.moveaxis(x, case.axis, -1) if case.function != "linear" else x
        return x.reshape(N, V)

    if case.function == "linear":
        h = params["hidden"].reshape(N, params["hidden"].shape[-1])
        k = params["kernel"].T if case.constants.get("vocab_axis") == 0 else params["kernel"]
        bias = params.get("bias", np.zeros(V))
        z = h @ k + bias
        finite_bias = np.where(np.isfinite(bias), abs(bias), 0)
        error = (h.shape[1] + 2) * eps * (abs(h) @ abs(k) + finite_bias)
    else:
        z = rows(params["logits"])
        error = np.zeros(z.shape)
    bad = np.isnan(z).any(-1) | (z == np.inf).any(-1)
    if case.function == "linear":
        bad |= ~np.isfinite(h).all(-1)
    z, error = (np.where(bad[:, None], 0, x) for x in (z, error))
    slope, slope_error = np.ones(z.shape), np.zeros(z.shape)
    if cap:
        t = np.tanh(z / cap)
        slope = 1 / np.cosh(np.minimum(abs(z) / cap, 300)) ** 2
        # tanh and what is made from it are within 8 ε of |tanh|, which 1 − |tanh| feels in full.
        slope_error = 20 * eps * abs(t) + 2 * error / cap
        z, error = cap * t, error * slope + 8 * eps * cap * abs(t) + error**2 / cap
    tempered = "temperature" in params
    temperature = np.broadcast_to(params.get("temperature", 1.0), case.batch).reshape(N, 1)
    if tempered:  # of a difference where logits are given; of products, and of what is made from them, the quotient
        z, error, slope = z / temperature, error / temperature, slope / temperature
        slope_error = slope_error / temperature + 2 * eps * slope
        if case.function == "linear":
            error = error + eps * np.where(np.isfinite(z), abs(z), 0)

    mask = np.ones((N, V), bool)
    if "where" in case.data:
        where = case.data["where"]
        mask = rows(np.broadcast_to(where, _logits_shape(case)))
    counted = mask.any(-1)
    mask = mask | ~counted[:, None]
    ignore = case.constants.get("ignore_index")
    entries = None
    given_in = of_target = np.zeros((N, V))  # -log of its probabilities, and their relative error
    if "teacher_indices" in case.data:
        target = np.zeros((N, V))
    elif case.form == "distillation":
        target, given_in, of_target = _teacher(case, params, rows, mask, temperature, eps)
    elif case.kind == "probs":
        target = rows(params["targets"])
    else:
        labels = np.asarray(labels)
        indices = labels.astype(object).reshape(N, 1 if case.kind == "index" else labels.shape[-1])
        entries = np.ones(indices.shape) if case.kind == "index" else params["targets"].reshape(indices.shape)
        if ignore is not None:
            counted = counted & (indices != ignore).any(-1).astype(bool)
            entries = np.where((indices == ignore).astype(bool), 0, entries)
        hits = (indices[..., None] == np.arange(V)).astype(float)
        target = np.sum(hits * entries[..., None], -2)
    target = np.where(counted[:, None], target, 0)
    w = np.broadcast_to(params.get("weights", 1.0), case.batch).reshape(N)
    weighted = "class_weights" in params
    v = params.get("class_weights", np.ones(V))
    share = target @ v if weighted else np.ones(N)
    unused = ~counted | (w == 0)
    dead = bad & unused
    poison = poison.reshape(N)
    applied = np.where(counted, w * share, 0)

    # The loss of each row, then what the reduction makes of it.
    w_rows = np.where(counted, w, 0)
    if from_probs:
        problem = _FromProbs(np.where(dead[:, None], 1.0, z), target, w_rows, v, smoothing)
        off = np.zeros(N)
    else:
        problem = oracle.Problem(
            z, target, weights=w_rows, class_weights=v, label_smoothing=smoothing, z_loss=z_loss, where=mask
        )
        off = np.max(np.where(mask, error, 0), -1, initial=0)
    if "teacher_indices" in case.data or "divergence" in case.constants:
        problem = divergence = _Divergence(case, problem, w_rows, off, (target, given_in, of_target), params, eps)
        own_entropy, off_divergence, dz_off = np.zeros(N), divergence.error, divergence.gradient_error
    else:
        own_entropy, off_divergence, dz_off = np.sum(target * given_in, -1), 0.0, 0.0
    losses = problem.losses()
    below = problem.softmax.below
    near = np.where(np.isfinite(below), np.minimum(below, 120 if case.dtype == F32 else 800), 0) * (1 + tempered)
    runner_up = np.sort(np.where(mask, near, np.inf), -1)[:, 1] if V > 1 else np.zeros(N)
    slack = np.maximum(16, np.where(np.isfinite(runner_up), runner_up, 0))
    coefficients = np.where(mask, (1 - smoothing) * target * v + smoothing / problem.count[:, None] * v, 0)
    lse = losses.log_normalizer
    moves = abs(w_rows) * (2 * coefficients.sum(-1) + 2 * z_loss * (abs(lse.value) + off))
    loss = np.where(dead, 0, losses.loss.value - w_rows * own_entropy)
    size = np.where(dead, 0, losses.loss.size)
    bound = slack * eps * size + moves * off + tiny * V * abs(w_rows)
    p, surprise = problem.softmax.p, problem.softmax.surprise
    finite = np.where(np.isfinite(surprise), surprise, 0)
    off_target = np.sum(target * of_target * (given_in + finite + 1), -1) + off_divergence
    bound = bound + abs(w_rows) * off_target
    outputs: dict[str, Any] = {
        "nll": (
            np.where(counted, losses.nll.value, 0),
            slack * eps * losses.nll.size + 2 * target.sum(-1) * off + tiny * V,
        ),
        "log_normalizer": (lse.value, 16 * eps * lse.size + off),
        "entropy": (
            losses.entropy.value,
            np.sum(p * finite * (slack[:, None] + near), -1) * eps
            + 2 * (losses.entropy.value + 1 + off) * off
            + tiny * V * (1 - math.log(tiny)),  # p·(−log p) of each p that is flushed to 0
        ),
        "weight": (applied, 4 * eps * abs(applied) + eps * V * abs(applied)),
    }
    gap = np.sort(np.where(mask, z, -np.inf), -1)[:, ::-1]
    clear = np.ones(N, bool) if V == 1 else (gap[:, 0] - gap[:, 1] > 4 * off) & (cap is None)
    if case.function == "dense" and cap is None:
        clear[:] = True
    outputs["prediction"] = (np.argmax(np.where(mask, z, -np.inf), -1), clear)

    c = cot.get("loss", np.zeros(() if case.reduction != "none" else case.batch))
    divisor = {"mean": applied.sum(), "mean_count": float(counted.sum())}.get(case.reduction, 1.0)
    per_loss = 0.0 if divisor == 0 else 1 / divisor
    a = np.broadcast_to(c * per_loss, case.batch).reshape(N)
    by_divisor = -float(c) * loss.sum() * per_loss**2 if case.reduction == "mean" else 0.0
    by_divisor_error = 0.0
    if case.reduction == "none":
        outputs["loss"] = (loss, bound)
    else:
        total_error = bound.sum() + N * eps * size.sum()
        outputs["loss"] = (loss.sum() * per_loss, (total_error + (N + V + 4) * eps * size.sum()) * abs(per_loss))
        if case.reduction == "mean":
            by_divisor_error = abs(c) * (total_error + (2 * N + V + 8) * eps * size.sum()) * per_loss**2
    alive = ~(dead | bad)
    relative = 16 + (0 if case.reduction == "none" else N + 4) + (V if weighted else 0)

    nothing = np.zeros(N)
    b, cl, ch = (np.where(alive, cot.get(n, nothing).reshape(N) if n in cot else 0, 0) for n in AUX)
    b = np.where(counted, b, 0)
    cts = oracle.Cotangents(np.where(alive, a, 0), b, cl, ch)
    g = problem.gradients(cts)
    grads: dict[str, Any] = {}

    def masked(x: np.ndarray) -> np.ndarray:
        return np.where(mask & alive[:, None], x, 0)

    # In the logits.
    aw = abs(cts.loss * w_rows)
    dz, dz_size = masked(g.logits.value), masked(g.logits.size)
    exact_index = case.function in ("dense", "integer") and case.kind == "index" and set(cot) == {"loss"}
    if exact_index and not (smoothing or z_loss or cap or tempered or weighted):
        dz_size = abs(dz)
    bounded = (slack[:, None] - 16 + relative + near) * eps * dz_size + 3 * off[:, None] * dz_size
    bounded = bounded + masked(aw[:, None] * (target * of_target + dz_off))
    finite_below = np.where(np.isfinite(below), below, 0)
    spread = np.sum(p * finite_below * (16 + near), -1, keepdims=True)
    bounded = bounded + masked(abs(ch)[:, None] * p * (4 * off[:, None] + eps * spread))
    bounded = bounded + masked(p * (2 * aw * z_loss * off)[:, None])
    magnitude = abs(cl) + abs(ch) * 100 + abs(b) + aw * (1 + z_loss * 1e3)
    # What is flushed to 0: terms before the row's cotangent multiplies them, and after.
    bounded = bounded + masked(np.ones((N, V)) * (tiny * (8 * V * magnitude + np.sign(magnitude)))[:, None])
    if tempered:  # −Σ dz·z/T, where logits are given with z below the largest of them
        distance, largest = finite_below, np.where(bad, 0, lse.value - problem.softmax.log_sum)
        value = np.sum(dz * distance, -1) - largest * (cl + 2 * cts.loss * w_rows * z_loss * lse.value)
        of_largest = abs(largest) * (abs(cl) + 2 * aw * z_loss * (abs(lse.value) + off))
        if case.function == "linear":
            distance, of_largest = np.where(np.isfinite(z), abs(z), 0), 0 * of_largest
        unit = np.sum(dz_size * distance, -1) + of_largest
        error_t = np.sum(bounded * distance + dz_size * error, -1) + (V + relative + 8) * eps * unit
        parts, shape = (x / temperature[:, 0] for x in (value, unit, error_t)), params["temperature"].shape
        value, unit, error_t = (_summed_to(x.reshape(case.batch), shape) for x in parts)
        grads["temperature"] = value, unit, error_t + (N + 2) * eps * unit
    if cap or tempered:
        bounded = bounded * slope + dz_size * slope_error
        dz, dz_size = dz * slope, dz_size * slope
    second = None
    if case.transform == "hvp":  # a bound for its derivative in the logits, for each unit of theirs
        second = dz_size + masked(p * ((2 * aw * z_loss) + abs(ch))[:, None])

    def like(name: str, x: np.ndarray) -> np.ndarray:
        shape = params[name].shape
        if case.function != "linear" and name in ("logits", "targets") and case.kind + name != "indextargets":
            moved = np.moveaxis(np.empty(shape), case.axis, -1).shape
            return np.moveaxis(x.reshape(moved), -1, case.axis)
        return x.reshape(shape)

    if case.function == "linear":
        narrow = {case.params["hidden"].dtype, case.params["kernel"].dtype} == {BF16}
        h = np.where(bad[:, None], 0, h)
        rounding = 2.0**-8 * (abs(dz) + bounded) if narrow else 0 * dz
        of_hidden = (bounded + rounding + (V + 4) * eps * dz_size) @ abs(k).T
        of_kernel = abs(h).T @ (bounded + rounding + (N + 4) * eps * dz_size)
        dk = [h.T @ dz, abs(h).T @ dz_size, of_kernel]
        grads["hidden"] = tuple(like("hidden", x) for x in (dz @ k.T, dz_size @ abs(k).T, of_hidden))
        grads["kernel"] = tuple(x.T if case.constants.get("vocab_axis") == 0 else x for x in dk)
        grads["bias"] = (dz.sum(0), dz_size.sum(0), (bounded + (N + 4) * eps * dz_size).sum(0))
    else:
        grads["logits"] = tuple(like("logits", x) for x in (dz, dz_size, bounded))

    # In the targets.
    if "targets" in params:
        m, me = by_divisor * w_rows[:, None], by_divisor_error * abs(w_rows)[:, None]
        value, size_t = masked(g.targets.value), masked(g.targets.size)
        error_t = (
            relative * eps * size_t
            + masked((2 * off + tiny * V)[:, None] * (aw[:, None] * (1 - smoothing) * v + abs(b)[:, None]))
            + masked(eps * (slack - 16)[:, None] * size_t)
        )
        if weighted and case.reduction == "mean":
            extra = (m * v, abs(m) * v, me * v + 8 * eps * abs(m) * v)
            value, size_t, error_t = (
                x + np.where(counted[:, None], y, 0) for x, y in zip((value, size_t, error_t), extra, strict=True)
            )
        parts = [value, size_t, error_t]
        if case.kind == "sparse":
            inside = ((indices >= 0) & (indices < V)).astype(bool)
            at = np.where(inside, indices, 0).astype(int)
            use = inside & counted[:, None] & (True if ignore is None else (indices != ignore).astype(bool))
            parts = [np.where(use, np.take_along_axis(x, at, -1), 0).reshape(params["targets"].shape) for x in parts]
        else:
            parts = [like("targets", x) for x in parts]
        grads["targets"] = tuple(parts)

    # In what weighs.
    if "weights" in params:
        own = g.weights.value - cts.loss * own_entropy
        value = np.where(counted & alive, own, 0) + np.where(counted, by_divisor * share, 0)
        unit = np.where(counted & alive, g.weights.size, 0)
        moves = 2 * coefficients.sum(-1) + 2 * z_loss * (abs(lse.value) + off)
        error_w = (slack + relative) * eps * unit + abs(cts.loss) * (moves * off + off_target + tiny * V)
        error_w = error_w + np.where(counted, by_divisor_error * share + (V + 8) * eps * abs(by_divisor) * share, 0)
        shape = params["weights"].shape
        unit = unit + np.where(counted, abs(by_divisor) * share, 0)
        n = N // max(math.prod(shape), 1)
        parts = [_summed_to(x.reshape(case.batch), shape) for x in (value, unit, error_w + (n + 2) * eps * unit)]
        grads["weights"] = tuple(parts)
    shares = np.where(mask, (1 - smoothing) * target + smoothing / problem.count[:, None], 0)
    total = (relative + N + 4) * eps
    if weighted:
        of_divisor = by_divisor * np.sum(w_rows[:, None] * target, 0)
        off_divisor = by_divisor_error * np.sum(abs(w_rows)[:, None] * abs(target), 0)
        loose = np.sum(
            aw[:, None] * shares * (2 * off + tiny * V + eps * slack * finite.max(-1, initial=0))[:, None], 0
        )
        size_v = g.class_weights.size + abs(of_divisor)
        grads["class_weights"] = (g.class_weights.value + of_divisor, size_v, total * size_v + loose + off_divisor)
    both = np.sum(aw * (2 * off + tiny * V) * (target @ v + np.sum(np.where(mask, v, 0), -1) / problem.count))
    both += eps * np.sum(aw * (slack - 16) * np.where(np.isfinite(surprise), finite, 0).max(-1, initial=0) * 2)
    grads["label_smoothing"] = (g.label_smoothing.value, g.label_smoothing.size, total * g.label_smoothing.size + both)
    of_lse = np.sum(aw * 2 * (abs(lse.value) + off) * off)
    grads["z_loss"] = (g.z_loss.value, g.z_loss.size, 2 * total * g.z_loss.size + of_lse)
    if case.transform == "hvp":
        second = (second, dz_size, bounded, slack[:, None] + near + relative, off)
    return Step(outputs, {n: tuple(map(np.asarray, x)) for n, x in grads.items()}, bad, dead, second)


def _teacher(
    case: Case, params: dict[str, np.ndarray], rows: Any, mask: np.ndarray, temperature: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Its probabilities, -log of those that are not 0, and how far they are off, relative to themselves."""
    if case.function == "linear":
        hidden, kernel = params["teacher_hidden"], params["teacher_kernel"]
        z = hidden.reshape(len(mask), hidden.shape[-1]) @ (kernel if case.teacher_vocab_axis else kernel.T)
        z = z + params.get("teacher_bias", np.zeros(case.V))
    else:
        z = rows(params["teacher_logits"])
    z = np.where(np.isnan(z), 0, z)  # of a row that does not count
    error = np.zeros(z.shape)
    if cap := case.constants.get("teacher_logit_softcap"):
        z = cap * np.tanh(z / cap)
        error = 8 * eps * abs(z)
    z = z / temperature
    error = np.where(np.isfinite(z) & mask, error / temperature + 2 * eps * abs(z), 0).max(-1, initial=0)
    found = oracle.softmax(np.where(mask, z, -np.inf))
    below = np.where(np.isfinite(found.below), found.below, 0)
    surprise = np.where(np.isfinite(found.surprise), found.surprise, 0)
    return found.p, surprise, 2 * error[:, None] + (16 + below) * eps


class _Divergence:
    """`oracle.Problem` for a divergence: Σ a·p·log(p/m) + b·q·log(q/m), with q the student.

    p and q are of all classes, or of a few and of the others together; then the gradient in a logit is that in the
    logarithm of its class's own probability. q is off by E of itself, p by what the teacher says, and a logarithm of
    their quotient by the sum of both (divided by β, near which log1p has few digits).
    """

    def __init__(
        self,
        case: Case,
        student: oracle.Problem,
        w: np.ndarray,
        off: np.ndarray,
        teacher: tuple[np.ndarray, np.ndarray, np.ndarray],
        params: dict[str, np.ndarray],
        eps: float,
    ):
        self.softmax, self.count, self.w, self.student = student.softmax, student.count, w, student
        mask = student.mask
        # The logarithm of a probability may be known where it is itself too small for a float.
        possible = np.isfinite(self.softmax.surprise) & mask
        q = of_one = np.where(possible, np.maximum(self.softmax.p, np.finfo(float).tiny), 0)
        below = np.where(np.isfinite(self.softmax.below) & mask, self.softmax.below, 0)
        off_q = np.where(mask, 2 * off[:, None] + (16 + below) * eps, 0)
        N, V = q.shape
        group = np.broadcast_to(np.arange(V), (N, V))
        p, surprise, off_p = teacher
        log_q = -np.where(possible, self.softmax.surprise, 0)
        known = possible & ((p > 0) | (surprise > 0))
        if "teacher_indices" in params:
            K = params["teacher_indices"].shape[-1]
            indices, p = (params[name].reshape(N, K) for name in ("teacher_indices", "teacher_probs"))
            own = indices[..., None] == np.arange(V)
            group = np.where(own.any(1), own.argmax(1), K)
            members = (group[:, None] == np.arange(K + 1)[:, None]) & mask[:, None]
            q, off_q = np.sum(members * q[:, None], -1), np.max(members * off_q[:, None], -1) + V * eps
            rest = (1 - p.sum(-1, keepdims=True)) * case.constants.get("tail", True)
            p = np.concatenate([p, rest], -1)
            off_p = np.full(p.shape, 8 * eps)
            surprise, log_q = (-np.log(np.where(x > 0, x, 1)) * sign for x, sign in ((p, 1), (q, -1)))
            known = (p > 0) & (q > 0)
        kind, beta = case.constants.get("divergence", "forward_kl"), case.constants.get("beta", 0.5)
        on_p, on_q = {"forward_kl": (1, 0), "reverse_kl": (0, 1), "jsd": (beta, 1 - beta)}[kind]
        log_ratio = np.where(known, log_q + surprise, 0)  # of q to p
        of_m = log_ratio * on_p  # log(m/p)
        if kind == "jsd":
            of_m = np.logaddexp(np.log(beta), np.log(1 - beta) + log_ratio)
        either = off_q + off_p
        of_log = either / (min(beta, 1 - beta) if kind == "jsd" else 1)
        of_p, of_q = -of_m, log_ratio - of_m  # log(p/m), log(q/m)
        if kind == "jsd":  # where one of them is 0, m is a share of the other
            of_p, of_q = np.where(known, of_p, -np.log(beta)), np.where(known, of_q, -np.log(1 - beta))
        terms = on_p * p * of_p + on_q * q * of_q
        self.value, size = np.sum(terms, -1), np.sum(on_p * p * abs(of_p) + on_q * q * abs(of_q), -1)
        self.size = size
        self.error = np.sum((on_p * p + on_q * q) * (of_log + either * (abs(of_p) + abs(of_q))), -1)
        slope = -p / np.where(q > 0, q, 1) if kind == "forward_kl" else on_q * of_q  # the derivative in q
        off_slope = abs(slope) * either if kind == "forward_kl" else on_q * of_log
        mean, mean_size = (np.sum(q * x, -1, keepdims=True) for x in (slope, abs(slope)))
        off_mean = np.sum(q * (off_q * abs(slope) + off_slope), -1, keepdims=True)

        def of_class(x: np.ndarray) -> np.ndarray:
            return np.take_along_axis(x, group, -1)

        self.gradient = of_one * (of_class(slope) - mean)
        self.gradient_size = of_one * (of_class(abs(slope)) + mean_size)
        relative = of_class(off_q) * (of_class(abs(slope)) + mean_size)
        self.gradient_error = of_one * (relative + of_class(off_slope) + off_mean)

    def losses(self) -> oracle.Losses:
        loss = oracle.Valued(self.w * self.value, abs(self.w) * self.size)
        return self.student.losses()._replace(loss=loss)

    def gradients(self, ct: oracle.Cotangents) -> oracle.Gradients:
        aw = (ct.loss * self.w)[:, None]
        logits = oracle.Valued(aw * self.gradient, abs(aw) * self.gradient_size)
        weights = oracle.Valued(ct.loss * self.value, abs(ct.loss) * self.size)
        return self.student.gradients(ct)._replace(logits=logits, weights=weights)


class _FromProbs:
    """`oracle.Problem` for given probabilities: −log p is what they say, and the gradient is in p itself."""

    def __init__(self, p: np.ndarray, t: np.ndarray, w: np.ndarray, v: np.ndarray, smoothing: float):
        self.inner = oracle.Problem(np.zeros(p.shape), t, weights=w, class_weights=v, label_smoothing=smoothing)
        ok = np.where(p > 0, p, 1)
        surprise = np.where(p > 0, -np.log(ok), np.inf)
        zero = np.zeros(p.shape)
        self.softmax = self.inner.softmax._replace(surprise=surprise, p=zero, below=zero)
        self.inner.softmax = self.softmax._replace(max=np.zeros(len(p)), log_sum=np.zeros(len(p)))
        self.p, self.v, self.count = ok, np.broadcast_to(v, p.shape), self.inner.count
        self.t, self.w, self.smoothing = t, w, smoothing

    def losses(self) -> oracle.Losses:
        found = self.inner.losses()
        size = found.loss.size
        return found._replace(loss=oracle.Valued(found.loss.value, abs(size)))

    def gradients(self, ct: oracle.Cotangents) -> oracle.Gradients:
        kappa = (ct.loss * self.w)[:, None] * self.v
        kappa = kappa * ((1 - self.smoothing) * self.t + self.smoothing / self.count[:, None])
        return self.inner.gradients(ct)._replace(logits=oracle.Valued(-kappa / self.p, abs(kappa / self.p)))


def _logits_shape(case: Case) -> tuple[int, ...]:
    shape = [*case.batch, case.V]
    if case.function != "linear":
        shape.insert(case.axis % len(shape), shape.pop())
    return tuple(shape)


def _summed_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sum over the axes that `shape` broadcasts over."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def working(case: Case) -> dict[str, np.ndarray]:
    """The numbers that jaxce works with: options and target probabilities are cast to the working dtype first."""
    cast = ("targets", "weights", "temperature", "class_weights", "label_smoothing", "z_loss", "bias")
    given = case.params | {n: x for n, x in case.data.items() if n.startswith(("teacher", "temperature"))}
    return {n: up(x.astype(case.dtype) if n in cast else x) for n, x in given.items()}


def steps_of(case: Case, params: dict[str, np.ndarray]) -> list[Step]:
    labels, found = case.data.get("labels"), []
    for i in range(case.steps or 1):
        here = {n: x[i] if case.steps and n in TOKENS else x for n, x in params.items()}
        cot = {n: up(c[i] if case.steps else c) for n, c in case.cotangents.items()}
        poison = case.poison.reshape(case.steps or 1, math.prod(case.batch))[i]
        if case.transform == "discard" and poison.any():  # of the one number, or of the rows that are NaN
            cot = {n: c * (case.reduction == "none" and ~poison.reshape(case.batch)) for n, c in cot.items()}
        its_labels = labels if labels is None or not case.steps else labels[i]
        found.append(step_of(case, here, its_labels, cot, poison))
    return found


def second_derivatives(case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The derivative of the gradients along the tangents, by differences of the oracle's; and how far off it may be.

    A second derivative is a sum of products of a gradient with at most four of the tangents of its row's logits, and is
    computed by formulas at most twice as long.
    """
    params = working(case)
    tangent = {n: up(x) for n, x in case.tangents.items()}
    (at,) = steps_of(case, params)
    size, dz_size, error, slack, off = at.second
    N, V, eps = math.prod(case.batch), case.V, float(np.finfo(case.dtype).eps)
    if case.function == "linear":
        h, dh = (x["hidden"].reshape(N, x["hidden"].shape[-1]) for x in (params, tangent))
        k, dk = (x["kernel"].T if case.constants.get("vocab_axis") == 0 else x["kernel"] for x in (params, tangent))
        moved = abs(dh) @ abs(k) + abs(h) @ abs(dk) + abs(tangent.get("bias", np.zeros(V)))
    else:
        moved = abs(np.moveaxis(tangent["logits"], case.axis, -1).reshape(N, V))
    temperature = np.broadcast_to(params.get("temperature", 1.0), case.batch).reshape(N, 1)
    most = np.max(moved / temperature, -1, keepdims=True, initial=0)
    if case.function == "probs":
        most = np.max(moved / np.moveaxis(params["logits"], case.axis, -1).reshape(N, V), -1, keepdims=True, initial=0)
    curved = 4 * most * size * (1 + 1 / case.constants.get("logit_softcap", np.inf))
    D = params["hidden"].shape[-1] if case.function == "linear" else 0
    error_2 = curved * (2 * slack * eps + 6 * off[:, None] + 2 * (D + 2) * eps)
    magnitude = sum(abs(up(c)).max(initial=0) for c in case.cotangents.values())
    tiny = float(np.finfo(case.dtype).smallest_normal)
    error_2 = error_2 + tiny * (8 * V * magnitude * (1 + most) + np.sign(magnitude))  # flushed to 0
    h_step = 1e-3 / (1 + most.max(initial=0))
    ends = {}
    for i in (-2, -1, 1, 2):
        (there,) = steps_of(case, params | {n: params[n] + i * h_step * x for n, x in tangent.items()})
        ends[i] = there.grads
    # Differences err by eps/h of the gradient and by h⁴: far less than float32 does, and more than float64. So do the
    # moved logits themselves, by eps/h of their common offset.
    offset = 1e4 * (case.regime == "offset") * 2.0**-52 / h_step
    error_2 = error_2 + (curved + size) * 1e-9 + size * offset / temperature
    error = error + dz_size * 1e-9
    bounds: dict[str, np.ndarray] = {}
    if case.function == "linear":
        sum_v, sum_n = (V + 4) * eps, (N + 4) * eps
        bounds["hidden"] = (error_2 + sum_v * curved) @ abs(k).T + (error + sum_v * dz_size) @ abs(dk).T
        of_kernel = abs(h).T @ (error_2 + sum_n * curved) + abs(dh).T @ (error + sum_n * dz_size)
        bounds["kernel"] = of_kernel.T if case.constants.get("vocab_axis") == 0 else of_kernel
        bounds["bias"] = (error_2 + sum_n * curved).sum(0)
        bounds["hidden"] = bounds["hidden"].reshape(params["hidden"].shape)
    else:
        shape = np.moveaxis(params["logits"], case.axis, -1).shape
        bounds["logits"] = np.moveaxis(error_2.reshape(shape), -1, case.axis)
    return {
        n: ((8 * (ends[1][n][0] - ends[-1][n][0]) - (ends[2][n][0] - ends[-2][n][0])) / (12 * h_step), bounds[n])
        for n in tangent
    }


# --- checking -------------------------------------------------------------------------------------------------------


def check(case: Case) -> list[str]:
    """What is wrong with the loss and its gradients in this case."""
    try:
        loss, aux, grads, second = evaluate(case)
        jax.block_until_ready((loss, aux, grads, second))
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        return [f"{type(error).__name__}: {str(error)[:300]} ({line.filename.rsplit('/', 1)[-1]}:{line.lineno})"]
    with np.errstate(all="ignore"):
        return _differences(case, loss, aux, grads, second)


def _differences(case: Case, loss: Any, aux: Any, grads: dict[str, Any], second: dict[str, Any]) -> list[str]:
    steps, problems = steps_of(case, working(case)), []
    poison, any_poison = case.poison.reshape(case.steps or 1, math.prod(case.batch)), bool(case.poison.any())
    shape = (case.steps, *case.batch) if case.steps else case.batch
    rows = np.stack([s.dead for s in steps]).reshape(shape)
    not_finite = np.stack([s.bad for s in steps]).reshape(shape)

    def expect(
        name: str, got: Any, value: np.ndarray, bound: np.ndarray, dtype: Any, nan: Any = False, skip: Any = False
    ):
        """Equal within the bound, but NaN in `nan` and any finite number in `skip`."""
        if got.dtype != dtype:
            problems.append(f"{name}: {got.dtype}, not {dtype}")
        got, value = up(got), np.asarray(value)
        if got.shape != value.shape:
            problems.append(f"{name}: shape {got.shape}, not {value.shape}")
            return
        nan, skip = np.broadcast_to(nan, got.shape), np.broadcast_to(skip, got.shape)
        if not np.isnan(got[nan]).all():
            problems.append(f"{name}: {got[nan]} where it must be NaN")
        if not np.isfinite(got[skip & ~nan]).all():
            problems.append(f"{name}: {got[skip & ~nan]} of rows that do not count")
        where = ~(nan | skip)
        try:
            oracle.assert_within(got[where], value[where], np.broadcast_to(bound, got.shape)[where], name)
        except AssertionError as error:
            problems.append(" ".join(str(error).split()))

    def stacked(name: str) -> tuple[np.ndarray, np.ndarray]:
        values = [s.outputs[name] for s in steps]
        value, bound = (np.stack(x) for x in zip(*values, strict=True))
        if name == "loss" and case.reduction != "none":
            return (value, bound) if case.steps else (value[0], bound[0])
        return value.reshape(shape), bound.reshape(shape)

    nan_rows = poison.reshape(shape)
    lost = nan_rows if case.reduction == "none" else (poison.any(-1) if case.steps else any_poison)
    expect("loss", loss, *stacked("loss"), case.dtype, nan=lost)
    if aux is not None:
        for name in case.aux:
            lost = nan_rows if name == "nll" else not_finite & ~rows  # a label that is no class spoils only nll
            expect(f"aux.{name}", getattr(aux, name), *stacked(name), case.dtype, nan=lost, skip=rows)
        if not case.form:
            expect("aux.weight", aux.weight, *stacked("weight"), case.dtype, skip=nan_rows)
        value, clear = stacked("prediction")
        expect("aux.prediction", aux.prediction, value, 0 * value, np.int32, skip=~clear.astype(bool) | rows | nan_rows)

    discarded = case.transform == "discard" and any_poison
    loss_only = set(case.cotangents) == {"loss"}
    parts = (case.steps or 1) * (4 if case.mesh else 1)
    for name, got in grads.items():
        arg = case.params[name]
        found = [s.grads[name] for s in steps]
        tokens = case.steps and name in TOKENS
        if tokens:
            value, size, bound = (np.stack(x) for x in zip(*found, strict=True))
        else:
            value, size, bound = (sum(x) for x in zip(*found, strict=True))
        if case.steps and not tokens:
            bound = bound + case.steps * float(np.finfo(case.dtype).eps) * size
        nan: Any = False
        skip: Any = False
        if name in ("weights", "temperature"):
            if arg.shape != shape and rows.any():
                continue  # a sum over rows of which some may be anything finite
            skip = rows if arg.shape == shape else False
        elif name == "targets":
            # d/dt is −log p: +inf or −inf where p = 0, if the sum over a mean's divisor is not in the way.
            got = np.where(np.isfinite(value), up(got), 0).astype(got.dtype)
            skip = _row_mask(case, rows, name) | ~np.isfinite(value)
        elif any_poison and not discarded and loss_only and name in ("logits", "hidden"):
            nan = _row_mask(case, nan_rows, name)
            skip = case.kind == "index" and case.reduction == "mean" and "class_weights" in case.params
            if "where" in case.data and name == "logits":  # what takes no part has gradient 0, whatever the row
                where = np.broadcast_to(case.data["where"], arg.shape)
                nan, skip = nan & where, skip | (nan & ~where)
        if any_poison and name not in (MAIN[case.function] if discarded else ("logits", "hidden")):
            continue
        if any_poison and not discarded and not loss_only:
            skip = True
            continue
        if arg.dtype != case.dtype:
            rounding = oracle.half_ulp(abs(value) + bound, arg.dtype)
            if parts > 1 and not (tokens or name in ("logits", "hidden", "targets")):
                rounding = (2 * parts - 1) * oracle.half_ulp(size + bound, arg.dtype)  # each part, and each sum
            bound = bound + rounding
            # What is beyond the largest number of the dtype is rounded to an infinity of its sign.
            beyond = (abs(value) + bound > float(jnp.finfo(arg.dtype).max)) & (up(got) == np.sign(value) * np.inf)
            value, got = np.where(beyond, 0, value), np.where(beyond, 0, got).astype(got.dtype)
        expect(f"gradient of {name}", got, value, bound, arg.dtype, nan=nan, skip=skip)
    if second and not problems:
        for name, (value, bound) in second_derivatives(case).items():
            expect(f"second derivative of {name}", second[name], value, bound, case.params[name].dtype)
    return problems


def _row_mask(case: Case, rows: np.ndarray, name: str) -> np.ndarray:
    """`rows`, along the axes of a token array."""
    x = case.params[name]
    if case.function == "linear" or (name == "targets" and case.kind == "sparse"):
        return np.broadcast_to(rows[..., None], x.shape)
    axis = case.axis if case.axis < 0 else case.axis + (case.steps is not None)
    moved = np.moveaxis(np.empty(x.shape, bool), axis, -1)
    return np.moveaxis(np.broadcast_to(rows[..., None], moved.shape), -1, axis)


@contextlib.contextmanager
def computed_as(platform: str):
    """What is computed on this platform, "gpu" or "tpu", on the CPU."""

    def branch(*args: Any, default: Any, **branches: Any) -> Any:
        return branches.get(platform, default)(*args)

    jax.clear_caches()  # of programs that hold the branches of CPU
    with (
        mock.patch.object(jax.lax, "platform_dependent", branch),
        mock.patch.object(on_cpu, "_on_one_device", return_value=False),
    ):
        yield
    jax.clear_caches()


def only_here(case: Case) -> bool:
    """Whether the CPU lacks products that other platforms have, or the case is one of several platforms."""
    factors = [x.dtype for name, x in (case.params | case.data).items() if name.endswith(("hidden", "kernel"))]
    return case.transform == "export" or (case.function == "linear" and any(dtype.itemsize < 4 for dtype in factors))


def failures(seed: int, indices: Any, show: Any = None, platform: str | None = None) -> dict[int, list[str]]:
    """The cases that fail, by number; as `platform` computes them, those that the CPU can."""
    found = {}
    with warnings.catch_warnings(), computed_as(platform) if platform else contextlib.nullcontext():
        warnings.simplefilter("ignore")
        for i in indices:
            case = draw(seed, i)
            if platform and only_here(case):
                continue
            try:
                problems = check(case)
            except Exception as error:  # of the oracle
                line = traceback.extract_tb(error.__traceback__)[-1]
                problems = [
                    f"the sweep itself: {type(error).__name__}: {error} ({line.filename}:{line.lineno}) {line.line}"
                ]
            if problems:
                found[i] = problems
            if show is not None:
                show(i, case, problems)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the number of the first case")
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--platform", choices=("gpu", "tpu"), help="compute as on this one, whatever the CPU can")
    options = parser.parse_args(arguments)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    start, failed = time.monotonic(), 0

    def show(i: int, case: Case, problems: list[str]) -> None:
        nonlocal failed
        if problems:
            failed += 1
            print(f"--seed {options.seed} --only {i}: {case.describe()}", *problems, sep="\n    ", flush=True)
        elif options.only is not None:
            print(f"as it should be: {case.describe()}")
        if (i + 1) % 50 == 0:
            print(f"{i + 1} cases, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)

    one = options.only
    cases = range(options.start, options.start + options.cases) if one is None else [one]
    failures(options.seed, cases, show, options.platform)
    print(f"{failed} failed, {time.monotonic() - start:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
