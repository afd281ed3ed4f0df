"""evaluate.py compare: the band of several seeds, by its properties, by the command, and with runs that are broken."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import lines

from evaluation import band, plots
from rlhf.infra import config

RNG = np.random.default_rng
NAMES = band.CURVES


def rows(seed: int, iterations: int = 24, spread: float = 0.1, **more) -> list[dict]:
    """The metrics of a run whose curves rise, with noise of its seed that stays for some iterations."""
    rng = RNG(seed)
    noise = spread * (rng.normal(size=(len(NAMES), iterations)) + rng.normal(size=(len(NAMES), 1)))
    curves = 3 + np.tanh(np.arange(iterations) / 8) + noise
    return [
        {"step": i, "iteration": i, **dict(zip(NAMES, map(float, curves[:, i]))), **more} for i in range(iterations)
    ]


def summary(seed: int, shift: float = 0.0) -> dict:
    x = float(0.4 + shift + 0.02 * RNG(seed).normal())
    numbers = {"judge_gain": {"mean": x, "low": x - 0.1, "high": x + 0.1}, "kl": 10 * x, "distinct3_after": 0.96}
    return {"ppo": numbers, "rows": {}, "prompts": 8}


DEFAULTS = {"kl_coef": 0.1, "lr": 3e-4, "sources": ["film"], "seed": 1, "precision": "bf16"}


def lay_out(path: Path, metrics: list[dict], evaluated: dict | None = None, **options) -> Path:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(DEFAULTS | options))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if evaluated:
        (path / "summary.json").write_text(json.dumps(evaluated))
    return path


@pytest.fixture
def seeds(tmp_path) -> Path:
    for seed in range(5):
        lay_out(tmp_path / f"results/demo/seed_{seed}", rows(seed), summary(seed))
    return tmp_path / "results/demo"


def curves(values: np.ndarray) -> list[dict[int, float]]:
    return [dict(enumerate(map(float, x))) for x in values]


RUNS = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.floats(-1e6, 1e6), min_size=9, max_size=9), min_size=n, max_size=n)
)


@settings(max_examples=50)
@given(RUNS, st.integers(0, 2**20))
def test_a_seed_of_the_band_is_inside_and_one_far_away_is_not(values, seed):
    """Whatever the seeds did; in any order of theirs; in any unit."""
    values = np.array(values)
    size = max(1.0, float(np.abs(values).max()))
    for run in curves(values):
        assert not band.curve("x", run, curves(values), 8).outside.any()
    found = band.curve("x", curves(values)[0], curves(values), 8)
    shuffled = RNG(seed).permutation(values)
    again = band.curve("x", curves(values)[0], curves(1000 * shuffled), 8)
    np.testing.assert_allclose(again.high, 1000 * found.high, rtol=1e-9, atol=1e-6 * size)
    width = float((found.high - found.low).max()) + size
    for shift in (-2 * width, 2 * width):
        assert band.curve("x", curves(values + shift)[0], curves(values), 8).outside.all()


def test_a_healthy_seed_leaves_the_band_as_often_as_it_says():
    """150 new seeds beside five others each: 5% may be outside somewhere, in any of the curves or of the evaluation."""
    outside = 0
    for trial in range(150):
        runs = [band.by_metric(rows(1000 * trial + i)) for i in range(6)]
        found = [band.curve(name, runs[0][name], [x[name] for x in runs[1:]], len(NAMES)) for name in NAMES]
        evaluated = [summary(1000 * trial + i) for i in range(6)]
        found += band.numbers(evaluated[0], evaluated[1:])[0]
        outside += any(row.outside.any() for row in found)
    assert outside <= 15  # 7.5 expected at most; 15 or more have a chance of .008


def test_seeds_that_agree_by_chance_are_not_believed_beyond_their_own_intervals():
    """Four evaluations say 1.00 to 1.02 nats, each +- 0.2: another's 1.3 is as good as they are, 3 is not."""

    def evaluated(kl: float, half: float) -> dict:
        return {
            "ppo": {"kl": kl},
            "rows": {"base": {}, "tuned": {"kl_interval": [kl - half, kl + half]}, "best of 4": {}},
        }

    for half, inside in ((0.2, True), (0.001, False)):
        seeds = [evaluated(1 + 0.005 * i, half) for i in range(4)]
        (near,), (far,) = (band.numbers(evaluated(kl, half), seeds)[0] for kl in (1.3, 3.0))
        assert (not near.outside.any()) == inside and far.outside.all()


