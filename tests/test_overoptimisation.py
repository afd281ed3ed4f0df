"""Over-optimisation: the curves against numpy's solver and a grid, the stop against a slow count, the study end to end."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bad_input import refused
from test_resume import assert_equal_runs, killed_after
from test_scripts import NOISE, PPO_METRICS
from tiny import lines

from evaluation import overoptimisation
from rlhf.infra import checkpoint
from rlhf.lm.pretrained import open_pretrained
from rlhf.overoptimisation import CURVES, best_place, has_stalled, resampled_means
from rlhf.statistics import best_of_n_kl, paired_bootstrap

RNG = np.random.default_rng
NUMBERS = st.floats(-3, 3)
DISTANCES = st.lists(st.floats(0.1, 6), min_size=2, max_size=12, unique_by=lambda d: round(d, 2))


def textbook(name: str, d: float, alpha: float, beta: float) -> float:
    """The two formulas of the paper, as they are printed there."""
    if d == 0:
        return 0.0
    return {"best_of_n": d * (alpha - beta * d), "ppo": d * (alpha - beta * math.log(d))}[name]


# ---- the fit


@pytest.mark.parametrize("name", CURVES)
@given(DISTANCES, NUMBERS, NUMBERS)
def test_the_fit_recovers_the_curve_that_made_the_points(name, d, alpha, beta):
    d = np.array([0.0, *d])
    gain = np.array([textbook(name, x, alpha, beta) for x in d])
    np.testing.assert_allclose(CURVES[name].gain(d, alpha, beta), gain, atol=1e-12)
    np.testing.assert_allclose(CURVES[name].fit(d, gain), (alpha, beta), atol=1e-5)


@pytest.mark.parametrize("name", CURVES)
@given(st.integers(2, 9), st.integers(0, 2**20))
def test_the_fit_is_the_least_squares_solution(name, points, seed):
    """Of noisy points, against numpy.linalg.lstsq; in any order, many fits at once, and in any unit of the reward."""
    rng, curve = RNG(seed), CURVES[name]
    d, gain = np.linspace(0.2, 4, points) * rng.uniform(0.9, 1.1, points), rng.normal(size=(3, points))
    design = np.array([[x, textbook(name, x, 0, 1)] for x in d])
    expected = np.linalg.lstsq(design, gain.T, rcond=None)[0]  # (2, 3)
    np.testing.assert_allclose(curve.fit(d, gain), expected, rtol=1e-6, atol=1e-8)
    order = rng.permutation(points)
    np.testing.assert_allclose(curve.fit(d[order], gain[:, order]), expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(curve.fit(d, 7 * gain), 7 * expected, rtol=1e-6, atol=1e-7)
    with_base = np.append(d, 0.0), np.append(gain, np.zeros((3, 1)), 1)
    np.testing.assert_allclose(curve.fit(*with_base), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CURVES)
@given(st.floats(0.05, 3), st.floats(0.2, 3))
def test_the_peak_is_where_a_grid_finds_it(name, alpha, beta):
    curve = CURVES[name]
    peak = float(curve.peak_of(np.array(alpha), np.array(beta)))
    grid = np.linspace(0, 2 * peak, 20_001)
    assert grid[curve.gain(grid, alpha, beta).argmax()] == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize("name", CURVES)
@given(st.floats(0.01, 6), NUMBERS)
def test_one_distance_fits_no_curve(name, d, gain):
    """Not even by rounding; the other fits of the same call are what they are alone."""
    d, gain = np.array([[0, d, d], [0, 0, d], [0, d, d + 1]]), np.array([0, gain, gain + 1])
    together, alone = CURVES[name].fit(d, gain), CURVES[name].fit(d[2], gain)
    assert np.isnan([x[:2] for x in together]).all() and [float(x[2]) for x in together] == [float(x) for x in alone]


def test_a_run_that_has_not_learned_is_reported_without_a_curve(tmp_path):
    """Two checkpoints, one of which has no KL; the rest of the study is not lost."""
    rng = RNG(0)
    points = [{"curve": c, "name": c, "kl": np.full(9, kl), "gold_gain": rng.normal(size=9)}
              for c, kl in (("ppo", 0.0), ("ppo", 0.3), ("best_of_n", 0.2), ("best_of_n", 0.6))]  # fmt: skip
    fits = {name: overoptimisation.fit(name, [x for x in points if x["curve"] == name]) for name in CURVES}
    assert fits["ppo"] is None and fits["best_of_n"]["alpha"]["low"] < fits["best_of_n"]["alpha"]["high"]
    *_, (name, said, *_) = overoptimisation.fits_table(fits).rows
    assert name == "PPO: d (alpha - beta log d)" and said.startswith("fewer than two different KL")
    pytest.importorskip("matplotlib")
    rows = [overoptimisation.point(x | {"proxy_gain": x["gold_gain"]}) for x in points]
    overoptimisation.draw({"rows": rows, "fits": fits}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_that_never_falls_has_no_peak(name):
    assert CURVES[name].peak_of(np.array([1.0, 1.0]), np.array([0.0, -0.5])).tolist() == [math.inf, math.inf]


def test_a_curve_that_falls_from_the_start_has_its_peak_there():
    assert CURVES["best_of_n"].peak_of(np.array(-1.0), np.array(0.5)) == 0


def test_resampled_means_are_the_bootstrap():
    """Their quantiles against rlhf.statistics's loop; equal rows stay equal; a constant has no spread."""
    x = RNG(0).normal(0.3, 2.0, size=(2, 300))
    means = resampled_means(np.stack([x[0], x[1], x[0], np.full(300, 0.25)]), 4000)
    assert means.shape == (4000, 4)
    np.testing.assert_array_equal(means[:, 0], means[:, 2])
    np.testing.assert_allclose(means[:, 3], 0.25)
    for k in range(2):
        low, high = paired_bootstrap(x[k], resamples=4000)
        np.testing.assert_allclose(np.quantile(means[:, k], [0.025, 0.975]), (low, high), atol=0.05 * (high - low))


