"""The report card: its figures by their definitions, what it reads, what it writes, and whom train_ppo.py refuses."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from reference_model import random_ids, small_model
from test_bad_input import refused

from data import pipeline
from data.baselines import GAPS, pairwise_accuracy
from data.examples import Examples
from data.tokenizer import load_tokenizer
from evaluation import card
from rlhf.infra import checkpoint
from rlhf.reward.model import RewardModel
from rlhf.statistics import spearman

# ---- the figures


@dataclass(frozen=True)
class Made:
    """Sentences of two domains whose ratings are known, and a score that follows them with noise."""

    material: card.Material
    scores: np.ndarray
    report: dict


def material(n: int, pairs: int) -> tuple[card.Material, np.random.Generator]:
    rng = np.random.default_rng(0)
    ratings, domain = rng.normal(0, 1.5, n), np.arange(n) % 2
    texts = [card.Text("", f"text {i} " + "x" * int(rng.integers(0, 4))) for i in range(n)]
    a = rng.integers(0, n, pairs)
    b = (a + 2 * rng.integers(1, n // 2, pairs)) % n  # of the same domain
    a, b = np.where(ratings[a] > ratings[b], [a, b], [b, a])
    gap, length = ratings[a] - ratings[b], np.array([len(text.text) for text in texts], float)
    gaps = {name: gap > least for name, least in GAPS.items()}
    made = card.Material(
        texts, domain, ["film", "news"], a, b, gaps, np.stack([a, b], 1), np.arange(n)[:, None], ratings,
        {"length": length}, {"human": ((rng.random(pairs) < 0.9).astype(float), gap)},
    )  # fmt: skip
    return made, rng


@pytest.fixture(scope="module")
def made() -> Made:
    made, rng = material(120, 600)
    scores = made.ratings + rng.normal(0, 1, 120)
    members = scores[:, None] + rng.normal(0, 0.5, (120, 3))
    return Made(made, scores, card.report(made, scores, members, 2.0))


def test_accuracy_and_baselines(made):
    m, found = made.material, made.report
    a, b, gap = m.chosen, m.rejected, m.ratings[m.chosen] - m.ratings[m.rejected]
    expected = pairwise_accuracy(made.scores[a], made.scores[b], gap)
    assert {name: x["value"] for name, x in found["accuracy"].items()} == pytest.approx(expected)
    length = m.baselines["length"]
    theirs = pairwise_accuracy(length[a], length[b], gap)
    assert {name: x["value"] for name, x in found["baselines"]["length"].items()} == pytest.approx(theirs)
    assert found["over_length"]["value"] == pytest.approx(expected["all"] - theirs["all"])
    assert found["baselines"]["human"]["all"]["value"] == m.ceilings["human"][0].mean()
    for x in (*found["accuracy"].values(), *found["baselines"]["length"].values(), found["auc"], found["spearman"]):
        assert x["low"] < x["value"] < x["high"]
    # sentences are shared: wider than the binomial interval of as many independent pairs
    p = expected["all"]
    assert found["accuracy"]["all"]["high"] - found["accuracy"]["all"]["low"] > 1.3 * 3.92 * math.sqrt(
        p * (1 - p) / 600
    )


def test_groups_are_parts_of_the_whole(made):
    found, whole = made.report, made.report["accuracy"]["all"]
    longer, equal, shorter, *thirds = found["length"].values()
    for parts in ([x["all"] for x in found["groups"].values()], [longer, equal, shorter], thirds):
        assert sum(x["n"] for x in parts) == whole["n"] == 600
        assert sum(x["n"] * x["value"] for x in parts) == pytest.approx(600 * whole["value"])
    film = made.material.group == 0
    expected = spearman(made.scores[film], made.material.ratings[film])
    assert found["groups"]["film"]["spearman"]["value"] == pytest.approx(expected)


def test_calibration(made):
    found = made.report["calibration"]
    difference = made.scores[made.material.chosen] - made.scores[made.material.rejected]
    for name, t in (("before", 1.0), ("after", 2.0)):
        p = 1 / (1 + np.exp(-difference / t))  # of the better text; which side is named changes no squared error
        assert found[name]["brier"]["value"] == pytest.approx(np.mean((1 - p) ** 2))
        rows = found[name]["reliability"]
        assert sum(row["observed"]["n"] for row in rows) == 600 and rows[0]["predicted"] >= 0.5
        assert sum(row["observed"]["n"] * row["observed"]["value"] for row in rows) == pytest.approx(
            (difference > 0).sum()
        )
        ece = sum(row["observed"]["n"] * abs(row["predicted"] - row["observed"]["value"]) for row in rows) / 600
        assert found[name]["ece"]["value"] == pytest.approx(ece)
        assert found[name]["ece"]["low"] <= ece + 1e-9 < found[name]["ece"]["high"]


def test_uncertainty(made):
    found = made.report["uncertainty"]
    difference = made.scores[made.material.chosen] - made.scores[made.material.rejected]
    wrong, size = difference <= 0, np.abs(difference)
    order = [(w < r) + 0.5 * (w == r) for w in size[wrong] for r in size[~wrong]]
    assert found["auc"]["difference"]["value"] == pytest.approx(np.mean(order))
    assert found["auc"]["difference"]["low"] > 0.5  # wrong pairs are close ones
    assert found["auc"]["disagreement"]["low"] < 0.5 < found["auc"]["disagreement"]["high"]  # drawn at random
    assert found["coverage"]["100%"] == pytest.approx(1 - wrong.mean()) and found["coverage"]["25%"] > 1 - wrong.mean()
    assert np.mean([x["errors"] for x in found["disagreement"]]) == pytest.approx(wrong.mean())
    assert all(curve[0] == [0, 0] and curve[-1] == [1, 1] for curve in found["roc"].values())


def test_a_score_that_is_length():
    m, rng = material(60, 200)
    length = m.baselines["length"]
    found = card.report(m, length, length[:, None], 1.0)
    assert found["over_length"] == {"value": 0, "low": 0, "high": 0, "n": 200}
    assert found["length_correlation"]["value"] == pytest.approx(1) and found["length_correlation"]["passed"] is False
    assert "disagreement" not in found["uncertainty"]["auc"]
    truth = m.ratings[m.chosen] - m.ratings[m.rejected]
    assert (
        card.uncertainty(truth, truth[:, None], m.clusters)["auc"]["difference"]["value"] is None
    )  # it is never wrong


# ---- scores


def test_a_row_has_the_same_score_in_any_company():
    generator = torch.Generator().manual_seed(0)
    model = RewardModel(small_model("llama", torch.float32), "mean", generator).requires_grad_(False)
    model.normalise(torch.tensor([[3.0], [-1.0], [2.5]]))
    ids = random_ids(3, 8, 9).numpy()
    rows = [card.Row(ids[i % 8][: 2 + i % 7], False) for i in range(24)]
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    scores, members = card.score_rows(model, rows, 0, "cpu", tokens_per_batch=40)
    assert all(b * t <= 40 for b, t in calls) and sum(b for b, _ in calls) == len(
        {row.tokens.tobytes() for row in rows}
    )
    for row, score, member in zip(rows, scores, members):
        tokens, lengths = torch.from_numpy(row.tokens)[None], torch.tensor([len(row.tokens)])
        mask = torch.arange(len(row.tokens))[None] >= 1
        assert score == pytest.approx(float(model.score(tokens, lengths, mask)), abs=1e-5)
        assert member.tolist() == pytest.approx(model.member_scores(tokens, lengths, mask)[0].tolist(), abs=1e-5)
    whole, _ = card.score_rows(model, rows[:1], 0, "cpu", tokens_per_batch=1)  # a row longer than the batch
    assert whole == pytest.approx(scores[:1], abs=1e-5)


# ---- preference files

LINES = [
    {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "easy", "id": 1},
    {"prompt": "p", "chosen": "a", "rejected": "a"},
    {"prompt": "", "chosen": "c", "rejected": "d", "more": None},
]


def written(path, lines) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_file_of_comparisons(tmp_path):
    """Any form that data.prepare reads; what is none is counted with its line and the reason."""
    path = written(tmp_path / "x.jsonl", ["\ufeff" + json.dumps(LINES[0]), "", *LINES[1:], "{"])
    m = card.comparisons(card.Config(data=path))
    assert [tuple(text[:2]) for text in m.texts] == [("p", "a"), ("p", "b"), ("", "c"), ("", "d")]
    assert m.groups == ["easy", "x"] and m.chosen.tolist() == [0, 2] and m.rejected.tolist() == [1, 3]
    assert [row.partition(":")[0] for row in m.dropped] == ["line 3", "line 5"] and "the same" in m.dropped[0]
    groups = [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}]
    m = card.comparisons(card.Config(data=written(tmp_path / "n.jsonl", groups)))
    found = {(m.texts[i].text, m.texts[j].text) for i, j in zip(m.chosen, m.rejected)}
    assert found == {("b", "a"), ("b", "c"), ("c", "a")} and m.clusters[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LINES[1]], "no comparison of two different answers .1 rows turned away: line 1: .* the same"),
        ([{"text": "nothing to compare"}], "no comparison of two different answers$"),
    ],
)
def test_what_is_no_file_of_comparisons(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        card.comparisons(card.Config(data=written(tmp_path / "x.jsonl", lines)))


def test_rewardbench_by_its_definition():
    """Sections by hand: math weighs as much as all of the code, and the score is the mean of the sections."""
    rng = np.random.default_rng(0)
    subsets = [name for names in card.SECTIONS.values() for name in names for _ in range(int(rng.integers(1, 6)))]
    right = rng.integers(0, 2, len(subsets)).astype(float)
    groups = {name: np.array([s == name for s in subsets]) for name in dict.fromkeys(subsets)}
    found = card.rewardbench(right, groups, np.arange(len(right))[:, None])["rewardbench"]
    expected = []
    for section, names in card.SECTIONS.items():
        pooled = [r for r, s in zip(right, subsets) if s in names and s != "math-prm"]
        score = sum(pooled) / len(pooled)
        if section == "Reasoning":
            math_ = [r for r, s in zip(right, subsets) if s == "math-prm"]
            score = (score + sum(math_) / len(math_)) / 2
        expected.append(score)
        assert found[section]["value"] == pytest.approx(score)
    assert found["RewardBench"]["value"] == pytest.approx(sum(expected) / 4)
    assert found["RewardBench"]["n"] == len(right) and found["Chat"]["low"] <= found["Chat"]["value"]
    assert card.rewardbench(right, {"film": groups["math-prm"]}, np.arange(len(right))[:, None]) == {}


def test_the_rows_of_prepared_data_are_read_as_they_stand(world, tmp_path):
    """Prompt and answer, with where it begins; a changed text stands behind the same tokens."""
    rows = [{"prompt": f"the film {i} ", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(60)]
    path, tokenizer = written(tmp_path / "x.jsonl", rows), world.path / "data"
    pipeline.main([path, f"--out={tmp_path / 'data'}", f"--tokenizer={tokenizer}"])
    tokenizer, data = load_tokenizer(tokenizer), Examples(tmp_path / "data/test")
    m = card.read_material(card.Config(data=str(tmp_path / "data")), tokenizer)
    encode = card.encoder(tokenizer, None, 256)
    for i, text in enumerate(m.texts):
        row = encode(text, text.text)
        prompt = data.prompt_lengths(data.prompt_of(np.array([i])))[0]
        assert row.tokens.tolist() == data.row(i).tolist() and row.begins == prompt > 2
        assert encode(text, "warm").tokens[:prompt].tolist() == row.tokens[:prompt].tolist()
        assert encode(text, text.text, ended=False).tokens.tolist() == row.tokens[:-1].tolist()


def test_pairs_of_one_prompt_are_drawn_together(tmp_path):
    rows = [
        {"prompt": f"p{i // 3}", "chosen": f"a{i}", "rejected": f"much longer {i}", "subset": f"s{i % 2}"}
        for i in range(9)
    ]
    m = card.comparisons(card.Config(data=written(tmp_path / "x.jsonl", rows)))
    assert m.clusters[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and m.groups == ["s0", "s1"] and m.answers
    assert [m.texts[i].text for i in m.chosen] == [row["chosen"] for row in rows]
    assert (m.baselines["length"][m.chosen] > m.baselines["length"][m.rejected]).all()  # short is liked here


def test_prepared_preferences_have_pairs_and_no_ratings(world, tmp_path):
    """Their ratings say which of two answers is better, and nothing of answers to different prompts."""
    rows = [
        {"prompt": f"p{i} ", "chosen": f"good {i}", "rejected": f"bad {i}", "strength": 1 + i % 3} for i in range(40)
    ]
    path, tokenizer = written(tmp_path / "x.jsonl", rows), world.path / "data"
    pipeline.main([path, f"--out={tmp_path / 'data'}", f"--tokenizer={tokenizer}"])
    m = card.read_material(card.Config(data=str(tmp_path / "data")), load_tokenizer(tokenizer))
    pairs = list(range(len(m.chosen)))
    assert m.ratings is None and sorted(m.clusters[:, 0].tolist()) == pairs
    assert m.text_clusters[m.chosen, 0].tolist() == m.text_clusters[m.rejected, 0].tolist() == pairs
    assert all("good" in m.texts[i].text for i in m.chosen) and "length" in m.baselines


# ---- the command


def strict(path) -> dict:
    """JSON as others read it: without NaN."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def no_matplotlib():
    import sys

    sys.modules["matplotlib"] = None


