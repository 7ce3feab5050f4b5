"""What a loss value means: against scikit-learn and scipy, in batches as at once, in words and as a picture."""

import functools
import itertools
import json
import math
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

import jaxce
from jaxce import diagnostics

EPS = float(np.finfo(np.float32).eps)
LN2, LN10 = math.log(2), math.log(10)


def draw(rng, n=301, classes=7, scale=2.0):
    labels = rng.integers(0, classes, n).astype(np.int32)
    logits = rng.normal(size=(n, classes)) * scale + 2 * np.eye(classes)[labels]
    return logits.astype(np.float32), labels


def softmax(logits):
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_sums_of_a_million_examples():
    """A sum that adds one example after the other in float32 is off by 1 % here: 0.1 to a sum of 40,000 adds 0.1016."""
    n = 1_000_000
    logits = np.tile(np.log(np.float32([0.97, 0.03])), (n, 1))
    labels = (np.arange(n) % 100 >= 97).astype(np.int32)
    found = diagnostics.report(logits, labels, weights=0.1)
    near = {"rtol": 300 * EPS}  # 256 additions in a row, and then in pairs
    loss = -(0.97 * np.log(0.97) + 0.03 * np.log(0.03))
    np.testing.assert_allclose([found.weight, found.loss, found.confidence], [n / 10, loss, 0.97], **near)
    np.testing.assert_allclose(found.expected_calibration_error, 0, atol=300 * EPS)
    np.testing.assert_allclose([c.loss for c in found.per_class], -np.log([0.97, 0.03]), **near)
    np.testing.assert_allclose([c.predicted for c in found.per_class], [1, 0], **near)
    np.testing.assert_allclose(sum(found.histogram.right), 0.097 * n, **near)
    sharp = diagnostics.calibration(logits, labels)
    np.testing.assert_allclose([sharp.confidences.sum(), sharp.hits.sum()], 0.97 * n, **near)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1025])
def test_sums_of_any_number_of_examples(n):
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 5, n)
    found = diagnostics.summarize(np.zeros((n, 5), np.float32), labels, num_bins=3)
    np.testing.assert_array_equal(found.class_weight, np.bincount(labels, minlength=5))
    assert found.calibration.weight.sum() == n


def test_the_standard_error():
    """Of the weighted mean; equal weights, whatever they are, give the unbiased one of the textbooks; none of one."""
    rng = np.random.default_rng(0)
    logits, labels = draw(rng, 60)
    nll = -np.log(softmax(logits)[np.arange(60), labels])
    for weights in 1.0, 1e-3:
        found = diagnostics.report(logits, labels, weights=weights)
        np.testing.assert_allclose(found.standard_error, nll.std(ddof=1) / np.sqrt(60), rtol=1e-4)
        np.testing.assert_allclose(found.effective_examples, 60, rtol=1e-5)
    weights = np.where(np.arange(60) < 20, 1.0, 1e-6)  # as if there were only the first 20
    found = diagnostics.report(logits, labels, weights=weights)
    np.testing.assert_allclose(found.standard_error, nll[:20].std(ddof=1) / np.sqrt(20), rtol=1e-3)
    alone = diagnostics.report(logits[:1], labels[:1])
    heavy = diagnostics.report(logits, labels, weights=np.where(np.arange(60) == 0, 0.1, 1e-12))
    huge, tiny = (diagnostics.report(logits, labels, weights=w) for w in (1e25, 1e-25))  # whose squares are inf and 0
    assert math.isnan(huge.effective_examples)
    for found in alone, heavy, huge, tiny:
        assert math.isnan(found.standard_error)
        assert "±" not in str(found)
        assert not any("guessing" in sentence for sentence in found.findings)  # one example says nothing of it


def test_too_many_examples_to_count():
    half = diagnostics.summarize(jnp.eye(3), jnp.array([0, 1, 2]))._replace(seen=jnp.int32(2**30))
    with pytest.raises(ValueError, match=r"^summary: expected at most 2\*\*31 - 1 examples"):
        diagnostics.finish(diagnostics.merge(half, half))


def test_checkify_passes_over_labels_of_weight_0():
    def score(labels):
        return diagnostics.brier(jnp.zeros((2, 3)), labels, weights=jnp.array([1.0, 0.0]))

    checked = checkify.checkify(score, errors=checkify.user_checks)
    assert checked(jnp.array([0, 99]))[0].get() is None
    assert "99" in checked(jnp.array([99, 0]))[0].get()


def test_numbers_in_arrays_and_ranges():
    logits, labels = jnp.array([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0]]), jnp.array([0, 1, 1])
    fitted = [diagnostics.fit_temperature(logits, labels, bounds=b) for b in ((0.1, 10), np.array([0.1, 10]))]
    assert fitted[0] == fitted[1]
    for top_k in (1, 2), range(1, 3), {1, 2}, np.array([1, 2]):
        assert list(diagnostics.report(logits, labels, top_k=top_k).top_k) == [1, 2]