# ---- when to stop


def stops_after(scores: list[float], patience: int) -> int | None:
    """How many judgements a run sees that counts, one at a time, how long ago its best was."""
    best, since = -math.inf, 0
    for seen, score in enumerate(scores, 1):
        best, since = (score, 0) if score > best else (best, since + 1)
        if since >= patience:
            return seen
    return None


@given(st.lists(st.integers(-3, 3).map(float), max_size=12), st.integers(1, 5))
def test_the_stop_against_a_slow_count(scores, patience):
    stopped = [n for n in range(len(scores) + 1) if has_stalled(scores[:n], patience)]
    assert (stopped[0] if stopped else None) == stops_after(scores, patience)


@given(st.lists(st.integers(-3, 3), min_size=1))
def test_the_best_is_the_first_of_the_largest(scores):
    place = best_place(scores)
    assert all(scores[place] > x for x in scores[:place]) and all(scores[place] >= x for x in scores[place:])


# ---- the early stop of train_ppo.py

JUDGED = {
    "judge": "rewards.py:shorter", "judge_every": 1, "judge_patience": 2, "judge_prompts": 8, "sources": "",
    "prompt_tokens": 8, "checkpoint_every": 10,
}  # fmt: skip
LONGER = "def longer(prompts, responses):\n    return [len(response) for response in responses]\n"