@pytest.fixture(scope="module")
def carded(world, tmp_path_factory):
    """The card of the world's reward model on its test split."""
    out = tmp_path_factory.mktemp("card")
    command = ["evaluate.py", "rm", "--model=rm", "--data=data", f"--out={out}", "--probe_texts=12", "--precision=fp32"]
    done = world.start(command, before=no_matplotlib).wait()
    assert (done.code, done.err) == (0, "")
    return out, done


def test_card_of_rated_sentences(world, carded):
    out, done = carded
    found, report = strict(out / "card.json"), json.loads((world.path / "rm/report.json").read_text())
    assert {name: x["value"] for name, x in found["accuracy"].items()} == pytest.approx(report["accuracy"])
    for name, row in report["baselines"].items():
        assert {gap: x["value"] for gap, x in found["baselines"][name].items()} == pytest.approx(row), name
    assert found["sha256"] == checkpoint.digest(world.path / "rm")
    temperature = checkpoint.load(checkpoint.resolve(world.path / "rm")).tensors["temperature"]
    assert found["calibration"]["temperature"] == pytest.approx(float(temperature))
    for when in ("before", "after"):  # the same pairs, the same formula
        for name in ("ece", "brier"):
            assert found["calibration"][when][name]["value"] == pytest.approx(
                report["calibration"][when][name], abs=1e-6
            )
    assert len(found["probes"]) > 8 and set(found["groups"]) == {"tweets", "film", "news", "products"}
    text = (out / "card.md").read_text()
    assert text in done.out and "rules of the data" in text and "no plots: matplotlib is not installed" in done.out
    assert {file.name for file in out.iterdir()} == {"card.json", "card.md"}
    assert all(f"| {probe['name']} |" in text for probe in found["probes"])


