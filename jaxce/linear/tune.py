"""The fastest plan of the linear loss on the device at hand, found by timing."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxce import checks
from jaxce.linear import LinearOptions, arrays_and_constants, chips, linear_cross_entropy, problem_of
from jaxce.linear import plan as plans
from jaxce.linear.costs import Problem
from jaxce.linear.plan import LinearPlan, Timing
from jaxce.sharding import explicit_mesh, spec_of
from jaxce.targets import Targets
from jaxce.types import Shape, takes_variables

_SLOW = 1.25  # times the fastest so far: such a plan is not timed again
_SLOW_TO_WARM_UP = 1.5  # times the fastest first run, in which a program also gets its memory
_TRYING = 3  # times the seconds of timing that compiling and first runs may take, but for the first plan
_NOISE = 1.03  # times the fastest: the default is as good as that


@takes_variables
def tune_linear_cross_entropy(
    hidden: Shape,
    kernel: Shape,
    targets: Targets | jax.ShapeDtypeStruct,
    *,
    seconds: float = 10.0,
    return_aux: bool = False,
    **options: Unpack[LinearOptions[Shape]],
) -> LinearPlan:
    r"""The plan that `jaxce.linear_cross_entropy` is fastest with, on the device that this process runs on.

    Compiles the loss and its gradients in hidden states and kernel in each mode, for blocks of several sizes, and times
    the programs in turn, seconds :math:`t_i` in round i:

    .. math:: \operatorname{argmin}_{\text{plan}} \operatorname{median}_i\, t_i(\text{plan})

    The likeliest come first: the default, then blocks of near its size in each mode. What runs out of memory or takes
    longer than another by a quarter (by half, in the run that warms it up) is left out of later rounds, and the default
    is chosen unless another is faster by 3 %.

    Nothing is remembered: give the result to the loss, `linear_cross_entropy(..., plan=plan)`, and keep it in a file
    with `LinearPlan.to_json` if it is to be used again.

    Args:
      hidden, kernel, targets: as there, of one device's size; arrays or `jax.ShapeDtypeStruct`, in place of which
        random numbers are used.
      seconds: how long to time programs, roughly; those still in question run twice at least. Compiling them and a
        first run of each come before that: once they have taken three times as long, no other plan is tried.
      return_aux, options: as there. With `mode` or `memory_budget` there are fewer plans to choose from; programs that
        are found to need more than the budget are left out as well.

    Returns:
      A `LinearPlan`; `print` shows what was measured.

    Raises:
      TypeError, ValueError: what `jaxce.linear_cross_entropy` would raise.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> hidden = jax.ShapeDtypeStruct((64, 32), jnp.float32)
      >>> kernel = jax.ShapeDtypeStruct((32, 1000), jnp.float32)
      >>> labels = jax.ShapeDtypeStruct((64,), jnp.int32)
      >>> plan = jaxce.tune_linear_cross_entropy(hidden, kernel, labels, mode="recompute", seconds=0.1)
      >>> plan.shape
      (64, 32, 1000)

    Note:
      Timings are of loss and gradient alone; within a training step what else the program does may change the order.
      Without a `memory_budget` the fastest plan may take as much memory as the logits; `print` says how much.
      With several processes tune in one, and give the others its plan (`to_json`): all must compile the same program.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float, np.number)) or not seconds > 0:
        checks.fail(ValueError, "seconds", "a number above 0", checks.describe(seconds))
    arguments: dict[str, Any] = {"hidden": hidden, "kernel": kernel, "targets": targets, "return_aux": return_aux}
    arguments |= options
    mode, memory_budget = arguments.pop("mode", None), arguments.pop("memory_budget", None)
    for name in "axis_name", "batch_axis_name", "plan":
        if arguments.get(name) is not None:
            hint = "Tune with what one device gets, and use the plan inside the shard_map."
            checks.fail(ValueError, name, "None", repr(arguments[name]), hint)
    _check_not_traced(arguments)
    for name, x in ("hidden", hidden), ("kernel", kernel):
        if explicit_mesh(x) is not None and any(axis is not None for axis in spec_of(x)):
            hint = "Tune with arrays of the size that one device gets; the plan is for each of them."
            checks.fail(ValueError, name, "an array of one device", f"one split over a mesh, {spec_of(x)}", hint)
    problem = problem_of(**arguments, mode=mode, memory_budget=memory_budget)
    found = plans.alternatives(problem, chips.chip()[0], mode, memory_budget)
    default = found[0]
    arrays, constants = arrays_and_constants(arguments)
    rest = _made(arrays, problem)
    _check_not_traced(rest)  # as random numbers are inside of jit
    given = {name: rest.pop(name) for name in ("hidden", "kernel")}, rest
    notes: dict[LinearPlan, str] = {}

    def run(plan: LinearPlan, program: Any) -> float | None:
        start = time.perf_counter()
        try:
            jax.block_until_ready(program(*given))
        except jax.errors.JaxRuntimeError as error:
            notes[plan] = _reason(error)
            return None
        return time.perf_counter() - start

    programs: dict[LinearPlan, Any] = {}
    first: dict[LinearPlan, float] = {}
    end = time.perf_counter() + _TRYING * seconds
    for plan in _with_progress("trying", found):
        if first and time.perf_counter() > end:
            notes[plan] = "not tried"
            continue
        compiled = _compiled(plan, given, constants)
        if isinstance(compiled, str):
            notes[plan] = compiled
        elif memory_budget is not None and compiled.memory_analysis().temp_size_in_bytes > memory_budget:
            notes[plan] = "needs more than the budget"
        elif (taken := run(plan, compiled)) is not None:
            programs[plan], first[plan] = compiled, taken
    times = _timed(programs, first, run, seconds, notes)
    if not times:
        reasons = "; ".join(sorted(set(notes.values())))
        checks.fail(ValueError, "hidden", "arguments of which one plan can run here", reasons, "Try fewer tokens.")
    medians = {plan: float(np.median(values)) for plan, values in times.items()}
    in_race = [plan for plan in times if plan not in notes]
    best = min(in_race or times, key=medians.__getitem__)  # all of them, if memory ran out for those that led
    if default in in_race and medians[default] <= _NOISE * medians[best]:
        best = default
    timings = [
        Timing(p.mode, p.block_n, p.block_v, medians.get(p), len(times.get(p, ())), notes.get(p, "")) for p in found
    ]
    timings.sort(key=lambda t: (t.seconds is None, bool(t.note), t.seconds or 0))
    return dataclasses.replace(best, timings=tuple(timings))


