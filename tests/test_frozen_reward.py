"""A linear head on a frozen trunk: a score belongs to its text alone, and the head is the textbook's."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import random_ids, small_model
from test_bad_input import refused

from data.baselines import pair_clusters
from data.examples import Examples
from data.pairs import SomeAnswers, some_prompts, spread
from evaluation.held_out import measured, nth_of, sample_groups
from model.generate import Sampling
from model.transformer import Transformer
from rlhf.infra import checkpoint
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.pretrained import open_pretrained
from rlhf.lm.trunks import LoRA
from rlhf.ppo.roles import CRITICS, LAYOUTS, logprobs_of, reference_on
from rlhf.reward.files import load_reward_model
from rlhf.reward.model import FrozenReward, stretch, text_features
from rlhf.reward.ridge import Judged, fit_heads, head_of, ridge
from rlhf.reward.scorer import open_scorer

pytestmark = pytest.mark.bits

STOPS = (1, 2)
ROWS, LONGEST = 8, 9
LENGTHS = [2, 9, 4, 3, 7, 5, 9, 6]
# ids 3 to 12: bos (3), then text without a stop token
TEXTS = [[3, *(3 + row[: n - 1] % 10).tolist()] for row, n in zip(random_ids(3, ROWS, LONGEST), LENGTHS)]
FEATURES = ((1, "mean"), (2, "last"))


@dataclass(frozen=True)
class Base:
    model: Transformer
    digest: str = "0123456789abcdef"


def batch(texts, width: int = 0, padding: int = 7):
    width = max([width, *map(len, texts)])
    tokens = torch.tensor([text + [padding] * (width - len(text)) for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    return tokens, lengths, torch.arange(width) == lengths[:, None] - 1


def fitted(states: FrozenStates, features=FEATURES, dtype=torch.float32) -> FrozenReward:
    """With a head, a gain and a bias that are none of them trivial."""
    model = FrozenReward(states, features, STOPS).to(dtype)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.ones_(model.head.bias)
    model.normalise(torch.tensor([[3.0], [-1.0], [2.5]]))
    return model.requires_grad_(False)


# ---- one text, one score


@settings(max_examples=25)
@given(
    rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6),
    extra=st.integers(0, 6),
    padding=st.integers(0, 12),  # stop tokens, too
)
def test_company_and_padding_change_no_score(rows, extra, padding):
    model = fitted(FrozenStates(small_model("llama", torch.float32)))
    texts = [TEXTS[row] for row in rows]
    alone = torch.cat([model.score(*batch([text])) for text in texts])
    together = model.score(*batch(texts, max(map(len, texts)) + extra, padding))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stop", STOPS)
def test_an_ended_text_scores_like_the_same_text_cut_off(stop):
    """PPO must not earn by ending a response, nor by not ending it."""
    model = fitted(FrozenStates(small_model("llama")), dtype=torch.float64)
    cut, ended = (model.score(*batch([text + end for text in TEXTS])) for end in ([], [stop]))
    torch.testing.assert_close(ended, cut, rtol=1e-10, atol=1e-10)
    twice = model.score(*batch([text + [stop, stop] for text in TEXTS]))
    assert not torch.allclose(twice, cut, atol=1e-3)  # only the last token may be an end


def test_features_by_the_definition():
    """One text at a time; no bos, no final stop token; depth n is what the first n layers made of it."""
    model = small_model("smollm2")
    features = [(depth, pooling) for depth in range(3) for pooling in ("mean", "last")]
    states = FrozenStates(model).read(range(3))
    tokens, lengths, _ = batch([text + [1] for text in TEXTS], 12)
    got = text_features(states(tokens), features, *stretch(tokens, lengths, None, STOPS))  # (B, 6, D)
    assert got.shape == (ROWS, 6, 24)
    for i, text in enumerate(TEXTS):
        row = torch.tensor([text])
        span = model.span(row)
        for f, (depth, pooling) in enumerate(features):
            hidden = model.blocks(model.embed(row, span), span, 0, depth)[0, 1:]  # without bos
            wanted = hidden[-1] if pooling == "last" else sum(hidden) / len(hidden)
            torch.testing.assert_close(got[i, f], wanted.detach(), rtol=1e-10, atol=1e-10)


def test_texts_with_nothing_in_them():
    model = fitted(FrozenStates(small_model("llama")))
    assert model.score(*batch([[3, 1]])).isfinite().all()  # an empty response to no prompt: read at its end
    assert torch.equal(model.score(*batch([[3, 1]])), model.score(*batch([[3, 1]], 5, 8)))
    with pytest.raises(ValueError, match="nothing after bos"):
        model.score(*batch([[3], [3, 4]]))


def test_other_readers_of_the_states_change_nothing():
    model = small_model("llama", torch.float32)
    shared = FrozenStates(model)
    score, alone = fitted(shared), fitted(FrozenStates(model))
    texts = batch(TEXTS)
    before = score.score(*texts)
    shared.read([0, 2])
    shared(texts[0][:3])  # another question in between
    assert torch.equal(score.score(*texts), before) and torch.equal(before, alone.score(*texts))


def test_one_forward_pass_serves_all_readers(monkeypatch):
    model = small_model("llama", torch.float32)
    calls, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda *args: calls.append(1) or embed(*args))
    states, texts = FrozenStates(model).read([2]), batch(TEXTS)
    score = fitted(states)
    states(texts[0])
    score.score(*texts)
    assert len(calls) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_of_the_same_pass(monkeypatch, layout):
    """In every layout, once a reward model reads the trunk: its own log-probs, and no pass more than the policy needs."""
    base = small_model("llama", torch.float64)
    roles = LAYOUTS[layout](base, CRITICS[layout], 0.7, LoRA(), 1)
    reward, (tokens, lengths, mask) = fitted(roles.frozen, dtype=torch.float64), batch(TEXTS)
    expected, calls, embed = logprobs_of(base, 0.7)(tokens, mask), [], base.embed
    monkeypatch.setattr(base, "embed", lambda *args: calls.append(1) or embed(*args))
    reward.score(tokens, lengths, mask)
    features = roles.features(tokens)
    torch.testing.assert_close(roles.reference(tokens, mask, features), expected, rtol=0, atol=1e-12)
    assert len(calls) == 1


def test_an_evaluation_reads_the_base_once(monkeypatch):
    """Rewards that are heads on the base, and its log-probs, are of one pass of a group; and are what they are alone."""
    base, tuned = small_model("llama", torch.float64), small_model("llama", torch.float64, seed=4)
    reference, frozen = reference_on(base, 0.7)
    heads = {"a": fitted(frozen, dtype=torch.float64), "b": fitted(frozen, ((2, "mean"),), torch.float64)}
    scores = {
        name: lambda tokens, lengths, mask, rows, h=h: h.score(tokens, lengths, mask) for name, h in heads.items()
    }
    policy = logprobs_of(tuned, 0.7)
    prompts, lengths = torch.tensor([[3, 4, 5], [3, 6, 0], [3, 7, 8]]), torch.tensor([3, 2, 3])
    groups = sample_groups(tuned, prompts, lengths, 2, Sampling(4, STOPS), 1)
    calls, embed = [], base.embed
    monkeypatch.setattr(base, "embed", lambda *args: calls.append(1) or embed(*args))
    earned, moved = measured(groups, scores, None, 2, (policy, reference))
    assert len(calls) == 2  # of the first answers, and of the second ones
    for k in range(2):
        (group,) = nth_of(groups, 2, k)
        for name, head in heads.items():
            alone = [
                head.score(group.tokens[i : i + 1], group.lengths[i : i + 1], group.mask[i : i + 1]) for i in range(3)
            ]
            np.testing.assert_allclose(earned[name][:, k], torch.cat(alone).numpy(), rtol=0, atol=1e-10)
    (group,) = nth_of(groups, 2)
    ours, theirs = (logprobs_of(model, 0.7)(group.tokens, group.mask) for model in (tuned, base))
    np.testing.assert_allclose(moved["kl"], (ours - theirs).sum(1).numpy(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(moved["nll"], -theirs.sum(1).numpy(), rtol=0, atol=1e-10)
    assert moved["length"].tolist() == group.mask.sum(1).tolist()


# ---- the fit


def test_ridge_is_the_minimum():
    """Against lstsq on the rows stacked with sqrt(N penalty) I, which is the same problem."""
    rng = np.random.default_rng(0)
    for n, p, penalty in ((40, 6, 0.3), (5, 12, 1.0)):  # more features than rows, too
        x, y = rng.normal(size=(n, p)), rng.normal(size=n)
        stacked = np.vstack([x, math.sqrt(n * penalty) * np.eye(p)])
        wanted = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros(p)]), rcond=None)[0]
        X, Y = torch.from_numpy(x), torch.from_numpy(y)
        got = ridge(X.T @ X / n, X.T @ Y / n, penalty)
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-9, atol=1e-12)


def made_up(n: int, seed: int):
    """Features (n, 3, 4) of which the second tells the rating, on scales from 0.1 to 1000."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 3, 4, generator=generator) * torch.tensor([0.1, 1.0, 30.0, 1000.0]) + 5
    ratings = features[:, 1, 0] * 10 - features[:, 1, 3] / 500 + 0.1 * torch.randn(n, generator=generator)
    return features, ratings