def test_num_bins_of_numpy():
    found = [diagnostics.calibration(jnp.eye(3), jnp.arange(3), num_bins=n) for n in (7, np.int64(7))]
    np.testing.assert_array_equal(*(x.weight for x in found))


def test_a_report_is_finished_outside_of_jit():
    for f in diagnostics.report, lambda z, y: diagnostics.finish(diagnostics.summarize(z, y)):
        with pytest.raises(TypeError, match=r"^summary: expected numbers; got a traced summary. Return the summary"):
            jax.jit(f)(jnp.eye(3), jnp.array([0, 1, 2]))


# Beside guessing.


def test_chance_of_two_classes_by_their_rate():
    rates = np.arange(0.05, 0.96, 0.05)
    loss = np.asarray(diagnostics.chance_loss(priors=np.stack([1 - rates, rates], -1)), np.float64)
    assert loss.shape == (19,)
    np.testing.assert_allclose(loss[:3], [0.1985152433, 0.3250829734, 0.4227090878], rtol=8 * EPS)
    assert loss.argmax() == 9
    np.testing.assert_allclose(loss[9], 0.6931471806, rtol=4 * EPS)
    np.testing.assert_allclose(loss, loss[::-1], rtol=16 * EPS)


def test_chance_of_equal_classes():
    for classes in (1, 2, 10, 1000):
        uniform = jnp.full(classes, 1 / classes)
        assert diagnostics.chance_loss(classes) == pytest.approx(math.log(classes), rel=EPS)
        assert diagnostics.chance_loss(priors=uniform) == pytest.approx(math.log(classes), rel=8 * EPS, abs=EPS)
    assert diagnostics.chance_loss(priors=[1.0, 0.0]) == 0  # 0·ln 0


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({}, TypeError, "one of the two; got neither"),
        ({"num_classes": 2, "priors": [0.5, 0.5]}, TypeError, "got both"),
        ({"num_classes": 0}, ValueError, "at least 1"),
        ({"num_classes": 2.0}, TypeError, "a Python int"),
        ({"priors": [0.5, 0.6]}, ValueError, "sum to 1"),
        ({"priors": [1.5, -0.5]}, ValueError, "probabilities >= 0"),
        ({"priors": [3, 4]}, TypeError, "floats"),
    ],
)
def test_chance_refuses(arguments, error, complaint):
    with pytest.raises(error, match=complaint):
        diagnostics.chance_loss(**arguments)


def test_traced_priors_that_are_none_give_nan():
    traced = jax.jit(lambda q: diagnostics.chance_loss(priors=q))
    assert traced(jnp.array([0.5, 0.5])) == pytest.approx(LN2, rel=4 * EPS)
    assert math.isnan(traced(jnp.array([0.5, 0.6])))


def test_units():
    assert diagnostics.perplexity(LN10) == pytest.approx(10, rel=8 * EPS)
    assert diagnostics.bits(3 * LN2) == pytest.approx(3, rel=4 * EPS)
    assert diagnostics.skill(0.65, 10) == pytest.approx(1 - 0.65 / LN10, rel=4 * EPS)
    assert diagnostics.skill(0.65, 10) == diagnostics.skill(0.65, chance=math.log(10))
    assert diagnostics.skill(0.65, priors=[0.5, 0.5]) == pytest.approx(1 - 0.65 / LN2, rel=16 * EPS)
    assert diagnostics.accuracy_bound(2.0) == 0
    assert math.isnan(diagnostics.accuracy_bound(math.nan))
    with pytest.raises(TypeError, match="one of the three"):
        diagnostics.skill(0.65)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 20.0))
@settings(max_examples=30, deadline=None)
def test_no_accuracy_is_below_the_bound(seed, scale):
    logits, labels = draw(np.random.default_rng(seed), n=50, scale=scale)
    found = diagnostics.report(logits, labels)
    assert found.accuracy >= found.accuracy_bound - 8 * EPS
    assert found.accuracy_bound == pytest.approx(max(0, 1 - found.loss / LN2))


# Against scikit-learn.


@pytest.mark.parametrize("weighted", [False, True])
def test_against_scikit_learn(rng, weighted):
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = draw(rng)
    weights = rng.random(len(labels)).astype(np.float32) + 0.1 if weighted else None
    found = diagnostics.report(logits, labels, weights=weights, top_k=(1, 3))
    # Sums of N terms, in some order: N ε at the very most.
    near = {"rel": len(labels) * EPS}
    probs, every = softmax(logits), list(range(7))
    options = {"labels": every, "sample_weight": weights}
    assert found.loss == pytest.approx(metrics.log_loss(labels, probs, **options), **near)
    assert found.accuracy == pytest.approx(
        metrics.accuracy_score(labels, probs.argmax(-1), sample_weight=weights), **near
    )
    assert found.top_k[3] == pytest.approx(metrics.top_k_accuracy_score(labels, probs, k=3, **options), **near)
    assert found.top_k[1] == pytest.approx(found.accuracy, **near)
    brier = metrics.brier_score_loss(labels, probs, scale_by_half=False, **options)
    assert found.brier == pytest.approx(brier, **near)
    assert diagnostics.brier(logits, labels, weights=weights) == pytest.approx(brier, **near)