def _check_not_traced(arrays: dict[str, Any]) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays)):
        checks.fail(TypeError, "hidden", "arrays or jax.ShapeDtypeStruct", "a tracer", "Tune outside of jit.")


def _made(arrays: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """The arrays, with random numbers where they are only described."""
    rng = np.random.default_rng(0)

    def array(name: str, x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, problem.V, x.shape), x.dtype)
        if name in ("hidden", "kernel"):
            size = 1 if name == "hidden" else 1 / np.sqrt(problem.D)
            return jnp.asarray(rng.standard_normal(x.shape, np.float32) * np.float32(size), x.dtype)
        return jnp.full(x.shape, 1 / max(x.shape[-1], 1) if name == "targets" else 1, x.dtype)

    return {name: jax.tree.map(lambda leaf, name=name: array(name, leaf), x) for name, x in arrays.items()}


def _compiled(plan: LinearPlan, given: tuple[dict[str, Any], dict[str, Any]], constants: dict[str, Any]) -> Any:
    """The program of loss and gradients, or why there is none."""

    def total(hidden_and_kernel: dict[str, Any], rest: dict[str, Any]) -> Any:
        result = linear_cross_entropy(**hidden_and_kernel, **rest, **constants, plan=plan)
        loss, aux = result if isinstance(result, tuple) else (result, None)
        return jnp.sum(loss), aux

    try:
        return jax.jit(jax.value_and_grad(total, has_aux=True)).lower(*given).compile()
    except jax.errors.JaxRuntimeError as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    """Why a program cannot run, if that is for want of memory; anything else is a fault."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return "out of memory"


def _timed(
    programs: dict[LinearPlan, Any],
    first: dict[LinearPlan, float],
    run: Callable[[LinearPlan, Any], float | None],
    seconds: float,
    notes: dict[LinearPlan, str],
) -> dict[LinearPlan, list[float]]:
    """Seconds of each run of each program, in turn; why one has no more of them is written to `notes`."""
    times: dict[LinearPlan, list[float]] = {}
    for plan, taken in first.items():
        if taken > _SLOW_TO_WARM_UP * min(first.values()):
            notes[plan], times[plan] = "slower", [taken]
    end = time.perf_counter() + seconds
    for i in _with_progress("timing", range(50), end):
        racing = [plan for plan in programs if plan not in notes]
        for plan in racing if i % 2 == 0 else reversed(racing):
            if (again := run(plan, programs[plan])) is not None:
                times.setdefault(plan, []).append(again)
        if i == 0:
            continue
        medians = {plan: float(np.median(times[plan])) for plan in racing if plan not in notes}
        for plan, median in medians.items():
            if median > _SLOW * min(medians.values()):
                notes[plan] = "slower"
    return times


def _with_progress(what: str, items: Any, end: float | None = None) -> Iterator[Any]:
    """The items, at least two of them but no more once it is `end`; a bar on a terminal shows how far it is."""
    shown, start = sys.stderr.isatty(), time.perf_counter()
    for i, item in enumerate(items):
        if end is not None and i >= 2 and time.perf_counter() > end:
            break
        done = i / len(items)
        if end is not None:
            done = max(done, min((time.perf_counter() - start) / (end - start), 1))
        if shown:
            print(f"\r{what:<12}[{'#' * int(30 * done):<30}]", end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print("\r" + " " * 44 + "\r", end="", file=sys.stderr, flush=True)
