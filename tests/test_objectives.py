"""What the language-model example does after the text: students that differ in their teacher alone, and preferences."""

import dataclasses
import io
import json
import math
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="needs the extra: examples")
pytest.importorskip("tokenizers", reason="needs the extra: examples")
from flax import nnx
from matplotlib.image import imread
from rich.console import Console

from jaxce.examples.language_model import __main__ as command
from jaxce.examples.language_model import distillation, preferences, program
from jaxce.examples.language_model.distillation import Comparison, Students
from jaxce.examples.language_model.preferences import Preference
from jaxce.examples.language_model.report import Measures, Row
from tests.test_language_model import make_settings, standard_promotion  # noqa: F401
from tests.test_linear import equations

MEASURES = ("validation_loss", "bits_per_byte")
EPS64 = float(np.finfo(np.float64).eps)
SETTINGS = {  # one size of network, and so few programs to compile
    "distill": make_settings(objective="distill", steps=3),
    "dpo": make_settings(objective="dpo", steps=3, preference_steps=20),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"There were {i} of [them] before, and {7 * i % 13} after.\n\n" for i in range(400)))
    return path


class Run:
    """The program from end to end: its stage, what that began with and was given, and what it printed and wrote."""

    def __init__(self, objective, text, path):
        self.objective, self.path, self.given = objective, path, {}
        console = Console(file=io.StringIO(), soft_wrap=True)
        with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
            patch.setitem(program.STAGES, objective, self.noted(program.STAGES[objective]))
            program.run(SETTINGS[objective], data=text, output_dir=path, console=console)
        self.history = json.loads((path / "history.json").read_text())
        self.printed = console.file.getvalue()

    def noted(self, stage):
        def make(trainer):
            self.stage = stage(trainer)
            self.at_first = {name: weights(model) for name, model in self.models().items()}
            if self.objective == "distill":
                self.note("text", self.stage.text, "_train_step")
                self.note("distilled", self.stage, "_distil")
            return self.stage

        return make

    def models(self):
        if self.objective == "dpo":
            return {"policy": self.stage.policy, "reference": self.stage.reference}
        students = {"text": self.stage.text.model, "distilled": self.stage.distilled.model}
        return {"teacher": self.stage.teacher} | students

    def note(self, name, place, attribute):
        step = getattr(place, attribute)

        def run(*arguments):
            self.given.setdefault(name, []).append(np.array(arguments[-1]))
            return step(*arguments)

        setattr(place, attribute, run)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, text):
    return Run("distill", text, tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def preferred(tmp_path_factory, text):
    return Run("dpo", text, tmp_path_factory.mktemp("dpo"))


def weights(model):
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


class Lookup(nnx.Module):
    """A hidden state for each token, whatever is before it: a network whose gradients keep all digits."""

    def __init__(self, rng, vocab_size, width, dtype=np.float64):
        self.states, self.outputs = (nnx.Param(jnp.asarray(rng.normal(size=(vocab_size, width)), dtype)) for _ in "ab")

    def __call__(self, tokens):
        return self.states[...][tokens]

    @property
    def table(self):
        return self.outputs[...]


def assert_same_loss_and_gradients(objective, naive, *arguments):
    """To within the roundings of a few hundred operations, in float64."""
    (value, found), (wanted, expected) = (nnx.jit(nnx.value_and_grad(f))(*arguments) for f in (objective, naive))
    np.testing.assert_allclose(value, wanted, rtol=500 * EPS64)
    leaves = jax.tree.leaves(expected)
    assert len(leaves) == 2
    for leaf, wanted_leaf in zip(jax.tree.leaves(found), leaves, strict=True):
        largest = np.abs(wanted_leaf).max()
        assert largest > 0
        np.testing.assert_allclose(leaf, wanted_leaf, rtol=0, atol=500 * EPS64 * largest)


def logits_held(objective, *arguments):
    """Whether loss and gradient hold an array of as many numbers as the logits of one model."""
    model, *rest = arguments
    graph, state = nnx.split(model)
    run = jax.make_jaxpr(jax.value_and_grad(lambda state: objective(nnx.merge(graph, state), *rest)))
    tokens = rest[-1][..., 1:].size
    sizes = [v.aval.size for eqn in equations(run(state).jaxpr) for v in eqn.outvars]
    assert len(sizes) > 100
    return max(sizes) >= tokens * model.table.shape[0]


# Distillation.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", [None, "store"])
@pytest.mark.every_case
def test_the_distillation_loss_is_that_of_all_logits(rng, mode):
    student, teacher = Lookup(rng, 11, 3), Lookup(rng, 11, 5)
    windows = rng.integers(0, 11, (2, 7)).astype(np.int32)

    def naive(student, teacher, windows):
        logits, of_teacher = (model(windows[:, :-1]) @ model.table.T for model in (student, teacher))
        log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(of_teacher)
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()

    assert_same_loss_and_gradients(distillation.make_objective(mode), naive, student, teacher, windows)


@pytest.mark.parametrize("objective", ["distill", "dpo"])
@pytest.mark.every_case
def test_no_array_of_all_logits(objective, rng):
    """At the size of the program's own batches and vocabulary; "store" would hold them."""
    models = [Lookup(rng, command.VOCAB_SIZE, 8, np.float32) for _ in range(2)]
    windows = rng.integers(0, command.VOCAB_SIZE, (16, 129)).astype(np.int32)
    if objective == "distill":
        assert not logits_held(distillation.make_objective(None), *models, windows)
        assert logits_held(distillation.make_objective("store"), *models, windows)
    else:
        assert not logits_held(
            preferences.preference_loss, *models, jnp.array(preferences.pairs(windows, windows[::-1]))
        )


def test_students_differ_in_what_they_learn_from_alone(distilled):
    teacher, text, student = distilled.at_first.values()
    chex.assert_trees_all_equal(text, student)
    chex.assert_trees_all_equal(teacher, weights(distilled.stage.teacher))

    np.testing.assert_array_equal(distilled.given["text"], distilled.given["distilled"])
    np.testing.assert_array_equal(distilled.given["text"], [distilled.stage.text.batch(step) for step in (1, 2, 3)])
    ends = [weights(model)[0] for model in distilled.models().values()]
    assert (ends[1] != text[0]).any()
    assert (ends[2] != text[0]).any()
    assert (ends[1] != ends[2]).any()

    divergences = [row["train_loss"] for row in distilled.history["students"]["rows"]]
    assert divergences[-1] < divergences[0]


@pytest.mark.parametrize(
    ("given", "halved"), [((128, 4), (64, 2)), ((64, 3), (32, 1)), ((32, 1), (32, 1)), ((192, 5), (96, 2))]
)
@pytest.mark.every_case
def test_students_have_half_the_width_and_layers_and_at_least_one_head_and_layer(given, halved, monkeypatch):
    monkeypatch.setattr(distillation, "Trainer", lambda _, settings: settings)
    settings = make_settings(width=given[0], layers=given[1])
    students = Students(SimpleNamespace(model=None, data=None, settings=settings))
    halved = dataclasses.replace(settings, width=halved[0], layers=halved[1])
    assert students.text == students.distilled == students.settings == halved


@pytest.mark.parametrize(
    ("distilled", "verdict"),
    [
        (Measures(3.75, 1.9), "0.2500 nats per token (0.100 bits per byte) ahead of"),
        (Measures(4.5, 2.25), "0.5000 nats per token (0.250 bits per byte) behind"),
    ],
)
@pytest.mark.every_case
def test_says_which_student_is_ahead(distilled, verdict):
    rows = [Row(800, 0.5, Comparison(Measures(4.0, 2.0), distilled), 1.0)]
    said = Students.closing(None, rows)
    assert said == f"After 800 steps each, distillation is {verdict} text alone."


# Preferences.


def test_pairs_share_a_prompt_and_differ_in_the_answer():
    own, other = np.arange(14).reshape(2, 7), 100 + np.arange(14).reshape(2, 7)
    chosen, rejected = preferences.pairs(own, other)
    np.testing.assert_array_equal(chosen, own)
    np.testing.assert_array_equal(rejected, [[0, 1, 2, 103, 104, 105, 106], [7, 8, 9, 110, 111, 112, 113]])


@pytest.mark.usefixtures("x64")
def test_the_preference_loss_is_that_of_log_softmax(rng):
    policy, reference = Lookup(rng, 11, 3), Lookup(rng, 11, 3)
    own, other = rng.integers(0, 11, (2, 4, 7)).astype(np.int32)

    def naive(policy, reference, pairs):
        def answers(model):
            log_p = jax.nn.log_softmax(model(pairs) @ model.table.T)
            return jnp.take_along_axis(log_p[:, :, 2:6], pairs[:, :, 3:, None], -1)[..., 0].sum(-1)

        chosen, rejected = answers(policy) - answers(reference)
        return -jnp.log(1 / (1 + jnp.exp(-0.1 * (chosen - rejected)))).mean()

    pairs = jnp.array(preferences.pairs(own, other))
    assert_same_loss_and_gradients(preferences.preference_loss, naive, policy, reference, pairs)


def test_starts_with_a_margin_of_0_and_a_loss_of_ln_2(preferred):
    chex.assert_trees_all_equal(*preferred.at_first.values())
    found = preferred.history["preferences"]
    assert (found["start"]["margin"], found["start"]["preferred"]) == (0, 0)
    assert found["start"]["validation_loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert "their margin is 0.0000 and the loss 0.6931; by definition: 0 and ln 2 = 0.6931" in preferred.printed
    assert "Warning" not in preferred.printed


@pytest.mark.parametrize(
    "start", [Preference(0.695, 0.0, 0.0), Preference(0.6931, 0.002, 1.0), Preference(*3 * [math.nan])]
)
@pytest.mark.every_case
def test_warns_when_policy_and_reference_differ_at_the_start(preferred, start):
    assert "Warning: expected them within 0.001." in preferred.stage.start_message(start)


def test_steps_raise_the_margin_and_leave_the_reference(preferred):
    rows = preferred.history["preferences"]["rows"]
    assert rows[-1]["margin"] > rows[0]["margin"] > 0
    assert rows[-1]["preferred"] > 0.6
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"] < math.log(2)
    chex.assert_trees_all_equal(preferred.at_first["reference"], weights(preferred.stage.reference))


def test_pairs_are_held_out_or_not_those_of_the_text(preferred):
    stage = preferred.stage
    chosen, rejected = stage.held_out
    np.testing.assert_array_equal(chosen, stage.trainer.validation_windows())
    np.testing.assert_array_equal(chosen[:, :8], rejected[:, :8])
    dataset = stage.trainer.data
    elsewhere = np.roll(dataset.validation, len(dataset.validation) // 2)
    np.testing.assert_array_equal(rejected[1, 8:], elsewhere[16 + 8 : 16 + 17])
    assert (chosen[:, 8:] != rejected[:, 8:]).any(1).all()

    of_text = np.concatenate([stage.trainer.batch(step) for step in range(1, 4)])
    batch = stage.batch(1)
    assert batch.shape == (2, 8, 17)
    assert not (batch[0][:, None] == of_text).all(-1).any(1).all()
    np.testing.assert_array_equal(batch, stage.batch(1))
    assert (batch != stage.batch(2)).any()


def test_rows_are_of_the_margins(preferred):
    stage, row = preferred.stage, preferred.history["preferences"]["rows"][-1]
    margin = np.asarray(preferences.margins(stage.log_probs(stage.policy), stage.log_probs(stage.reference)))
    assert row["margin"] == pytest.approx(margin.mean(), rel=1e-5)
    assert row["preferred"] == (margin > 0).mean()
    assert row["validation_loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)


# The whole program.


def table(run):
    """The rows that the history has of what came after the text, and the columns that were printed of each."""
    rows = run.history[run.stage.name]["rows"]
    lines = run.printed.splitlines()
    printed = lines[lines.index(run.stage.header) + 1 :][: len(rows)]
    for row, line in zip(rows, printed, strict=True):
        step, train_loss, *columns, _ = (float(column.rstrip("%")) for column in line.split())
        assert (step, train_loss) == (row["step"], pytest.approx(row["train_loss"], abs=5e-5))
        yield row, columns


def test_prints_and_writes_both_students_side_by_side(distilled):
    assert distilled.history["arguments"] == dataclasses.asdict(SETTINGS["distill"])
    assert [row["step"] for row in distilled.history["rows"]] == [1, 2, 3]
    rows, columns = zip(*table(distilled), strict=True)
    assert [row["step"] for row in rows] == [1, 2, 3]
    numbers = [[row[who][what] for who in ("text", "distilled") for what in MEASURES] for row in rows]
    np.testing.assert_allclose(columns, numbers, rtol=0, atol=5.1e-4)
    start = distilled.history["students"]["start"]
    assert start["text"] == start["distilled"]
    by = numbers[-1][0] - numbers[-1][2]
    closing = distilled.printed.splitlines()[-1]
    assert closing.startswith(f"After 3 steps each, distillation is {abs(by):.4f} nats per token")
    assert ("ahead" in closing) == (by > 0)
    assert imread(distilled.path / "curves.png").shape[:2] == (480, 1200)


def test_prints_and_writes_the_preferences(preferred):
    assert preferred.history["arguments"] == dataclasses.asdict(SETTINGS["dpo"])
    assert [row["step"] for row in preferred.history["rows"]] == [1, 2, 3]
    rows, columns = zip(*table(preferred), strict=True)
    assert [row["step"] for row in rows] == list(range(2, 21, 2))
    numbers = [[row["validation_loss"], row["margin"], 100 * row["preferred"]] for row in rows]
    assert (np.abs(np.subtract(columns, numbers)) <= [5.1e-5, 5.1e-4, 0.051]).all()
    closing = preferred.printed.splitlines()[-1]
    assert f"in {rows[-1]['preferred']:.1%} of held-out pairs" in closing
    assert imread(preferred.path / "curves.png").shape[:2] == (480, 1800)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["distill", "dpo"])
def test_equal_settings_give_equal_rows(objective, distilled, preferred, text, tmp_path):
    once = distilled if objective == "distill" else preferred

    def timeless(run):
        return re.sub(r'"seconds": [^},]*', "", json.dumps(run.history))

    assert timeless(Run(objective, text, tmp_path)) == timeless(once)


# The command line.


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--objective distill --loss dense", "--loss: expected fused with --objective distill, which never holds"),
        ("--objective dpo --loss dense", "--loss: expected fused with --objective dpo, which never holds the logits"),
        ("--objective distill --processes 2", "--processes: expected 1 with --objective distill, got 2."),
        ("--objective dpo --processes 2", "--processes: expected 1 with --objective dpo, got 2."),
        ("--objective distill --width 96", "--width: expected 32 or a multiple of 64 with --objective distill, whose"),
        ("--preference-steps 5", "--preference-steps: expected none with --objective sft, which has no preferences"),
        ("--objective distill --preference-steps 5", "--preference-steps: expected none with --objective distill"),
    ],
)
@pytest.mark.every_case
def test_refuses_what_makes_no_sense_together(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(command, "work", None)
    monkeypatch.setattr(command, "launch", None)
    assert command.main(arguments.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {complaint}")
    assert errors.count("\n") == 1


def test_settings_of_each_objective():
    def settings(*arguments):
        return command.settings_from(command.make_parser().parse_args(arguments))

    assert (settings().objective, settings().preference_steps) == ("sft", 0)
    assert settings("--objective", "distill", "--width", "32").preference_steps == 0
    assert settings("--objective", "dpo", "--width", "96").preference_steps == command.PREFERENCE_STEPS
    assert settings("--objective", "dpo", "--preference-steps", "7").preference_steps == 7