NAMES = [(1, "mean"), (2, "mean"), (2, "last")]


def rated(features, scores) -> Judged:
    """Answers with scores and without pairs."""
    none = torch.zeros(0)
    return Judged(features, scores, none.long(), none.long(), none, none)


def test_the_fit_finds_what_tells_the_rating():
    train, ratings = made_up(60, 0)
    unseen, truth = made_up(40, 1)
    fits = fit_heads(NAMES, rated(train, ratings), rated(unseen, truth), (0.01, 1.0))
    assert len(fits) == 6 and {f.features for f in fits} >= {(name,) for name in NAMES}
    assert [f.error for f in fits] == sorted(f.error for f in fits)
    assert fits[0].error < 0.05 and NAMES[1] in fits[0].features and fits[0].penalty == 0.01
    spread, mean = ratings.double().std(unbiased=False), ratings.double().mean()
    for fit in fits:  # the head reads plain features and gives standardised ratings
        x = unseen[:, [NAMES.index(f) for f in fit.features]].flatten(1).double()
        torch.testing.assert_close(x @ fit.weight.T + fit.constant, fit.predictions)
        assert fit.error == pytest.approx(
            float(((fit.predictions[:, 0] - (truth.double() - mean) / spread) ** 2).mean())
        )


def test_validation_decides_which_head_and_never_how_it_looks():
    train, ratings = made_up(60, 0)
    choices = [
        fit_heads(NAMES, rated(train, ratings), rated(*made_up(40, seed)), (0.01, 1.0, 100.0)) for seed in (1, 2)
    ]
    by_set = [{(f.features, f.penalty): f.weight for f in fits} for fits in choices]
    for key in by_set[0].keys() & by_set[1].keys():
        assert torch.equal(by_set[0][key], by_set[1][key])
    noise = torch.randn(40, generator=torch.Generator().manual_seed(9))
    fits = fit_heads(NAMES, rated(train, ratings), rated(made_up(40, 1)[0], noise), (0.01, 1.0, 100.0))
    assert fits[0].penalty == 100.0  # where nothing can be told, it is best to say little