@pytest.mark.parametrize("bins", [4, 10, 15])
def test_reliability_against_scikit_learn(rng, bins):
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    logits, labels = draw(rng)
    probs = softmax(logits)
    accuracy, confidence = curve(probs.argmax(-1) == labels, probs.max(-1), n_bins=bins)
    found = diagnostics.calibration(logits, labels, num_bins=bins)
    some = np.asarray(found.weight) > 0
    np.testing.assert_allclose(np.asarray(found.accuracy)[some], accuracy, rtol=len(labels) * EPS)
    np.testing.assert_allclose(np.asarray(found.confidence)[some], confidence, rtol=len(labels) * EPS)
    gap, share = np.abs(accuracy - confidence), np.asarray(found.weight)[some] / len(labels)
    assert found.expected_error == pytest.approx((gap * share).sum(), abs=len(labels) * EPS)
    assert found.maximum_error == pytest.approx(gap.max(), abs=len(labels) * EPS)


def test_confidence_one_is_in_the_last_bin_and_a_half_in_the_lower():
    logits = jnp.array([[200.0, 0.0], [0.0, 0.0]])
    found = diagnostics.calibration(logits, jnp.array([0, 0]), num_bins=4)
    np.testing.assert_array_equal(found.weight, [0, 1, 0, 1])
    assert found.confidence[-1] == 1
    assert diagnostics.calibration(jnp.zeros((1, 1)), jnp.array([0]), num_bins=3).weight[-1] == 1
    many = diagnostics.calibration(jnp.zeros((1, 5000)), jnp.array([0]), num_bins=3)
    np.testing.assert_array_equal(many.weight, [1, 0, 0])


# Temperature.


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_temperature_against_scipy(rng, scale):
    optimize = pytest.importorskip("scipy.optimize")
    logits, labels = draw(rng)
    logits = (logits * scale).astype(np.float32)
    weights = rng.random(len(labels)).astype(np.float32)

    def loss(log_inverse):
        probs = softmax(logits.astype(np.float64) * np.exp(log_inverse))
        return -(weights * np.log(probs[np.arange(len(labels)), labels])).sum()

    wanted = np.exp(-optimize.minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9}).x)
    found = diagnostics.fit_temperature(logits + np.float32(8), labels, weights=weights)
    # The slope is a mean of N terms, each good to some ε; scipy's own digits end where the loss is flat, at √ε of f64.
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_temperature_at_its_limits():
    logits = jnp.array([[1.0, 0.0, -jnp.inf], [0.0, 2.0, 1.0]])
    right, wrong = jnp.array([0, 1]), jnp.array([1, 0])
    assert diagnostics.fit_temperature(logits, right) == pytest.approx(1e-3, rel=4 * EPS)  # separable
    assert diagnostics.fit_temperature(logits, wrong) == pytest.approx(1e3, rel=4 * EPS)  # anti-correlated
    assert diagnostics.fit_temperature(logits, right, bounds=(0.5, 2.0)) == pytest.approx(0.5, rel=4 * EPS)
    assert diagnostics.fit_temperature(jnp.zeros((2, 3)), right) == 1  # no T is better than another
    assert diagnostics.fit_temperature(logits, right, weights=0.0) == 1
    assert math.isnan(diagnostics.fit_temperature(logits, jnp.array([2, 1])))  # impossible at every T
    assert math.isnan(diagnostics.fit_temperature(logits.at[0, 0].set(jnp.nan), right))
    assert math.isnan(diagnostics.fit_temperature(logits, jnp.array([0, 3])))
    assert math.isnan(diagnostics.fit_temperature(logits.at[0].set(-jnp.inf), right))
    with pytest.raises(ValueError, match="0 < lower < upper"):
        diagnostics.fit_temperature(logits, right, bounds=(2.0, 1.0))
    for bounds in (1.0,), 2.0:
        with pytest.raises(ValueError, match=r"^bounds: expected two numbers"):
            diagnostics.fit_temperature(logits, right, bounds=bounds)


def test_an_ignored_example_does_not_move_the_temperature(rng):
    logits, labels = draw(rng)
    spoilt, marked = logits.copy(), labels.copy()
    spoilt[5], marked[5] = np.nan, -1
    kept = np.arange(len(labels)) != 5
    wanted = float(diagnostics.fit_temperature(logits[kept], labels[kept]))
    assert diagnostics.fit_temperature(spoilt, marked, ignore_index=-1) == pytest.approx(wanted, rel=1e-5)
    weights = kept.astype(np.float32)
    assert diagnostics.fit_temperature(spoilt, labels, weights=weights) == pytest.approx(wanted, rel=1e-5)


# What people ask.


