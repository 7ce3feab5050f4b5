"""What jaxce takes and returns can be kept and read again: by Flax, Orbax, pickle, and with names for its parts."""

from __future__ import annotations

import functools
import json
import pickle
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxce
from jaxce import diagnostics

LOGITS, LABELS = jnp.array([[2.0, 1.0, 0.1], [0.5, 2.5, jnp.nan]]), jnp.array([0, 2])
RECORDS = {
    "SparseTargets": lambda: jaxce.SparseTargets(jnp.array([[0, 2]]), jnp.array([[0.7, 0.3]], jnp.bfloat16)),
    "CrossEntropyAux": lambda: jaxce.softmax_cross_entropy(LOGITS, LABELS, return_aux=True)[1],
    "LogProbsAux": lambda: jaxce.log_probs(LOGITS, LABELS, return_aux=True)[1],
    "Calibration": lambda: diagnostics.calibration(LOGITS, LABELS),
    "Summary": lambda: diagnostics.summarize(LOGITS, LABELS),
    "Summary with top_k": lambda: diagnostics.summarize(LOGITS, LABELS, top_k=(2, 1)),
}
RECORDS = {name: functools.cache(make) for name, make in RECORDS.items()}
PLAN = jaxce.plan_linear_cross_entropy(*(jnp.zeros((8, 8)),) * 2, jnp.zeros(8, jnp.int32))


def by_flax(record, folder):
    return flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, record), flax.serialization.to_bytes(record))


def by_flax_in_a_state(record, folder):
    state = flax.serialization.to_state_dict({"step": 3, "kept": record})
    assert isinstance(state["kept"], dict)
    return flax.serialization.from_state_dict({"step": 0, "kept": jax.tree.map(jnp.zeros_like, record)}, state)["kept"]


def by_orbax(record, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "kept", {"kept": record})
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, record)
        return checkpointer.restore(folder / "kept", {"kept": like})["kept"]


def by_pickle(record, folder):
    return pickle.loads(pickle.dumps(record))


@pytest.mark.every_case
@pytest.mark.parametrize("way", [by_flax, by_flax_in_a_state, by_orbax, by_pickle])
@pytest.mark.parametrize("name", RECORDS)
def test_a_record_comes_back(name, way, tmp_path):
    record = RECORDS[name]()
    again = way(record, tmp_path)
    assert type(again) is type(record)
    assert jax.tree.structure(again) == jax.tree.structure(record)
    for found, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(record), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_a_summary_goes_on_after_it_was_restored(tmp_path):
    first, second = (diagnostics.summarize(LOGITS[i:][:1], LABELS[i:][:1]) for i in (0, 1))
    whole = diagnostics.finish(diagnostics.merge(first, second))
    for way in by_flax, by_pickle:
        assert repr(diagnostics.finish(diagnostics.merge(way(first, tmp_path), second))) == repr(whole)  # NaN != NaN


@pytest.mark.every_case
@pytest.mark.parametrize("name", RECORDS)
def test_every_part_has_a_name(name):
    """And not a number, in messages of JAX and in what is written: `.probs`, `.top_k_hits[2]`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path({"kept": RECORDS[name]()})
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    assert len(set(names)) == len(names)
    for one in names:
        assert re.fullmatch(r"\['kept'\](\.[a-z_]+)+(?<=top_k_hits)\[[12]\]|\['kept'\](\.[a-z_]+)+", one), one


@pytest.mark.parametrize(
    ("whole", "read"),
    [
        (PLAN, jaxce.LinearPlan.from_json),
        (diagnostics.report(LOGITS[:1], LABELS[:1]), None),
    ],
    ids=["LinearPlan", "Report"],
)
def test_what_holds_no_arrays_is_kept_as_json(whole, read, tmp_path):
    """A plan is read again; a report is for other programs to read. Both can be pickled, and lie beside arrays."""
    assert repr(pickle.loads(pickle.dumps(whole))) == repr(whole)
    plain = json.loads(whole.to_json()) if read else whole.to_dict()
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "plain", plain)
        found = checkpointer.restore(tmp_path / "plain")
    assert found == plain
    text = json.dumps(plain)
    assert flax.serialization.from_bytes({"plain": ""}, flax.serialization.to_bytes({"plain": text})) == {"plain": text}
    if read:
        assert read(json.dumps(found)) == whole