def test_the_judge_ends_the_run_and_the_best_policy_stays(world, tmp_path):
    """PPO learns to write more, the judge wants less."""
    (tmp_path / "longer.py").write_text(LONGER)
    options = JUDGED | {"reward": f"{tmp_path}/longer.py:longer", "lr": 0.01, "kl_coef": 0, "iterations": 30}
    run = tmp_path / "ppo"
    out = world.ok("train_ppo.py", out=run, **options)
    rows = lines(run / "metrics.jsonl")
    means = [row["judge/mean"] for row in rows]
    assert all(row.keys() == PPO_METRICS | {"judge/mean"} for row in rows)
    assert len(means) == stops_after(means, 2) < 30
    report = json.loads((run / "report.json").read_text())
    assert report["stopped"] and report["iterations"] == len(means)
    assert report["best"] == {"iterations": means.index(max(means)) + 1, "judge/mean": max(means)}
    assert checkpoint.load(run / "best").state == {"done": report["best"]["iterations"], "judge/mean": max(means)}
    assert f"stopped after {len(means)} iterations" in out and f"{run}/best" in out
    assert open_pretrained(run / "best").model.config == open_pretrained(world.path / "lm").model.config
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "report.json"}
    world.ok("train_ppo.py", out=run, **options)  # the same command again: nothing left to do
    assert {file: file.read_bytes() for file in before} == before


def test_a_judge_changes_nothing_but_when_the_run_ends(world, tmp_path):
    """vader, every second iteration, never to stop: all other numbers are those of a run without a judge."""
    world.ok("train_ppo.py", out=tmp_path / "without")
    world.ok("train_ppo.py", out=tmp_path / "with", judge="data", judge_every=2, judge_patience=9, judge_prompts=1)
    without, judged = lines(tmp_path / "without/metrics.jsonl"), lines(tmp_path / "with/metrics.jsonl")
    assert ["judge/mean" in row for row in judged] == [False, True, False, True]
    for a, b in zip(without, judged, strict=True):
        assert {name: b[name] for name in a if not name.startswith(NOISE)} == {
            name: x for name, x in a.items() if not name.startswith(NOISE)
        }


@pytest.mark.slow
def test_one_process_and_two_stop_at_the_same_judgement(world, tmp_path):
    """And a run that was killed is the undisturbed one, bit for bit, its best checkpoint as well."""
    (tmp_path / "longer.py").write_text(LONGER)
    options = JUDGED | {"reward": f"{tmp_path}/longer.py:longer", "lr": 0.01, "kl_coef": 0, "iterations": 30}
    options |= {"judge_patience": 8, "checkpoint_every": 2, "judge_prompts": 7}  # 7: no multiple of two processes
    world.ok("train_ppo.py", out=tmp_path / "one", **options)
    done = world.together(world.command("train_ppo.py", out=tmp_path / "two", **options), 2)
    assert done.code == 0, done.err
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) and [row["judge/mean"] for row in one] == [row["judge/mean"] for row in two]
    for attempt in range(5):
        run = tmp_path / f"killed{attempt}"
        command = world.command("train_ppo.py", out=run, **options)
        if killed_after(world, run, 4, command) and checkpoint.latest(run):
            break
    else:
        pytest.fail("could not kill a run in the middle in five attempts")
    world.ok("train_ppo.py", out=run, **options)
    assert_equal_runs(run, tmp_path / "one")
    best = [checkpoint.load(directory / "best") for directory in (run, tmp_path / "one")]
    assert best[0].state == best[1].state
    assert all((x == best[1].tensors[name]).all() for name, x in best[0].tensors.items())


def test_keeping_all_checkpoints(world, tmp_path):
    world.ok("train_ppo.py", out=tmp_path, checkpoint_every=1, keep_checkpoints="none")
    assert [path.name for path in checkpoint.steps(tmp_path)] == [f"step_{n:06d}" for n in range(1, 5)]


# ---- evaluate.py overoptimisation


@pytest.fixture(scope="module")
def study(world, tmp_path_factory):
    """PPO learns to write less, and keeps its checkpoints; the reward model of the world says what that was worth."""
    path = tmp_path_factory.mktemp("study")
    options = {"reward": "rewards.py:shorter", "sources": "", "prompt_tokens": 8, "lr": 0.01, "kl_coef": 0.01}
    world.ok("train_ppo.py", out=path / "ppo", checkpoint_every=1, keep_checkpoints="none", **options)
    return path