@pytest.mark.parametrize("others", [[0.5, 0.1, 0.1, 0.2], [0.225, 0.225, 0.225, 0.225], [0.9, 0.0, 0.0, 0.0]])
def test_only_the_probability_of_the_true_class_counts(others):
    found = diagnostics.report(jnp.log(jnp.array([[0.1, *others]])), jnp.array([0]))
    assert found.loss == pytest.approx(2.302585, abs=5e-7)
    assert found.skill == pytest.approx(1 - LN10 / math.log(5), rel=16 * EPS)
    assert (found.accuracy, found.accuracy_bound) == (0, 0)
    assert found.right_loss != found.right_loss
    assert math.isnan(found.prior_skill)


def test_one_confident_mistake_makes_a_high_loss_at_90_percent():
    true = np.array([0.85] * 9 + [0.001])
    probs = np.tile(((1 - true) / 9)[:, None], (1, 10))
    probs[np.arange(10), np.arange(10)] = true
    found = diagnostics.report(np.log(probs).astype(np.float32), np.arange(10, dtype=np.int32))
    assert found.loss == pytest.approx(0.8370, abs=5e-5)
    assert found.accuracy == pytest.approx(0.9, rel=EPS)
    assert found.skill == pytest.approx(1 - found.loss / LN10, rel=4 * EPS)
    assert found.costliest[0].index == 9
    assert any("1 of 10 examples carries 83%" in said for said in found.findings)


def test_says_far_better_than_chance(rng):
    labels = np.arange(1000, dtype=np.int32) % 10
    good = np.log(0.52) * np.ones(1000)
    logits = np.full((1000, 10), np.log(0.48 / 9), np.float32)
    logits[np.arange(1000), labels] = good
    found = diagnostics.report(logits, labels)
    assert found.loss == pytest.approx(0.6539, abs=1e-4)
    assert found.findings[0].startswith("Far better than guessing (loss 0.6539, guessing 2.303): 72%")
    assert any(said.startswith("Underconfident: 52.0% sure on average, right 100.0%") for said in found.findings)


def test_says_no_better_than_chance_and_worse(rng):
    labels = rng.integers(0, 2, 500).astype(np.int32)
    assert (
        diagnostics.report(jnp.zeros((500, 2)), labels).findings[0].startswith("No better than guessing (loss 0.6931")
    )
    found = diagnostics.report(8 * rng.normal(size=(500, 2)).astype(np.float32), labels)
    assert found.findings[0].startswith("Worse than guessing")
    assert any(said.startswith("Overconfident") for said in found.findings)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_equal_logits_are_no_mistake(classes):
    """Neither of confidence nor of a class: which one comes first says nothing."""
    balanced, uneven = np.arange(120) % classes, np.maximum(np.arange(120) % 60 - 60 + classes, 0)
    found = diagnostics.report(jnp.full((120, classes), 3.0), balanced)
    (said,) = found.findings
    assert said.startswith("No better than guessing (loss")
    (said,) = diagnostics.report(jnp.full((120, classes), 3.0), uneven).findings
    assert said.startswith("Worse than guessing with the class frequencies")
    assert said.endswith("the probabilities are too even.")


@pytest.mark.parametrize("n", [64, 128, 1000])
def test_equal_logits_are_not_worse_than_the_frequencies_of_a_sample(rng, n):
    """Labels that are equally likely are not equally frequent, and only their frequencies beat 1/C."""
    said = [diagnostics.report(np.zeros((n, 10), np.float32), y).findings[0] for y in rng.integers(0, 10, (100, n))]
    worse = sum(sentence.startswith("Worse") for sentence in said)
    assert worse <= 12  # χ² of 9 is above its mean by two deviations in 4 of 100; above 12 in fewer than 1 of 2000
    assert sum(sentence.startswith("No better than guessing") for sentence in said) == 100 - worse


@pytest.mark.parametrize("n", [1, 5, 10, 30])
def test_few_examples_do_not_tell_of_calibration(rng, n):
    """Of a model that is as often right as it says."""
    logits = np.log(np.tile(np.array([[0.9, 0.1]], np.float32), (n, 1)))
    wrong = rng.random((100, n)) < 0.1
    said = [diagnostics.report(logits, y).findings for y in wrong.astype(np.int32)]
    blamed = sum("confident: " in " ".join(findings) for findings in said)
    assert blamed <= (15 if n > 1 else 0)  # two deviations of so few: 7 of 100 for 10 examples


def test_small_logits_are_no_confident_mistakes(rng):
    """Nor are those of a model that has hardly begun: rare classes cost it what they cost everyone."""
    labels = (np.arange(500) % 10 == 0).astype(np.int32)
    said = diagnostics.report(1e-3 * rng.normal(size=(500, 2)).astype(np.float32), labels).findings[0]
    assert said.endswith("the probabilities are too even.")
    said = diagnostics.report(3 * rng.normal(size=(500, 2)).astype(np.float32), labels).findings[0]
    assert said.endswith("confident mistakes cost more than the rest gains.")