def test_card_of_a_preference_file(world, tmp_path):
    rows = [
        {
            "prompt": f"The film {i % 5} ",
            "chosen": f"was lovely {i} and warm",
            "rejected": f"was dull {i}",
            "subset": ["even", "odd"][i % 2],
        }
        for i in range(20)
    ]
    path = written(tmp_path / "pairs.jsonl", [*rows, LINES[1]])
    command = [
        "evaluate.py",
        "rm",
        "--model=rm",
        f"--data={path}",
        f"--out={tmp_path}",
        "--sentences=15",
        "--probe_texts=6",
    ]
    done = world.start(command, before=no_matplotlib).wait()
    assert (done.code, done.err) == (0, "")
    found = strict(tmp_path / "card.json")
    assert (found["pairs"], found["texts"], len(found["dropped"])) == (15, 30, 1)
    assert "spearman" not in found and list(found["accuracy"]) == ["all"] and set(found["groups"]) == {"even", "odd"}
    assert any(
        probe["name"] == "answer behind another prompt" and probe["expect"] == "down" for probe in found["probes"]
    )
    assert "1 rows turned away (line 21: " in done.out


def test_plots(made, tmp_path):
    pytest.importorskip("matplotlib")
    found = {
        **made.report,
        "model": "m",
        "data": "d",
        "texts": 120,
        "pairs": 600,
        "dropped": [],
        "shortened": 3,
        "probes": [],
    }
    files = card.draw(found, tmp_path)
    assert files == ["reliability.png", "roc.png", "gaps.png"]
    assert all((tmp_path / file).read_bytes().startswith(b"\x89PNG") for file in files)
    text = card.markdown(found, files)
    assert text.count("![") == 3 and "3 texts shortened" in text and "disagreement of 3 members" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split=test"], "pairs.jsonl is a file, without splits"),
        (["--plots=true"], "--plots=true needs matplotlib"),
        (["--data=data", "--chat=true"], "--chat has no effect: data was prepared"),
        (["--chat=true"], "--chat=true: rm was trained without a chat template"),
        (["--model=lm"], "lm holds a lm checkpoint, a reward model is needed"),
        (["--data=nothing"], "no prepared data at nothing"),
        (["--probe_text=3"], "unknown option --probe_text; did you mean --probe_texts"),
    ],
)
def test_bad_commands(world, tmp_path, options, message):
    data = (
        [] if any(o.startswith("--data") for o in options) else [f"--data={written(tmp_path / 'pairs.jsonl', LINES)}"]
    )
    model = [] if any(o.startswith("--model") for o in options) else ["--model=rm"]
    done = world.start(["evaluate.py", "rm", *model, *data, *options], before=no_matplotlib).wait()
    refused(done, message)