def test_the_head_of_a_fit_predicts_the_same_from_tokens():
    states = FrozenStates(small_model("llama")).read([1, 2])
    tokens, lengths, mask = batch(TEXTS)
    names = [(1, "mean"), (2, "last")]
    features = text_features(states(tokens), names, *stretch(tokens, lengths, None, STOPS))
    ratings = torch.arange(ROWS).double()
    for fit in fit_heads(names, rated(features, ratings), rated(features, ratings), (0.5,)):
        got = head_of(fit, states, STOPS)(tokens, lengths)
        torch.testing.assert_close(got.double(), fit.predictions, rtol=1e-4, atol=1e-4)


# ---- files


class Words:
    fingerprint = "words"


def saved(model: FrozenReward, path, **changes) -> str:
    depths, poolings = zip(*model.features)
    config = {"kind": "reward", "trunk": "frozen", "base": "smol", "base_digest": Base.digest, "tokenizer": "words"}
    config |= {"depths": depths, "poolings": poolings, "stop_ids": model.stop_ids, **changes}
    checkpoint.save(path, model.state_dict(), config)
    return str(path)


def test_what_is_saved_scores_the_same_when_loaded(tmp_path):
    base = Base(small_model("llama", torch.float32))
    model, texts = fitted(FrozenStates(base.model)), batch(TEXTS)
    path = saved(model, tmp_path / "rm")
    normalisation = {"gain", "bias", "member_gain", "member_bias", "temperature"}
    assert checkpoint.load(path).tensors.keys() == {"head.weight", "head.bias"} | normalisation  # and no trunk
    wanted = model.score(*texts)
    frozen = FrozenStates(base.model).read([0])
    for how in ({"base": base}, {"base": base, "frozen": frozen}):
        scorer = open_scorer(path, Words(), **how)
        assert torch.equal(scorer.score(*texts), wanted)
        assert (scorer.is_function, scorer.parameters, scorer.digest) == (False, 0, checkpoint.digest(path))
    assert frozen.depths == {0, 1, 2}