def test_few_seeds_make_a_wide_band_and_many_a_narrow_one():
    runs = [band.by_metric(rows(i))["objective/kl"] for i in range(40)]
    widths = [float((x.high - x.low).mean()) for n in (2, 5, 40) for x in [band.curve("x", runs[0], runs[:n], 8)]]
    assert widths == sorted(widths, reverse=True)


def test_a_run_that_ended_early_is_met_with_the_same_iterations():
    runs = [band.by_metric(rows(i))["objective/kl"] for i in range(6)]
    short = {step: x for step, x in runs[5].items() if step < 7}
    found = band.curve("x", short, runs[:5], 8)
    assert found.blocks == [(0, 2), (3, 5), (6, 6)] and not found.outside.any()
    np.testing.assert_allclose(found.seeds[:, 2], [x[6] for x in runs[:5]])
    assert band.curve("x", short | {4: math.nan}, runs[:5], 8).outside.tolist() == [False, True, False]


def test_a_policy_that_max_kl_took_back_is_not_compared(tmp_path):
    """Its row has no numbers of learning: they would lie outside every band."""
    taken_back = {**rows(1)[-1], "step": 24, "policy/approxkl": None}
    run = lay_out(tmp_path / "run", [*rows(1), taken_back])
    assert band.run_of(str(run))[0].files["metrics.jsonl"][-1] == taken_back
    (run / "report.json").write_text(json.dumps({"brake": {"name": "max_kl", "iteration": 24, "restored": 23}}))
    assert band.run_of(str(run))[0].files["metrics.jsonl"] == rows(1)


@pytest.mark.filterwarnings("error")
def test_a_first_iteration_is_drawn_though_its_kl_is_0_everywhere():
    pyplot, zero = pytest.importorskip("matplotlib.pyplot"), np.zeros(1)
    figure, ax = pyplot.subplots()
    plots.band(zero, zero, np.zeros((5, 1)), zero, zero, "objective/kl")(ax)
    bottom, top = ax.get_ylim()
    pyplot.close(figure)
    assert bottom < 0 < top


def test_what_is_missing_is_said_and_never_nan(tmp_path, seeds, monkeypatch, capsys):
    """One seed of five null, short, apart or without a number; a run of one iteration; a run below a run of its own name."""
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "run", rows(99), summary(99))
    kl = "objective/kl"

    def told(run: str, metrics: list[dict], evaluated: dict | None) -> tuple[int, str]:
        (seeds / "seed_4/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        (seeds / "seed_4/summary.json").write_text(json.dumps(evaluated or {"other": 1}))
        code, said = command(monkeypatch, capsys, run, "results/demo", "--plots=false")
        assert "nan" not in said.replace("--plots", "")
        return code, said

    whole, good = rows(4), summary(4)
    code, said = told("run", [row | {kl: None} for row in whole], good)
    assert (
        code == 0
        and f"Not compared, the run and the reference runs have no iteration in common with a number for {kl}" in said
    )
    code, said = told("run", [row | {kl: None} if row["step"] > 5 else row for row in whole], good)
    assert f"{kl} is compared in 6 of 24 iterations" in said
    code, said = told(
        "run", [{name: x for name, x in row.items() if name != "value/explained_var"} for row in whole], good
    )
    assert code == 0 and "Not compared, not every reference run has value/explained_var." in said
    code, said = told("run", whole[:5], good)
    assert code == 0 and "This run has 24 iterations, theirs 5 to 24: 5 are compared." in said
    code, said = told("run", [row | {"step": row["step"] + 500} for row in whole], good)  # the evaluation is left
    assert code == 0 and "Inside the band of 5 seeds of results/demo: 3 numbers of the evaluation." in said
    null = json.loads(json.dumps(good))
    null["ppo"]["judge_gain"]["mean"] = None
    code, said = told("run", whole, null)
    assert code == 0 and "The band of gain of the judge is of 4 of the 5 seeds" in said
    code, said = told("run", whole, None)
    assert code == 0 and "The band of distinct-3 is of 4 of the 5 seeds" in said

    lay_out(tmp_path / "ended", rows(99)[:1], summary(99))
    code, said = told("ended", whole, good)
    assert code == 0 and "Inside the band of 5 seeds of results/demo so far, 1 of 24 iterations: 8 curves" in said
    lay_out(tmp_path / "ppo", rows(99), summary(99))
    lay_out(tmp_path / "ppo/ppo", rows(98, spread=99))
    code, said = told("ppo", whole, good)
    assert code == 0 and "3 numbers of the evaluation" in said  # of the run that was named
    assert len([*band.runs_of("ppo", "reference")]) == 2


CELLS = st.one_of(st.none(), st.floats(-1e6, 1e6))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.lists(CELLS, max_size=6)), min_size=3, max_size=5),
    st.lists(st.fixed_dictionaries({}, optional={"kl": CELLS, "distinct3_after": CELLS}), min_size=3, max_size=5),
)
def test_no_band_is_nan_whatever_is_missing(runs, evaluated):
    ours, *seeds = ({start + i: math.nan if x is None else x for i, x in enumerate(cells)} for start, cells in runs)
    met = {*band.shared(seeds)} & {*ours}
    found = band.curve("x", ours, seeds, 8)
    assert (found is None) == (not met)
    numbers, notes = band.numbers(*(lambda first, *rest: (first, rest))(*({"ppo": x} for x in evaluated)))
    assert len(numbers) + len(notes) == len({name for x in evaluated for name in x})
    for row in [found] * bool(met) + numbers:
        assert np.isfinite([row.low, row.high]).all() and (row.low <= row.high).all() and len(row.seeds) > 1