def test_frequencies_are_the_guess_to_beat():
    labels = np.repeat(np.array([0, 1], np.int32), [95, 5])
    logits = np.tile(np.log(np.array([[0.95, 0.05]], np.float32)), (100, 1))
    found = diagnostics.report(logits, labels)
    assert found.loss == pytest.approx(0.1985152433, rel=200 * EPS)
    assert found.skill > 0.7  # which says nothing here
    assert found.prior_skill == pytest.approx(0, abs=200 * EPS)
    assert found.findings[0].startswith("No better than guessing with the class frequencies")
    assert [c.chance for c in found.per_class] == pytest.approx([-math.log(0.95), -math.log(0.05)])
    assert any("never predicted: 1" in said for said in found.findings)


def test_says_when_logits_look_like_probabilities(rng):
    logits, labels = draw(rng)
    probs = softmax(logits).astype(np.float32)
    assert any("look like probabilities" in said for said in diagnostics.report(probs, labels).findings)
    for fine in (logits, np.log(probs)):
        assert not any("look like" in said for said in diagnostics.report(fine, labels).findings)


def test_one_class_costs_nothing_to_guess():
    found = diagnostics.report(jnp.ones((4, 3)), jnp.zeros(4, jnp.int32))
    assert "-0.0" not in str(found)
    assert math.copysign(1, found.per_class[0].chance) == 1


def test_says_which_labels_never_occur():
    found = diagnostics.report(jnp.eye(9)[:2], jnp.array([0, 1]), class_names=list("abcdefghi"))
    assert "Labels that never occur: c, d, e, f, g and 2 more." in found.findings


# What does not count, and what cannot be known.


def test_ignored_and_weightless_examples_count_nowhere(rng):
    logits, labels = draw(rng, n=40)
    kept = np.arange(40) % 3 != 1
    wanted = diagnostics.report(logits[kept], labels[kept])
    spoilt = np.where(kept[:, None], logits, np.nan).astype(np.float32)
    ignored = diagnostics.report(spoilt, np.where(kept, labels, -100), ignore_index=-100)
    weightless = diagnostics.report(spoilt, labels, weights=kept)
    original = np.flatnonzero(kept)
    for found in (ignored, weightless):
        assert [e.index for e in found.costliest] == [original[e.index] for e in wanted.costliest]
        assert_alike(found, wanted, skip=("costliest", "findings"))


def test_whole_weights_are_repetitions(rng):
    logits, labels = draw(rng, n=40)
    times = rng.integers(0, 4, 40)
    found = diagnostics.report(logits, labels, weights=times)
    wanted = diagnostics.report(np.repeat(logits, times, 0), np.repeat(labels, times))
    for name in ("loss", "accuracy", "brier", "expected_calibration_error", "prior_chance", "right_loss", "wrong_loss"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=200 * EPS), name
    np.testing.assert_allclose(found.histogram.right, wanted.histogram.right)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        ("logit", "logits that are NaN or +inf"),
        ("infinite logit", "logits that are NaN or +inf"),
        ("impossible row", "rows of nothing but -inf"),
        ("label above", "labels that are no class"),
        ("label below", "labels that are no class"),
        ("weight", "weights that are NaN, infinite or negative"),
        ("infinite weight", "weights that are NaN, infinite or negative"),
        ("negative weight", "weights that are NaN, infinite or negative"),
    ],
)
def test_what_cannot_be_known_is_nan(rng, spoil, cause):
    logits, labels = draw(rng)
    weights = np.ones(len(labels), np.float32)
    if spoil.endswith("logit"):
        logits[3, 2] = np.inf if spoil == "infinite logit" else np.nan
    elif spoil == "impossible row":
        logits[3] = -np.inf
    elif spoil.startswith("label"):
        labels[3] = 7 if spoil == "label above" else -1
    else:
        weights[3] = {"weight": np.nan, "infinite weight": np.inf, "negative weight": -1}[spoil]
    found = diagnostics.report(logits, labels, weights=weights)
    for name in ("loss", "accuracy", "skill", "perplexity", "brier", "expected_calibration_error", "accuracy_bound"):
        assert math.isnan(getattr(found, name)), name
    assert math.isnan(found.maximum_calibration_error)
    assert math.isnan(found.top_k[5])
    assert found.costliest[0].index == 3
    assert "The loss is NaN" in found.findings[0]
    assert cause in found.findings[0]
    assert not any("never predicted" in said for said in found.findings)
    json.dumps(found.to_dict(), allow_nan=False)
    assert math.isnan(diagnostics.brier(logits, labels, weights=weights))
    assert math.isnan(diagnostics.calibration(logits, labels, weights=weights).expected_error)


def test_few_wrong_among_millions_are_counted():
    right = diagnostics.summarize(jnp.array([[9.0, 0.0]] * 4096), jnp.zeros(4096, jnp.int32))
    wrong = diagnostics.summarize(jnp.array([[0.0, 5.0]]), jnp.array([0]))
    for _ in range(13):
        right = diagnostics.merge(right, right)
    for _ in range(100):
        right = diagnostics.merge(right, wrong)
    found = diagnostics.finish(right)
    assert found.accuracy == pytest.approx(1 - 100 / 2**25, rel=EPS)
    assert found.wrong_loss == pytest.approx(5 + math.log1p(math.exp(-5)), rel=100 * EPS)