def test_a_trunk_that_does_not_fit(tmp_path):
    base = Base(small_model("llama", torch.float32))
    model = fitted(FrozenStates(base.model))
    path = saved(model, tmp_path / "rm")
    for other in (None, Base(base.model, "fedcba9876543210")):
        with pytest.raises(
            FileNotFoundError, match="base model smol with sha256 0123456789ab, which is neither there nor"
        ):
            open_scorer(path, Words(), base=other)
    with pytest.raises(ValueError, match="frozen reads another model than base"):
        open_scorer(path, Words(), base=base, frozen=FrozenStates(small_model("llama")))
    with pytest.raises(ValueError, match="trained with tokenizer words"):
        load_reward_model(path, "letters", base=base)
    with pytest.raises(ValueError, match=r"reads \(3, 'mean'\) of a trunk of 2 layers"):
        open_scorer(saved(model, tmp_path / "deep", depths=(3, 2)), Words(), base=base)


# ---- the answers of some prompts


def test_some_prompts_of_every_source(world):
    data = Examples(world.path / "data/train")
    source = data.source()
    everything = spread(source, None, seed=1)
    assert sorted(everything) == list(range(data.prompts)) and some_prompts(data, data.prompts, 1) is None
    assert np.array_equal(some_prompts(data, 50, 1), everything[:50])  # more prompts are these and others
    assert not np.array_equal(some_prompts(data, 50, 2), everything[:50])
    share = np.bincount(source) / data.prompts
    for n in (40, 80):
        counts = np.bincount(source[some_prompts(data, n, 1)], minlength=len(share))
        assert (np.abs(counts - n * share) <= 1).all()


def test_pairs_among_the_answers_of_some_prompts(world):
    data = Examples(world.path / "data/train")
    prompts = some_prompts(data, 40, 1)
    some = SomeAnswers(data, prompts)
    assert len(some) == 40 and some.texts == [data.record(i).answers[0] for i in prompts]
    assert np.array_equal(some.lengths(), data.row_lengths()[prompts])
    better, worse, gap = (some.column(f"pair_{name}") for name in ("chosen", "rejected", "gap"))
    assert 40 < len(gap) == some.pairs <= 400 and (gap > 0).all()
    assert np.allclose(some.column("rating")[better] - some.column("rating")[worse], gap)
    assert (some.column("domain")[better] == some.column("domain")[worse]).all()
    assert len({frozenset(pair) for pair in zip(better, worse)}) == len(gap)
    assert np.array_equal(pair_clusters(some), np.stack([better, worse], 1))