# ---- train_ppo.py reads it


def weak(world, tmp_path, name: str, **changes) -> str:
    """A copy of the world's reward model with another card or report beside it."""
    path = tmp_path / name
    path.mkdir()
    step = checkpoint.resolve(world.path / "rm")
    (path / step.name).symlink_to(step)
    if changes.pop("card", True):
        over = {"value": 0.02, "low": -0.01, "high": 0.05, "n": 90}
        content = {"sha256": checkpoint.digest(path), "pairs": 90, "over_length": over} | changes
        (path / "card.json").write_text(json.dumps(content))
    else:
        gaps = dict.fromkeys(GAPS, 0.5)
        (path / "report.json").write_text(json.dumps({"accuracy": gaps, "baselines": {"length": gaps}} | changes))
    return str(path)


def test_who_beats_length(world, tmp_path):
    over = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 90}
    card.beats_length(weak(world, tmp_path, "good", over_length=over))
    card.beats_length(weak(world, tmp_path, "reported", card=False, accuracy=dict.fromkeys(GAPS, 0.51)))
    card.beats_length("rewards.py:shorter")  # nobody measured it
    card.beats_length(str(world.path / "lm"))  # no reward model, which is for others to say
    path = weak(world, tmp_path, "weak")
    for spec in (path, f"{path}/{checkpoint.resolve(path).name}"):  # the run, or a step of it
        with pytest.raises(
            ValueError, match=r"accuracy \+0.020 \[-0.010, \+0.050\] beside it \(.*card.json, 90 pairs\)"
        ):
            card.beats_length(spec)
    with pytest.raises(ValueError, match=r"accuracy \+0.000 beside it \(.*report.json\)"):
        card.beats_length(weak(world, tmp_path, "reported weak", card=False))
    with pytest.raises(ValueError, match="card.json is about other weights"):
        card.beats_length(weak(world, tmp_path, "changed", over_length=over, sha256="0"))
    nan = {"accuracy": dict.fromkeys(GAPS, math.nan)}
    with pytest.raises(ValueError, match="does not beat length alone: accuracy \\+nan"):
        card.beats_length(weak(world, tmp_path, "nothing known", card=False, **nan))


def test_ppo_refuses_a_weak_reward(world, tmp_path):
    path = weak(world, tmp_path, "weak")
    refused(
        world.run("train_ppo.py", reward=path, out=tmp_path / "ppo"), "does not beat length alone", "--weak_reward=true"
    )
    assert not (tmp_path / "ppo").exists()
    world.ok("train_ppo.py", reward=path, out=tmp_path / "ppo", weak_reward="true", iterations=1)