def test_more_examples_than_can_be_counted_are_refused():
    summary = diagnostics.summarize(jnp.zeros((2, 2)), jnp.array([0, 1]))
    summary = summary._replace(seen=jnp.asarray(2**30, jnp.int32))
    for _ in range(3):  # 2**33 wraps to 0
        summary = diagnostics.merge(summary, summary)
        with pytest.raises(ValueError, match="at most 2\\*\\*31 - 1 examples"):
            diagnostics.finish(summary)


def test_frequencies_of_few_labels_are_no_standard(rng):
    """Those of 64 different labels would cost 4.16, and of one label nothing."""
    labels = rng.permutation(1000)[:64]
    logits = rng.normal(size=(64, 1000)).astype(np.float32)
    logits[np.arange(64), labels] += 2.5
    found = diagnostics.report(logits, labels)
    assert found.prior_chance == pytest.approx(math.log(64), rel=EPS)
    assert found.prior_chance < found.loss < found.chance
    assert found.findings[0].startswith(f"Better than guessing (loss {found.loss:.4g}, guessing 6.908)")


def test_frequencies_of_many_labels_are_a_standard_though_many_are_rare(rng):
    """As tokens are: of 2,000 classes some 800 occur among 10,000, whose entropy is known to 0.04 nats."""
    frequencies = 1 / np.arange(1, 2001) ** 1.3
    labels = rng.choice(2000, 10_000, p=frequencies / frequencies.sum())
    found = diagnostics.report(np.zeros((10_000, 2000), np.float32), labels)
    assert sum(c.count == 1 for c in found.per_class) > 100
    assert found.findings[0].startswith("Worse than guessing with the class frequencies (loss 7.601")


def test_an_impossible_label_is_an_infinite_loss():
    found = diagnostics.report(jnp.array([[0.0, -jnp.inf], [1.0, 0.0]]), jnp.array([1, 0]))
    assert (found.loss, found.accuracy) == (math.inf, 0.5)
    assert "infinite" in found.findings[0]
    assert found.to_dict()["loss"] == "inf"