# ---- the script

OPTIONS = {  # in place of those that a frozen trunk does not have
    **dict.fromkeys(("batch", "epochs", "warmup", "log_every", "eval_every", "checkpoint_every")),
    "trunk": "frozen", "depths": "1,2", "poolings": "mean,last", "sentences": 120,
}  # fmt: skip


def test_train_rm_frozen(world, tmp_path, monkeypatch):
    """From the command line to a score; two processes find the same head."""
    outs = [tmp_path / "one", tmp_path / "two"]
    for out, ranks in zip(outs, (0, 2)):
        done = world.together(world.command("train_rm.py", out=out, **OPTIONS), ranks)
        assert done.code == 0, done
        assert "reward model" in done.out and "head fitted to 120 answers" in done.out
    heads = [checkpoint.load(out).tensors for out in outs]
    for name in ("head.weight", "head.bias", "gain", "bias"):
        torch.testing.assert_close(heads[0][name], heads[1][name], rtol=1e-6, atol=1e-6)

    report = json.loads((outs[0] / "report.json").read_text())
    gaps = {"all", "0.5", "1", "2"}
    assert report["accuracy"].keys() == report["validation"].keys() == gaps
    assert all(report["baselines"][name].keys() == gaps for name in ("rules", "bow", "length", "human"))
    assert len(report["candidates"]) == 10 and report["chosen"] == report["candidates"][0]
    assert report["sentences"]["train"] == 120 and report["pairs"]["test"] > 0

    base = open_pretrained(world.path / "lm")
    score = open_scorer(str(outs[0]), base.tokenizer, base=base).score
    data = Examples(world.path / "data/test")
    texts = [data.row(i).astype(np.int64).tolist() for i in range(4)]
    scores = torch.cat([score(*batch([text])) for text in texts])
    torch.testing.assert_close(scores, score(*batch(texts, 60, 5)), rtol=1e-5, atol=1e-5)
    monkeypatch.chdir(world.path)  # where its config's "lm" lies
    other = replace(base, digest="another model's")
    for another in (None, other):  # the head's own base is opened
        alone = open_scorer(str(outs[0]), base.tokenizer, base=another)
        assert torch.equal(alone.score(*batch(texts[:1])), scores[:1])

    before = {file: file.read_bytes() for file in outs[0].rglob("*") if file.is_file()}
    world.ok("train_rm.py", out=outs[0], **OPTIONS)  # a finished run stays as it is
    assert {file: file.read_bytes() for file in outs[0].rglob("*") if file.is_file()} == before
    line = refused(world.run("train_rm.py", out=outs[0], **OPTIONS, seed=2), "seed=1", "seed=2")
    assert str(outs[0]) in line


@pytest.mark.parametrize(
    "options, words",
    [
        ({"trunk": "frozen"}, ("--batch", "no effect", "--trunk=frozen")),
        ({"depths": "1"}, ("--depths", "no effect", "--trunk=full")),
        (OPTIONS | {"depths": "1,3"}, ("--depths=3", "2 layers")),
        (OPTIONS | {"ridge": "0,1"}, ("--ridge=0", "above 0")),
        (OPTIONS | {"poolings": ""}, ("--poolings", "empty")),
        (OPTIONS | {"poolings": "max"}, ("--poolings=max",)),
        (OPTIONS | {"sentences": 1}, ("--sentences=1", "at least 2")),
    ],
    ids=str,
)
def test_options_that_do_not_fit(world, tmp_path, options, words):
    refused(world.run("train_rm.py", out=tmp_path / "out", **options), *words)
    assert not (tmp_path / "out").exists()