def command(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit) as end:
        config.run(band.main)
    said = capsys.readouterr()
    assert said.err.count("\n") == (end.value.code == 2), said.err
    return end.value.code, said.out + said.err


def test_the_command(tmp_path, seeds, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "out/demo/ppo", rows(99))  # the evaluation lies above, as make demo leaves it
    (tmp_path / "out/demo/summary.json").write_text(json.dumps(summary(99)))
    code, said = command(monkeypatch, capsys, "out/demo", "results/demo", "--plots=false")
    assert code == 0
    assert (
        "Inside the band of 5 seeds of results/demo: 8 curves to iteration 23 and 3 numbers of the evaluation." in said
    )
    assert "Other options" not in said and "is not compared" not in said
    page = (tmp_path / "out/demo/compare.html").read_text()
    assert "Inside the band" in page and "distinct-3" in (tmp_path / "out/demo/compare.md").read_text()

    late = [row | {"objective/kl": row["objective/kl"] + 9 * (i >= 12)} for i, row in enumerate(rows(99))]
    lay_out(tmp_path / "out/late", late, summary(98, shift=-0.4), lr=0.03, sources=[])
    code, said = command(monkeypatch, capsys, "--run=out/late", "results/demo", "--plots=false")
    assert code == 1 and "Outside the band of 5 seeds of results/demo in 3 of 11:" in said
    assert "  objective/kl in iterations 12 to 23: " in said and "  gain of the judge in the evaluation: " in said
    assert "Other options than theirs: --lr=0.03 (0.0003), --sources= (film)." in said

    for seed in range(5, 8):  # of another precision, which another curve is usual for
        other = [row | {"policy/approxkl": row["policy/approxkl"] - 9} for row in rows(seed)]
        lay_out(tmp_path / f"results/demo/seed_{seed}", other, summary(seed), precision="fp32")
    ours = [row | {"policy/approxkl": row["policy/approxkl"] - 9} for row in rows(98)]
    for name in ("fp32", "bf16"):
        lay_out(tmp_path / name, ours, summary(98), precision=name)
    code, said = command(monkeypatch, capsys, "fp32", "results/demo", "--plots=false")
    assert code == 0 and "Of the 8 runs of results/demo, the 3 in fp32, which is this one's precision." in said
    code, said = command(monkeypatch, capsys, "bf16", "results/demo", "--plots=false")
    assert code == 1 and "Outside the band of 5 seeds" in said and "policy/approxkl in iterations 0 to 23" in said

    dead = rows(99)[:3] + [dict.fromkeys(rows(99)[3]) | {"step": 3}]  # a run whose numbers were none at last
    lay_out(tmp_path / "out/dead", dead)
    code, said = command(monkeypatch, capsys, "out/dead", "results/demo", "--plots=false")
    assert code == 1 and "  policy/entropy in iterations 3: no number in 3, band" in said
    assert "The evaluation is not compared: out/dead has no summary.json." in said
    assert "This run has 4 iterations, theirs 24." in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--run=text is required"),
        (("run",), "--reference=text is required"),
        (("run", "results/demo", "more"), "'more' is not an option"),
        (("run", "results/demmo"), "--reference=results/demmo is not a directory; runs of ours: results/demo"),
        (("nothing", "results/demo"), "--run=nothing is not a directory"),
        (("empty", "results/demo"), "--run=empty holds no run"),
        (("rm", "results/demo"), "--run=rm holds no PPO run with metrics.jsonl"),
        (("results/demo", "results/demo"), "--run=results/demo holds 5 PPO runs"),
        (("run", "run"), "--reference=run holds one PPO run: a band needs the runs of two seeds or more"),
        (("damaged", "results/demo"), "metrics.jsonl, line 1 is not JSON"),
        (("apart", "results/demo"), "have no iteration in common"),
        (("run", "results/demo", "--out=page.txt"), "must end in .html"),
    ],
)
def test_bad_input_is_one_line(tmp_path, seeds, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "run", rows(9))
    lay_out(tmp_path / "apart", [row | {"step": row["step"] + 500} for row in rows(9)])
    lay_out(tmp_path / "damaged", rows(9))
    (tmp_path / "damaged/metrics.jsonl").write_text("{\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm/run.json").write_text('{"pooling": "mean"}')
    assert said in command(monkeypatch, capsys, *words)[1]