def test_tiny_losses_keep_their_digits():
    found = diagnostics.report(jnp.array([[1e6, 1e6 - 20.0]]), jnp.array([0]))
    assert found.loss == pytest.approx(2.0611536e-09, rel=1e-6)
    assert found.brier == pytest.approx(2 * 2.0611536e-09**2, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("labels", [np.int8, np.uint8, np.int32])
def test_narrow_dtypes(rng, dtype, labels):
    logits, y = draw(rng, n=30, classes=200)
    y = (y % 100).astype(labels)
    narrow = jnp.asarray(logits, dtype)
    found = diagnostics.report(narrow, y)
    assert_alike(found, diagnostics.report(narrow.astype(jnp.float32), y.astype(np.int32)))


@pytest.mark.parametrize("stacked", ["vmap", "one"])
def test_stacked_summaries_are_merged_first(rng, stacked):
    logits, labels = draw(rng)
    batches = (logits[None], labels[None]) if stacked == "one" else (np.stack([logits] * 3), np.stack([labels] * 3))
    several = jax.vmap(diagnostics.summarize)(*batches)
    with pytest.raises(ValueError, match=r"summary: expected one Summary; got several, stacked as \(\d,\)\. Merge"):
        diagnostics.finish(several)
    with pytest.raises(ValueError, match="b: expected one Summary"):
        diagnostics.merge(diagnostics.summarize(logits, labels), several)
    each = [jax.tree.map(lambda x, i=i: x[i], several) for i in range(len(batches[0]))]
    assert diagnostics.finish(functools.reduce(diagnostics.merge, each)).examples == len(each) * len(labels)


def test_checkify_finds_nothing_in_what_does_not_count(rng):
    logits, labels = draw(rng)
    labels[::3] = -1

    def summarized(logits):
        return diagnostics.summarize(logits, labels, ignore_index=-1)

    error, found = jax.jit(checkify.checkify(summarized, errors=checkify.all_checks))(logits)
    assert error.get() is None
    chex.assert_trees_all_equal(found, summarized(logits))


@pytest.mark.parametrize(("accuracy", "said"), [(0.9996, "The 0.04% of wrong"), (0.98, "The 2.0% of wrong")])
def test_small_shares_have_digits(accuracy, said):
    wrong = round(10_000 * (1 - accuracy))
    logits = np.tile(np.float32([9, 0]), (10_000, 1))
    found = diagnostics.report(logits, (np.arange(10_000) < wrong).astype(int), num_costliest=1)
    assert any(sentence.startswith(said) for sentence in found.findings)


def test_refuses():
    logits = jnp.zeros((4, 3))
    with pytest.raises(TypeError, match=r"targets: expected an array of integers.*argmax"):
        diagnostics.report(logits, logits)
    with pytest.raises(ValueError, match="targets: expected shape"):
        diagnostics.report(logits, jnp.zeros((4, 1), jnp.int32))
    with pytest.raises(ValueError, match="class_names: expected 3 names"):
        diagnostics.report(logits, jnp.zeros(4, jnp.int32), class_names=["a"])
    with pytest.raises(ValueError, match="at least one example"):
        diagnostics.report(logits, jnp.full(4, -1), ignore_index=-1)
    with pytest.raises(ValueError, match="top_k"):
        diagnostics.report(logits, jnp.zeros(4, jnp.int32), top_k=0)
    with pytest.raises(ValueError, match="top_k"):
        diagnostics.report(logits, jnp.zeros(4, jnp.int32), top_k=5.0)
    few, many = (diagnostics.calibration(logits, jnp.zeros(4, jnp.int32), num_bins=n) for n in (1, 15))
    with pytest.raises(ValueError, match="other: expected 1 bins; got 15"):
        few.merge(many)
    with pytest.raises(ValueError, match="num_bins"):
        diagnostics.calibration(logits, jnp.zeros(4, jnp.int32), num_bins=0)
    small, large = (diagnostics.summarize(jnp.zeros((2, v)), jnp.zeros(2, jnp.int32)) for v in (3, 4))
    with pytest.raises(ValueError, match="same number of classes"):
        diagnostics.merge(small, large)


# In batches.


def flat(x):
    """Path and value of all that a report's dict holds."""
    if isinstance(x, dict):
        return {f"{k}.{p}": v for k, inner in x.items() for p, v in flat(inner).items()}
    if isinstance(x, list):
        return flat(dict(enumerate(x)))
    return {"": x}


def assert_alike(a, b, skip=()):
    a, b = ({k: v for k, v in flat(r.to_dict()).items() if not k.startswith(tuple(skip) or "-")} for r in (a, b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, float):  # sums of a few hundred terms, in another order
            assert value == pytest.approx(b[key], rel=400 * EPS, abs=400 * EPS), key
        else:
            assert value == b[key], key


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.sampled_from([0, 5, 12, 24]), min_size=2, max_size=2),  # few sizes to compile for
    ties=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_batches_merge_to_one_pass_in_any_order_of_merging(seed, cuts, ties):
    rng = np.random.default_rng(seed)
    logits, labels = draw(rng, n=24)
    if ties:
        logits = np.round(logits / 4)
    labels[rng.random(24) < 0.2] = -1
    labels[0] = 0
    options = {"ignore_index": -1, "num_costliest": 5}
    parts = np.split(np.arange(24), sorted(cuts))
    a, b, c = (diagnostics.summarize(logits[p], labels[p], **options) for p in parts)
    one_pass = diagnostics.report(logits, labels, **options)
    left = diagnostics.merge(diagnostics.merge(a, b), c)
    right = diagnostics.merge(a, diagnostics.merge(b, c))
    # Examples of equal loss may come out of another batch size with another last digit, and so in another order.
    skip = ("findings", "costliest") if ties else ("findings",)
    for merged in (left, right):
        assert int(merged.seen) == 24
        assert_alike(diagnostics.finish(merged), one_pass, skip)


@pytest.mark.slow
def test_streams_under_jit_and_scan(rng):
    logits, labels = draw(rng, n=60)
    first = diagnostics.summarize(logits[:20], labels[:20])

    def step(total, batch):
        return diagnostics.merge(total, diagnostics.summarize(*batch)), None

    rest = logits[20:].reshape(2, 20, -1), labels[20:].reshape(2, 20)
    total, _ = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(first, rest)
    assert_alike(diagnostics.finish(total), diagnostics.report(logits, labels))


@pytest.mark.slow
def test_numeric_parts_are_jitable(rng):
    logits, labels = draw(rng, n=20)
    for function in (diagnostics.brier, diagnostics.fit_temperature, diagnostics.calibration, diagnostics.summarize):
        eager, jitted = function(logits, labels), jax.jit(function)(logits, labels)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=64 * EPS), eager, jitted)
    halves = [diagnostics.calibration(logits[p], labels[p]) for p in (slice(12), slice(12, None))]
    np.testing.assert_allclose(
        halves[0].merge(halves[1]).expected_error, diagnostics.calibration(logits, labels).expected_error, rtol=64 * EPS
    )


@pytest.mark.slow
def test_double_precision(rng, x64):
    logits, labels = draw(rng)
    logits = logits.astype(np.float64)
    probs = softmax(logits)
    found = diagnostics.report(logits, labels)
    assert found.loss == pytest.approx(-np.log(probs[np.arange(len(labels)), labels]).mean(), rel=1e-13)
    assert diagnostics.fit_temperature(logits, labels).dtype == jnp.float64
    assert diagnostics.chance_loss(10) == pytest.approx(LN10, rel=1e-16)


