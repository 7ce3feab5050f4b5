"""torch's sample inputs, error inputs and reference functions for its cross-entropies, dense and linear.

torch's test cases are data: each gives arguments, and the expected loss comes from torch's function or from the
reference that the case brings. Loss and gradients are compared with the tolerance that torch has for the dtype.
"""

import dataclasses
import functools
import os
import pathlib
import random
import tempfile
from unittest import mock

# Hundreds of small programs, each run a few times: what takes long is compiling them.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import jaxce


def install(kind="dense"):
    jax.config.update("jax_enable_x64", True)  # torch's cases come in float64 too
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(tempfile.gettempdir()) / "jaxce-jit" / "peers"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def selected(kind="dense"):
    return [__file__, "-k", "linear" if kind == "linear" else "not linear"]


def differences(kind="dense"):
    nothing_left = "Expected nan but got 0.0", "a mean with every label ignored is 0 in jaxce, and NaN in torch"
    return {"peer_torch.test_module[cross_entropy-2d_ignore_index_mean-20]": nothing_left} if kind == "dense" else {}


# --- jaxce as torch calls it ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loss:
    """What of torch's arguments is a constant of the compiled program."""

    reduction: str
    ignore_index: int | None
    label_smoothing: float

    def options(self, target, class_weights):
        probs = jnp.issubdtype(target.dtype, jnp.floating)
        return {
            "class_weights": class_weights,
            "label_smoothing": self.label_smoothing,
            # torch's default stands for "none" where the target has no labels.
            "ignore_index": None if probs and self.ignore_index < 0 else self.ignore_index,
            # What torch divides by: the number of examples for probabilities, else the weights of their classes.
            "reduction": "mean_count" if probs and self.reduction == "mean" else self.reduction,
        }


class Dense(Loss):
    def __call__(self, input, target, weight):
        axis = 0 if input.ndim == 1 else 1
        return jaxce.softmax_cross_entropy(input, target, axis, **self.options(target, weight))


class Linear(Loss):
    def __call__(self, input, linear_weight, target, linear_bias, weight):
        options = self.options(target, weight)
        if linear_weight.ndim <= 2:
            return jaxce.linear_cross_entropy(input, linear_weight, target, bias=linear_bias, vocab_axis=0, **options)
        # torch lets the kernel have more axes, [V, d_1, ..., D], for as many losses per example: one vmap over them.
        num_classes, *more, features = linear_weight.shape
        probs = jnp.issubdtype(target.dtype, jnp.floating)
        batch = target.shape[:1]
        kernels = linear_weight.reshape(num_classes, -1, features)
        biases = None if linear_bias is None else linear_bias.reshape(num_classes, -1)
        targets = target.reshape(*target.shape[: 1 + probs], -1)

        def one(kernel, bias, target):
            return jaxce.linear_cross_entropy(
                input,
                kernel,
                target,
                bias=bias,
                vocab_axis=0,
                return_aux=True,
                **options | {"reduction": "none"},
            )

        loss, aux = jax.vmap(one, (1, None if biases is None else 1, -1), -1)(kernels, biases, targets)
        if self.reduction == "none":
            return loss.reshape(*batch, *more)
        return loss.sum() / {"sum": 1, "mean": aux.weight.sum(), "mean_count": loss.size}[options["reduction"]]


@functools.partial(jax.jit, static_argnums=0)
def _value_and_pullback(loss, *arrays):
    return jax.vjp(loss, *arrays)


@jax.jit
def _gradients(pullback, cotangent):
    return pullback(cotangent)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, *tensors):
        out, ctx.pullback = _value_and_pullback(loss, *map(_to_jax, tensors))
        ctx.dtype = out.dtype
        return _to_torch(out).to(tensors[0].dtype)  # torch rounds the loss of half precision; jaxce returns float32

    @staticmethod
    def backward(ctx, cotangent):
        gradients = _gradients(ctx.pullback, _to_jax(cotangent).astype(ctx.dtype))
        return None, *(None if g is None or g.dtype == jax.dtypes.float0 else _to_torch(g) for g in gradients)


def _to_jax(x):
    if x is None:
        return None
    x = x.detach()
    half = {torch.float16: jnp.float16, torch.bfloat16: jnp.bfloat16}.get(x.dtype)
    return jnp.asarray(x.numpy()) if half is None else jnp.asarray(x.float().numpy()).astype(half)


def _to_torch(x):
    half = {jnp.float16: torch.float16, jnp.bfloat16: torch.bfloat16}.get(x.dtype.type)
    return torch.tensor(np.asarray(x)) if half is None else torch.tensor(np.asarray(x, np.float32)).to(half)


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
):
    return _Function.apply(Dense(reduction, ignore_index, label_smoothing), input, target, weight)


def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=0.0,
    options=None,  # how torch makes blocks
):
    loss = Linear(reduction, -100 if ignore_index is None else ignore_index, label_smoothing)
    return _Function.apply(loss, input, linear_weight, target, linear_bias, weight)


# --- torch's cases --------------------------------------------------------------------------------------------------