@pytest.mark.slow
def test_the_report_draws_the_band(tmp_path, seeds, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    from evaluation import report

    run = lay_out(tmp_path / "run", rows(99), summary(99))
    (run / "summary.json").unlink()  # the tables of a whole evaluation are tests/test_report.py's
    monkeypatch.setattr("sys.argv", ["report", f"--run={run}", f"--reference={seeds}"])
    report.main()
    page = (run / "report.html").read_text()
    assert "Inside the band of 5 seeds" in page and "Inside the band of 5 seeds" in capsys.readouterr().out
    assert page.count('aria-label="objective/kl: ') == 2  # beside the seeds, and among the learning curves


def test_the_references_that_are_shipped():
    """Every one is whole, is small, says how it was made, and is inside the band that it makes with its siblings."""
    for reference in Path(__file__).parent.parent.glob("results/*/"):
        runs = sorted(reference.glob("*/"))
        assert len(runs) >= 3 and sum(file.stat().st_size for file in reference.rglob("*")) < 400_000
        for run in runs:
            machine = json.loads((run / "machine.json").read_text())
            assert all(machine[name] for name in ("command", "cpu", "kernels", "torch", "commit", "seconds"))
            assert "/work" not in (run / "run.json").read_text() + (run / "summary.json").read_text()
            assert band.compare(str(run), str(reference)).outside == []


@pytest.mark.slow
def test_a_reference_keeps_no_seed_twice(tmp_path):
    run = lay_out(tmp_path / "run", rows(7) + [{"step": 24, "time/total": 1.0}], summary(7) | {"seconds": {}}, seed=7)
    script = Path(__file__).parent.parent / "bench/reference.py"

    def keep(name: str) -> tuple[int, str]:
        words = [sys.executable, script, f"--run={run}", "--command=x", f"--out={tmp_path / 'kept' / name}"]
        done = subprocess.run(words, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert keep("a") == (0, "")
    code, said = keep("b")
    assert code == 2 and "kept/a is seed 7 already" in said and not (tmp_path / "kept/b").exists()


@pytest.mark.slow
def test_broken_and_healthy_runs(world, tmp_path):
    """Of the real scripts: another seed stays in the band of three, lr x100 leaves it, and so does no penalty at all."""
    options = {"iterations": 8, "checkpoint_every": 8, "weak_reward": "true"}
    for seed in range(1, 4):
        world.ok("train_ppo.py", out=tmp_path / f"seeds/{seed}", seed=seed, **options)
    healthy, broken = tmp_path / "healthy", tmp_path / "broken"
    world.ok("train_ppo.py", out=healthy, seed=4, **options)
    world.run("train_ppo.py", out=broken, seed=4, lr=0.03, **options)  # it may end by a brake
    assert len(lines(broken / "metrics.jsonl")) >= 2
    told = {
        run: world.start(["evaluate.py", "compare", str(run), str(tmp_path / "seeds")]).wait()
        for run in (healthy, broken)
    }
    assert (told[healthy].code, told[healthy].err) == (0, "") and "Inside the band of 3 seeds" in told[healthy].out
    assert told[broken].code == 1 and "Other options than theirs: --lr=0.03 (0.0003)." in told[broken].out
    assert "objective/kl in iterations" in told[broken].out