# As a table, a dict and a picture.


def test_batch_axes_are_flattened(rng):
    logits, labels = draw(rng, n=24)
    assert_alike(diagnostics.report(logits.reshape(4, 6, 7), labels.reshape(4, 6)), diagnostics.report(logits, labels))


@pytest.mark.slow
def test_prints_an_aligned_table(rng):
    logits, labels = draw(rng, classes=12, scale=0.7)
    text = str(diagnostics.report(logits, labels, class_names=[f"class {c}" for c in range(12)]))
    numbers, classes, examples, findings = text.split("\n\n")
    assert {line[:15].rstrip() == line[:15].strip() and line[14] == " " for line in numbers.split("\n")} == {True}
    assert "classes that cost most" in classes
    for table, rows in ((classes, 10), (examples, 5)):
        assert len({len(line) for line in table.split("\n")}) == 1
        assert table.count("\n") == rows
    assert findings.startswith("Far better than guessing")
    assert max(map(len, text.split("\n"))) < 200


def test_to_dict_is_json(rng):
    logits, labels = draw(rng)
    found = diagnostics.report(logits, labels)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["loss"] == found.loss
    assert read["top_k"] == {"5": found.top_k[5]}
    assert read["findings"] == list(found.findings)
    assert len(read["per_class"]) == 7
    assert sum(read["histogram"]["right"]) + sum(read["histogram"]["wrong"]) == len(labels)
    assert len(read["histogram"]["right"]) == len(read["histogram"]["edges"]) + 1


@pytest.mark.parametrize("classes", [2, 30])
def test_plots(rng, classes, tmp_path):
    pytest.importorskip("matplotlib")
    logits, labels = draw(rng, classes=classes)
    found = diagnostics.report(logits, labels)
    figure = found.plot()
    reliability, histogram, by_class = figure.axes
    share = [bar.get_height() for bar in reliability.patches]
    assert sum(share) == pytest.approx(1)
    heights = sum(bar.get_height() for bar in histogram.patches)
    assert heights == pytest.approx(len(labels))
    assert len(by_class.patches) == min(classes, 20)
    assert by_class.patches[0].get_width() == max(c.loss for c in found.per_class)
    figure.savefig(tmp_path / "report.png")


@pytest.mark.parametrize("losses", [(0.3, 0.45), (0.05, 0.2), (0.3, 3.6), (0.03, 9), (1e-3, 3), (1e-9, 10)])
def test_the_ticks_of_losses_can_be_read(losses):
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    p = np.exp(-np.geomspace(*losses, 50))
    found = diagnostics.report(np.log(np.stack([p, 1 - p], -1)), np.zeros(50, int))
    figure = found.plot()
    agg.FigureCanvasAgg(figure).draw()
    axis, (low, high) = figure.axes[1].xaxis, figure.axes[1].get_xlim()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    shown = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes)), [label.get_text() for label in shown]


def test_no_legend_covers_what_it_explains():
    """Whatever the model: here it is right nine times in ten, and less sure than that, from guessing up."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    sure = np.repeat(np.linspace(0.11, 0.99, 30), 10)[:, None]
    logits = np.log(np.concatenate([sure, np.repeat((1 - sure) / 9, 9, axis=1)], -1))
    found = diagnostics.report(logits, np.tile(np.arange(10) == 0, 30).astype(int))
    figure = found.plot()
    agg.FigureCanvasAgg(figure).draw()
    reliability, histogram, _ = figure.axes
    covered = reliability.get_legend().get_window_extent()
    points = reliability.lines[-1].get_xydata()
    assert len(points) > 10
    assert not any(covered.contains(*point) for point in reliability.transData.transform(points))
    covered = histogram.get_legend().get_window_extent()
    assert not any(covered.overlaps(bar.get_window_extent()) for bar in histogram.patches)


def test_plots_what_is_not_finite(tmp_path):
    pytest.importorskip("matplotlib")
    for bad in (jnp.nan, -jnp.inf):
        found = diagnostics.report(jnp.array([[bad, 0.0], [1.0, 0.0]]), jnp.array([0, 0]))
        found.plot().savefig(tmp_path / "report.png")


def test_plots_small_weights_and_names_with_dollars(tmp_path):
    pytest.importorskip("matplotlib")
    found = diagnostics.report(jnp.eye(2), jnp.array([0, 1]), weights=1e-6, class_names=["$$", "$x_{"])
    figure = found.plot()
    figure.savefig(tmp_path / "report.png")
    histogram = figure.axes[1]
    assert max(bar.get_height() for bar in histogram.patches) > 0.5 * histogram.get_ylim()[1]


def test_without_matplotlib_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = diagnostics.report(jnp.eye(3), jnp.array([0, 1, 2]))
    with pytest.raises(ImportError, match=r"jaxce\[plot\]"):
        found.plot()


def test_is_exposed():
    assert jaxce.diagnostics is diagnostics
    assert all(hasattr(diagnostics, name) for name in diagnostics.__all__)