def measure(world, study, *options: str):
    given = dict(word.split("=", 1) for word in options)
    defaults = {"run": study / "ppo", "base": "lm", "proxy": "rewards.py:shorter", "gold": "rm", "data": "data"}
    defaults |= {"out": study / "out", "best_of": 8, "prompts": 5, "precision": "fp32"}
    words = [f"--{name}={value}" for name, value in (defaults | given).items()]
    return world.start(["evaluate.py", "overoptimisation", *words]).wait()


def test_the_study(world, study):
    done = measure(world, study)
    assert (done.code, done.err) == (0, ""), done
    result = json.loads((study / "out/overoptimisation.json").read_text())
    assert (study / "out/overoptimisation.md").read_text().strip() in done.out
    rows = {row["name"]: row for row in result["rows"]}
    names = ["base", "best of 2", "best of 4", "best of 8", *(f"PPO, {n} iterations" for n in range(1, 5))]
    assert list(rows) == names and result["prompts"] == 5
    base, chosen, tuned = result["rows"][0], result["rows"][1:4], result["rows"][4:]
    assert base["d"] == base["kl"]["value"] == 0
    proxies = [row["proxy"]["value"] for row in (base, *chosen)]
    assert proxies == sorted(proxies)  # more to choose from can only please the proxy
    for row in chosen:
        assert row["proxy_gain"]["value"] == pytest.approx(row["proxy"]["value"] - base["proxy"]["value"])
        assert row["d"] == pytest.approx(math.sqrt(best_of_n_kl(int(row["name"].split()[-1]))))
    assert tuned[-1]["kl"]["value"] > tuned[0]["kl"]["value"] and tuned[-1]["proxy_gain"]["value"] > 0
    for row in tuned:
        assert row["d"] == pytest.approx(math.sqrt(max(row["kl"]["value"], 0)))
        assert all(row[k]["low"] <= row[k]["value"] <= row[k]["high"] for k in ("kl", "proxy", "gold", "gold_gain"))
    for name, points in (("best_of_n", chosen), ("ppo", tuned)):
        d = np.array([row["d"] for row in points])
        design = np.array([[x, textbook(name, x, 0, 1)] for x in d])
        gains = np.array([row["gold_gain"]["value"] for row in points])
        expected, *_ = np.linalg.lstsq(design, gains, rcond=None)
        fitted = result["fits"][name]
        assert [fitted["alpha"]["value"], fitted["beta"]["value"]] == pytest.approx(expected.tolist(), rel=1e-5)
        assert fitted["rms_error"] == pytest.approx(np.sqrt(np.mean((design @ expected - gains) ** 2)), rel=1e-5)


@pytest.mark.slow
def test_the_gold_reward_may_be_the_proxy(world, study):
    """Then they agree everywhere, and nothing is over-optimised."""
    done = measure(world, study, "gold=rewards.py:shorter", f"out={study}/same")
    assert (done.code, done.err) == (0, ""), done
    for row in json.loads((study / "same/overoptimisation.json").read_text())["rows"]:
        assert row["proxy"] == row["gold"] and row.get("proxy_gain") == row.get("gold_gain")


@pytest.mark.parametrize(
    "option, words",
    [
        ("proxy=rm", ("--proxy=rm has sha256", "was trained with")),
        ("run=lm", ("lm/run.json", "PPO run")),
        ("run=nowhere", ("nowhere/run.json", "PPO run")),
        ("gold=poems", ("poems", "data")),
        ("best_of=3", ("--best_of=3", "at least 4")),
    ],
)
def test_what_the_study_refuses(world, study, option, words):
    refused(measure(world, study, option, f"out={study}/none"), *words)
    assert not (study / "none").exists()


def test_a_curve_needs_two_checkpoints(world, study, tmp_path):
    shutil.copytree(study / "ppo", tmp_path / "ppo")
    for path in checkpoint.steps(tmp_path / "ppo")[1:]:
        shutil.rmtree(path)
    refused(measure(world, study, f"run={tmp_path}/ppo"), "1 checkpoint", "--keep_checkpoints=none")