ADAPTERS = {"cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy}
OPS = [op for op in op_db if op.name.rpartition(".")[2] in ADAPTERS and not op.variant_test_name]
MODULES = {torch.nn.CrossEntropyLoss: "cross_entropy", torch.nn.LinearCrossEntropyLoss: "linear_cross_entropy"}
MODULE_INFOS = [info for info in module_db if info.module_cls in MODULES]


def _seed():
    random.seed(0)
    torch.manual_seed(0)


def _samples(*dtypes):
    dense = next(op for op in OPS if op.name.endswith(".cross_entropy"))
    for dtype in dtypes:
        _seed()
        for i, sample in enumerate(dense.sample_inputs("cpu", dtype, requires_grad=True)):
            yield pytest.param(sample, id=f"cross_entropy-{str(dtype)[6:]}-{i}")


def _modules():
    for info in MODULE_INFOS:
        _seed()
        # The references compute in the dtype of the case: in float64 they are exact. The samples have other dtypes.
        inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
        for i, case in enumerate(inputs):
            if case.constructor_input.kwargs.get("options") is None:  # how torch makes blocks: the same cases again
                name = "-".join(filter(None, [MODULES[info.module_cls], case.desc, str(i)]))
                yield pytest.param(info.module_cls, case, id=name)


def _errors():
    """What torch refuses, as arguments of the functions."""
    _seed()
    for op in OPS:
        if op.error_inputs_func:
            name = op.name.rpartition(".")[2]
            for i, error in enumerate(op.error_inputs("cpu")):
                sample = error.sample_input
                yield pytest.param(name, (sample.input, *sample.args), sample.kwargs, id=f"{name}-{i}")
    for info in MODULE_INFOS:
        name = MODULES[info.module_cls]
        make = info.module_error_inputs_func
        errors = make(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
        for i, error in enumerate(errors):
            made, called = error.module_error_input.constructor_input, error.module_error_input.forward_input
            options = {k: v for k, v in made.kwargs.items() if k not in ("device", "dtype")}
            args = called.args
            if made.args:
                features, num_classes = made.args
                args = args[0], torch.zeros(num_classes, features), args[1]
            yield pytest.param(name, args, options, id=f"{name}_module-{i}")


def _leaves(x, dtype=None):
    """A copy of the arguments whose tensors are leaves, floats in `dtype`, and those of them to differentiate by."""
    if isinstance(x, torch.Tensor):
        copy = x.detach().clone()
        copy = copy.to(dtype) if dtype and copy.is_floating_point() else copy
        return copy.requires_grad_(x.requires_grad), [copy] if x.requires_grad else []
    if isinstance(x, dict):
        pairs = {key: _leaves(value, dtype) for key, value in x.items()}
        return {key: copy for key, (copy, _) in pairs.items()}, [leaf for _, found in pairs.values() for leaf in found]
    if isinstance(x, (tuple, list)):
        pairs = [_leaves(value, dtype) for value in x]
        return [copy for copy, _ in pairs], [leaf for _, found in pairs for leaf in found]
    return x, []


def _compare(actual, actual_leaves, expected, expected_leaves):
    """Loss and gradients, with torch's tolerance for the dtype of `actual`."""
    torch.testing.assert_close(actual, expected.to(actual.dtype))
    cotangent = torch.randn_like(expected).to(actual.dtype)
    gradients = torch.autograd.grad(actual, actual_leaves, cotangent)
    wanted = torch.autograd.grad(expected, expected_leaves, cotangent.to(expected.dtype))
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want.to(gradient.dtype))


@pytest.mark.parametrize("sample", _samples(torch.float64, torch.float32, torch.float16, torch.bfloat16))
def test_sample(sample):
    """Against torch's function in float64, on the very numbers of the sample."""
    arguments = [sample.input, *sample.args], sample.kwargs
    (args, kwargs), leaves = _leaves(arguments)
    (args64, kwargs64), leaves64 = _leaves(arguments, torch.float64)
    torch.manual_seed(1)
    _compare(cross_entropy(*args, **kwargs), leaves, functional.cross_entropy(*args64, **kwargs64), leaves64)


@pytest.mark.parametrize("sample", _samples(torch.float64))
def test_gradcheck(sample):
    """torch's check of a gradient by finite differences."""
    loss = functools.partial(cross_entropy, **sample.kwargs)
    assert torch.autograd.gradcheck(loss, (sample.input, *sample.args))


@pytest.mark.parametrize(("module_class", "case"), _modules())
def test_module(module_class, case):
    """torch's module with jaxce under it, against the reference that the case brings."""
    torch.manual_seed(1)
    module = module_class(*case.constructor_input.args, **case.constructor_input.kwargs).double()
    arguments = list(case.forward_input.args)
    args, leaves = _leaves(arguments)
    reference_args, reference_leaves = _leaves(arguments)
    name = MODULES[module_class]
    with mock.patch.object(functional, name, ADAPTERS[name]):
        actual = module(*args)
    parameters = list(module.parameters())
    # torch wraps the reference in a copy of its arguments, which has no gradients.
    expected = case.reference_fn.__wrapped__(module, parameters, *reference_args)
    _compare(actual, leaves + parameters, expected, reference_leaves + parameters)


@pytest.mark.parametrize(("name", "args", "kwargs"), _errors())
def test_error(name, args, kwargs):
    with pytest.raises((TypeError, ValueError)):
        ADAPTERS[name](*args, **kwargs)
