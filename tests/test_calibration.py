"""Calibration and intervals: against the textbook, against scikit-learn, torchmetrics and statsmodels, and themselves."""

import json
import math
from statistics import NormalDist

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close

from rlhf.calibration import (
    brier_score,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
    wilson_interval,
)
from rlhf.reward.finish import FEWEST_PAIRS, temperature_or_one


def pairs(seed, n=50, temperature=2.0, dtype=torch.float64):
    """Margins, and labels that follow sigmoid(margin / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    margins = 3 * torch.randn(n, generator=generator, dtype=torch.float64)
    labels = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(margins / temperature)
    return margins.to(dtype), labels.to(dtype)


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 5, 10, 15]), st.sampled_from([torch.float64, torch.float32]))
def test_bins_and_calibration_error(seed, bins, dtype):
    margins, labels = pairs(seed, dtype=dtype)
    probs = margins.sigmoid()
    ours = reliability_bins(probs, labels, bins)
    expected = reference.reliability_bins(probs.tolist(), labels.tolist(), bins)
    count, predicted, observed = zip(*expected)
    assert ours.count.tolist() == list(count)
    close(ours.predicted, list(predicted))
    close(ours.observed, list(observed))
    for norm in ("l1", "l2", "max"):
        expected = reference.calibration_error(probs.tolist(), labels.tolist(), bins, norm)
        close(expected_calibration_error(probs, labels, bins, norm), expected)
    close(brier_score(probs, labels), reference.mean([(p - y) ** 2 for p, y in zip(probs.tolist(), labels.tolist())]))


@given(st.integers(0, 2**31))
def test_a_weight_is_a_repetition(seed):
    margins, labels = pairs(seed, n=20)
    weights = torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(seed)) + (torch.arange(20) == 0)
    probs, repeated = margins.sigmoid(), torch.arange(20).repeat_interleave(weights)
    weighted = reliability_bins(probs, labels, 5, weights)
    for ours, plain in zip(weighted, reliability_bins(probs[repeated], labels[repeated], 5)):
        close(ours, plain.tolist())
    for measure in (expected_calibration_error, brier_score):
        close(measure(probs, labels, weights=weights), measure(probs[repeated], labels[repeated]).item())


def test_edges_belong_to_the_bin_above_and_1_to_the_last():
    probs = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert reliability_bins(probs, torch.ones(5), 4).count.tolist() == [1, 1, 1, 2]


@settings(max_examples=30)
@given(st.integers(0, 2**31))
def test_fit_temperature(seed):
    margins, labels = pairs(seed)
    try:
        temperature = fit_temperature(margins, labels)
    except ValueError:  # a sample of 50 in which the margins say nothing
        assert ((margins * (labels - 0.5)).sum() <= 0) or ((margins > 0) == labels.bool()).all()
        return
    expected = reference.best_temperature(margins.tolist(), labels.tolist())
    assert temperature == pytest.approx(expected, rel=1e-6) or expected > 900  # the search ends at 1000
    # the slope of the loss is zero there, much more exactly than a search over values can see
    slope = (margins * (torch.sigmoid(margins / temperature) - labels)).mean().item()
    assert abs(slope) < 1e-12
    assert fit_temperature(4 * margins, labels) == pytest.approx(4 * temperature, rel=1e-12)


def test_a_known_temperature_is_found_and_calibrates():
    margins, labels = pairs(0, n=200_000, temperature=2.5)
    temperature = fit_temperature(margins, labels)
    assert temperature == pytest.approx(2.5, rel=0.02)
    assert expected_calibration_error(margins.sigmoid(), labels) > 0.05
    errors = []
    for n in (200, 2_000, 20_000, 200_000):  # a calibrated model's error is sampling noise, and goes with it
        probs = (margins[:n] / temperature).sigmoid()
        errors.append(expected_calibration_error(probs, labels[:n]).item())
    assert errors[-1] < 0.005 < 0.02 < errors[0] and errors == sorted(errors, reverse=True)


def test_temperature_of_soft_labels():
    margins = torch.tensor([-3.0, -0.5, 1.0, 4.0], dtype=torch.float64)
    assert fit_temperature(margins, torch.sigmoid(margins / 1.7)) == pytest.approx(1.7, rel=1e-9)


def test_temperature_that_does_not_exist():
    margins = torch.tensor([1.0, 2.0, -1.0])
    with pytest.raises(ValueError, match="rank every pair right"):
        fit_temperature(margins, torch.tensor([1, 1, 0]))
    with pytest.raises(ValueError, match="no better|not predict"):
        fit_temperature(margins, torch.tensor([0, 0, 1]))


def test_what_is_no_probability():
    with pytest.raises(ValueError, match=r"give sigmoid\(margin\)"):
        reliability_bins(torch.tensor([0.5, 1.5]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="must lie in"):
        brier_score(torch.tensor([math.nan]), torch.tensor([1]))
    with pytest.raises(ValueError, match="probabilities against"):
        brier_score(torch.rand(3), torch.ones(3, 1))
    with pytest.raises(ValueError, match="unknown norm 'l3'"):
        expected_calibration_error(torch.rand(3), torch.ones(3), norm="l3")


# ---- intervals -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))), st.floats(0.5, 0.99))
def test_wilson_interval(record, confidence):
    wins, n = record[0] / 2, record[1]  # ties are half a win
    low, high = wilson_interval(wins, n, confidence)
    expected = reference.wilson_interval(wins, n, NormalDist().inv_cdf((1 + confidence) / 2))
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert 0 <= low <= wins / n + 1e-12 and wins / n - 1e-12 <= high <= 1
    assert wilson_interval(n - wins, n, confidence) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_a_win_rate_of_nothing():
    for wins, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="a win rate needs"):
            wilson_interval(wins, n)


# ---- numbers of other libraries ------------------------------------------------------------------------------------


def test_against_torchmetrics_and_scikit_learn(golden_dir):
    golden = json.loads((golden_dir / "calibration.json").read_text())
    inputs, outputs = golden["inputs"], golden["outputs"]
    margins = torch.tensor(inputs["margin(r_a - r_b)"], dtype=torch.float64)
    labels = torch.tensor(inputs["label(a preferred)"])
    probs = margins.sigmoid()
    close(probs, inputs["prob=sigmoid(margin)"])

    for bins in (5, 10, 15):  # torchmetrics works in float32
        for norm in ("l1", "l2", "max"):
            expected = outputs[f"torchmetrics binary_calibration_error(n_bins={bins},norm={norm})"]
            assert expected_calibration_error(probs, labels, bins, norm).item() == pytest.approx(expected, abs=1e-6)
    # folded: confidence in the more probable side, right or wrong
    confidence, right = probs.maximum(1 - probs), (probs > 0.5) == labels.bool()
    expected = outputs["torchmetrics ECE on confidence=max(p,1-p) vs correct (n_bins=10,l1)"]
    assert expected_calibration_error(confidence, right).item() == pytest.approx(expected, abs=1e-6)

    curve = outputs["sklearn calibration_curve(uniform,5)"]  # its bins are (low, high]: no probability lies on an edge
    ours = reliability_bins(probs, labels, 5)
    close(ours.observed, curve["prob_true"])
    close(ours.predicted, curve["prob_pred"])
    close(brier_score(probs, labels), outputs["sklearn brier_score_loss"])

    fit = outputs["temperature via sklearn LogisticRegression(no intercept, no penalty) on the margin: T = 1/coef"]
    temperature = fit_temperature(margins, labels)
    assert temperature == pytest.approx(fit["T"], rel=1e-8)  # sklearn's solver stops there
    assert reference.cross_entropy(margins.tolist(), labels.tolist(), temperature) == pytest.approx(fit["nll_after"])
    after = expected_calibration_error((margins / temperature).sigmoid(), labels)
    assert after.item() == pytest.approx(fit["ece10_after"], abs=1e-6)


def test_against_statsmodels(golden_dir):
    golden = json.loads((golden_dir / "winrate_intervals.json").read_text())
    for record, intervals in golden["outputs"].items():
        wins, n = map(int, record.split("/"))
        assert wilson_interval(wins, n) == pytest.approx(intervals["wilson"], abs=1e-12)


def test_too_few_pairs_fit_no_temperature():
    """Below the floor it is 1, with a reason that names both numbers; from there on it is the fitted one."""
    margins = torch.randn(FEWEST_PAIRS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    few, problem = temperature_or_one(margins, FEWEST_PAIRS - 1)
    assert few == 1 and f"{FEWEST_PAIRS - 1} of them independent" in problem and f"at least {FEWEST_PAIRS}" in problem
    assert temperature_or_one(margins, FEWEST_PAIRS) == (fit_temperature(margins, torch.ones_like(margins)), None)
    perfect, problem = temperature_or_one(margins.abs(), FEWEST_PAIRS)
    assert perfect == 1 and "rank every pair right" in problem


@pytest.mark.parametrize(
    ("pairs", "truth", "least", "most"),
    [
        (FEWEST_PAIRS, 2.0, 0.02, 0.06),
        (FEWEST_PAIRS, 0.5, 0.02, 0.06),
        (FEWEST_PAIRS, 1.0, -0.02, 0),
        (16, 1.0, -0.2, -0.03),
    ],
)
def test_as_many_pairs_as_a_temperature_needs(pairs, truth, least, most):
    """What fitting on so many gains over 1, in nats of other pairs: much where 1 is wrong, hardly a loss where it is right."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        margins = 1.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        return margins, (torch.rand(n, generator=generator) < torch.sigmoid(margins / truth)).double()

    def cost(margins, labels, temperature: float) -> float:
        return float(torch.nn.functional.binary_cross_entropy_with_logits(margins / temperature, labels))

    others, gains = draw(20_000), []
    for _ in range(150):
        margins, labels = draw(pairs)
        signed = margins * (2 * labels - 1)  # what train_rm.py has: the better answer's side
        gains.append(cost(*others, 1.0) - cost(*others, temperature_or_one(signed, FEWEST_PAIRS)[0]))
    assert least < sum(gains) / len(gains) < most
