"""Trunks, poolings, ensembles, objectives and means of reward models: what is trained is what is loaded, and scores alike."""

import functools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import small_model
from test_bad_input import refused
from test_frozen_reward import ROWS, STOPS, TEXTS, Base, batch
from tiny import SMALL, lines
from torch.nn.functional import logsigmoid

from data.examples import Examples
from data.loader import PairLoader
from data.pairs import SomeAnswers, made_pairs, thurstone
from model.lora import merge
from rlhf.infra import checkpoint
from rlhf.infra.optim import make_optimizer
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.pretrained import open_pretrained
from rlhf.lm.trunks import LoRA
from rlhf.reward.files import average, load_reward_model, restored
from rlhf.reward.model import POOLINGS, READS, Ensemble, FrozenReward, RewardModel, adapted_trunk
from rlhf.reward.objective import Objective, Texts, coefficients, reward_losses
from rlhf.reward.ridge import Judged, fit_heads, refitted
from rlhf.reward.scorer import open_scorer

BASE = Base(small_model("llama", torch.float32))
LORA = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": None}


class Words:
    fingerprint = "words"


def noisy(model, seed: int = 0):
    """Every trainable number moved: adapters that are no longer nothing, queries that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for x in model.parameters():
        if x.requires_grad:
            x.data.add_(0.3 * torch.randn(x.shape, generator=generator))
    return model


def make(trunk: str, pooling: str, ensemble: Ensemble, seed: int = 0) -> tuple[torch.nn.Module, dict]:
    """A reward model with a life behind it, normalised, and the config of its checkpoint."""
    config = {"kind": "reward", "trunk": trunk, "tokenizer": "words"} | asdict(ensemble)
    generator = torch.Generator().manual_seed(seed)
    if trunk == "frozen":
        model = FrozenReward(FrozenStates(BASE.model), [(1, "mean"), (2, pooling)], STOPS, ensemble)
        config |= {"depths": (1, 2), "poolings": ("mean", pooling)}
    elif trunk == "adapters":
        depth = 1 if seed % 2 else None
        lora = LoRA(LORA["lora_rank"], LORA["lora_alpha"], None, seed)
        model = RewardModel(adapted_trunk(BASE.model, lora, depth), pooling, generator, ensemble, STOPS)
        config |= LORA | {"pooling": pooling, "depth": depth}
    else:
        model = RewardModel(small_model("qwen2", torch.float32, seed=4), pooling, generator, ensemble)
        config |= {"model": asdict(model.model.config), "pooling": pooling}
    if trunk != "full":
        config |= {"base": "smol", "base_digest": BASE.digest, "stop_ids": STOPS}
    noisy(model, seed)
    with torch.no_grad():
        model.normalise(model(*batch(TEXTS)[:2]))
    return model, config


KINDS = [(t, p) for t in ("full", "adapters", "frozen") for p in POOLINGS if (t, p) != ("frozen", "attention")]
COMBINED = [Ensemble(), Ensemble(3, "mean"), Ensemble(3, "min"), Ensemble(3, "uncertainty", 0.7)]


@pytest.mark.parametrize(("trunk", "pooling"), KINDS)
def test_a_score_is_the_same_alone_in_company_padded_and_reloaded(trunk, pooling, tmp_path):
    scorers = []
    for seed, ensemble in enumerate(COMBINED):
        model, config = make(trunk, pooling, ensemble, seed)
        model.temperature.fill_(0.8)
        path = checkpoint.save(tmp_path / str(seed), checkpoint.trained_state(model), config)
        loaded = load_reward_model(str(path), "words", base=BASE)
        assert float(loaded.temperature) == pytest.approx(0.8)
        assert trunk == "full" or not any("embed" in name for name in checkpoint.load(path).tensors)
        scorers.append((torch.no_grad()(model.score), loaded.score, open_scorer(str(path), Words(), base=BASE).score))

    @settings(max_examples=15)
    @given(
        scorers=st.sampled_from(scorers),
        rows=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=5),
        extra=st.integers(0, 6),
        padding=st.integers(0, 12),
    )
    def check(scorers, rows, extra, padding):
        texts = [TEXTS[row] for row in rows]
        alone = torch.cat([scorers[0](*batch([text])) for text in texts])
        for score in scorers:
            together = score(*batch(texts, max(map(len, texts)) + extra, padding))
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize(("trunk", "pooling"), KINDS)
def test_prefix_scores_are_the_scores_of_the_texts_cut_there(trunk, pooling, reads):
    """One pass against a pass of every prefix, alone; stop tokens anywhere, in prompts and responses."""
    models = [make(trunk, pooling, ensemble, seed)[0] for seed, ensemble in enumerate(COMBINED)]
    for model in models:
        model.reads = reads

    @settings(max_examples=15, deadline=None)
    @given(model=st.sampled_from(models), seed=st.integers(0, 2**20), rows=st.integers(1, 4), extra=st.integers(0, 3))
    def check(model, seed, rows, extra):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(1, 6, (rows,), generator=generator)
        lengths = prompt + torch.randint(1, 5, (rows,), generator=generator)
        width = int(lengths.max()) + extra
        tokens, t = torch.randint(0, 13, (rows, width), generator=generator), torch.arange(width)
        mask = (t >= prompt[:, None]) & (t < lengths[:, None])
        with torch.no_grad():
            ours = model.prefix_scores(tokens, lengths, mask)
            for row, column in mask.nonzero().tolist():
                start = int(prompt[row]) if reads == "answer" else int(model.stop_ids is not None)
                if column <= start:
                    assert ours[row, column] == 0
                    continue
                cut = tokens[row : row + 1, :column], torch.tensor([column]), mask[row : row + 1, :column]
                torch.testing.assert_close(ours[row, column], model.score(*cut)[0], rtol=1e-5, atol=1e-5)
        assert (ours[~mask] == 0).all()

    check()


@pytest.mark.parametrize(("trunk", "pooling"), KINDS)
def test_autocast_does_not_round_a_score(trunk, pooling):
    """PPO scores under it, and two texts that differ by less than half precision tells apart keep their order."""
    model, _ = make(trunk, pooling, Ensemble(2))
    with torch.autocast("cpu", torch.bfloat16):
        raw = model(*batch(TEXTS)[:2])
    assert raw.dtype == torch.float32 and (raw != raw.bfloat16()).all()


def test_a_checkpoint_of_before_the_ensembles(tmp_path):
    model, config = make("full", "mean", Ensemble())
    old = {name: x for name, x in model.state_dict().items() if "member" not in name and name != "temperature"}
    checkpoint.save(tmp_path / "rm", old, {k: config[k] for k in ("kind", "tokenizer", "model", "pooling")})
    loaded = load_reward_model(str(tmp_path / "rm"), "words")
    assert torch.equal(loaded.score(*batch(TEXTS)), model.score(*batch(TEXTS)).detach())


@pytest.mark.parametrize("changes", [{"trunk": "cut"}, {"pooling": "max"}, {"combine": "median"}], ids=str)
def test_a_checkpoint_from_the_future(tmp_path, changes):
    model, config = make("full", "mean", Ensemble())
    with pytest.raises(ValueError, match="unknown here"):
        restored(config | changes, model.state_dict(), str(tmp_path), "cpu")


# ---- ensembles


@pytest.mark.parametrize("ensemble", COMBINED, ids=str)
def test_members_and_their_combination(ensemble):
    """By the definition, in plain Python; the references end at mean 0 and deviation 1 in every way of combining."""
    model, _ = make("full", "mean", ensemble)
    texts = batch(TEXTS)
    with torch.no_grad():
        raw, members, scores = model(*texts[:2]).double(), model.member_scores(*texts), model.score(*texts)
    assert members.shape == (len(TEXTS), ensemble.members) and scores.shape == (len(TEXTS),)
    single = ensemble.members == 1
    z = raw if single else (raw - raw.mean(0)) / raw.std(0, unbiased=False)
    combined = []
    for row in z.tolist():
        mean = sum(row) / len(row)
        variance = sum((x - mean) ** 2 for x in row) / len(row)
        combined.append({"mean": mean, "min": min(row), "uncertainty": mean - 0.7 * variance}[ensemble.combine])
    combined = torch.tensor(combined, dtype=torch.float64)
    wanted = (combined - combined.mean()) / combined.std(unbiased=False)
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-4, atol=1e-5)
    if ensemble.combine == "mean":
        torch.testing.assert_close(members.mean(1), scores)
    if ensemble.combine == "min":
        torch.testing.assert_close(members.amin(1), scores)


def test_bagged_heads_are_ridge_on_the_drawn_sentences():
    """Against the same fit on the sentences written out as often as they were drawn."""
    rng = np.random.default_rng(0)
    train = torch.from_numpy(rng.normal(size=(30, 2, 3)))
    ratings = train[:, 0, 0] + torch.from_numpy(rng.normal(size=30))
    names = [(1, "mean"), (2, "mean")]
    judged = rated(train, ratings)
    fit = fit_heads(names, judged, judged, (0.5,))[0]
    columns = [names.index(f) for f in fit.features]
    heads = refitted(fit, judged.of(columns), 3, seed=7)
    flat = train[:, columns].flatten(1).numpy()
    x = (flat - flat.mean(0)) / flat.std(0)
    y = ((ratings - ratings.mean()) / ratings.std(unbiased=False)).numpy()
    draws = np.random.default_rng(7)
    for weight, constant in zip(heads.weight, heads.constant):
        rows = np.repeat(np.arange(30), draws.multinomial(30, np.full(30, 1 / 30)))
        p = x.shape[1]
        stacked = np.vstack([np.c_[x[rows], np.ones(30)], np.c_[math.sqrt(30 * 0.5) * np.eye(p), np.zeros(p)]])
        solution = np.linalg.lstsq(stacked, np.concatenate([y[rows], np.zeros(p)]), rcond=None)[0]
        np.testing.assert_allclose(flat @ weight.numpy() + float(constant), x @ solution[:-1] + solution[-1], atol=1e-9)


def rated(features, scores) -> Judged:
    """Answers with scores and without pairs."""
    none = torch.zeros(0)
    return Judged(features, torch.as_tensor(scores), none.long(), none.long(), none, none)


@pytest.mark.parametrize("members", [1, 2])
def test_votes_beside_ratings_by_plain_minimisation(members):
    """The same loss written out row by row, minimised by another method, with an intercept that costs nothing."""
    rng = np.random.default_rng(1)
    train = torch.from_numpy(rng.normal(size=(40, 1, 4)) * [1, 2, 0.5, 3] + 1)
    ratings = train[:, 0, 0] + torch.from_numpy(rng.normal(size=40))
    votes = torch.from_numpy(rng.normal(size=(25, 1, 4)))
    judged = rated(train, ratings)
    fit = fit_heads([(1, "mean")], judged, judged, (0.5,), 1)[0]
    both, ones, pairs = torch.cat([votes, 0 * votes]), torch.ones(25), torch.arange(25)
    cast = Judged(both, torch.full((50,), torch.nan), pairs, pairs + 25, ones, ones)
    heads = refitted(fit, judged, members, 3, cast, vote_coef=2.0)
    x, deviation = train[:, 0], train[:, 0].std(0, unbiased=False)
    y = (ratings - ratings.mean()) / ratings.std(unbiased=False)
    draws = np.random.default_rng(3)
    for weight, constant in zip(heads.weight, heads.constant):
        rows, pairs = (np.arange(n) for n in (40, 25))
        if members > 1:
            rows, pairs = (np.repeat(np.arange(n), draws.multinomial(n, np.full(n, 1 / n))) for n in (40, 25))
        wanted = minimum(x[rows] / deviation, y[rows], votes[pairs, 0] / deviation, 0.5, 2.0)
        torch.testing.assert_close(torch.cat([weight * deviation, constant[None]]), wanted, atol=1e-6, rtol=0)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**20), kind=st.sampled_from(["labels", "pairs", "joint"]), beside=st.booleans())
def test_heads_of_every_objective_by_plain_minimisation(seed, kind, beside):
    """The loss written out answer by answer and pair by pair, for soft labels and weights too, minimised by another method."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(6, 20))
    x = torch.from_numpy(rng.normal(size=(n, 2, 2)) * [[[1], [3]]] + 1)
    scores = rng.integers(0, 2, n).astype(float) if kind == "labels" else rng.normal(size=n)
    scores[:2] = 0, 1
    scores = torch.from_numpy(np.where(rng.random(n) < 0.2, np.nan, scores))
    made = [(i, j) for i in range(n) for j in range(n) if i != j and rng.random() < 0.3] or [(0, 1)]
    winner, loser = torch.tensor(made).T
    p, weight = (torch.from_numpy(rng.uniform(low, 1, len(made))) for low in (0.5, 0.2))
    judged = Judged(x, scores, winner, loser, torch.where(p > 0.9, 1.0, p), weight)
    names, known = [(1, "mean"), (2, "mean")], scores[~scores.isnan()]
    fit = next(f for f in fit_heads(names, judged, judged, (0.5,), 2, kind, 0.7) if len(f.features) == 2)
    votes = judged._replace(features=x.flip(0)) if beside else None
    heads = refitted(fit, judged, 1, 0, votes, 0.5, kind, 0.7)
    flat, deviation, center = x.flatten(1), x.flatten(1).std(0, unbiased=False), x.flatten(1).mean(0)
    z = ((x.flatten(1) - center) / deviation, (x.flip(0).flatten(1) - center) / deviation)
    found = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-18, history_size=30)

    def choices(z) -> torch.Tensor:
        total = 0.0
        for w, l, q, weight_ in zip(*(column.tolist() for column in judged[2:])):
            d = (z[w] - z[l]) @ found[:-1]
            total = total - weight_ * (q * logsigmoid(d) + (1 - q) * logsigmoid(-d))
        return total

    def loss():
        raw = z[0] @ found[:-1] + found[-1]
        value = 0.5 * (found[:-1] ** 2).sum() / 2
        if kind == "labels":
            value = value - sum(logsigmoid(r if s else -r) for r, s in zip(raw, scores) if not s.isnan()) / len(known)
        if kind == "joint":
            y = (scores - known.mean()) / known.std(unbiased=False)
            value = value + 0.7 * sum((r - t) ** 2 / 2 for r, t in zip(raw, y) if not t.isnan()) / len(known)
        if kind != "labels":
            value = value + choices(z[0]) / judged.weight.sum()
        if beside:
            value = value + 0.5 * choices(z[1]) / (len(made) if kind == "pairs" else len(known))
        optimizer.zero_grad()
        value.backward()
        return value

    optimizer.step(loss)
    ours = flat @ heads.weight[0] + heads.constant[0]
    wanted = (z[0] @ found[:-1] + found[-1]).detach()
    if kind == "pairs":
        ours, wanted = ours - ours.mean(), wanted - wanted.mean()
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    if not beside:
        torch.testing.assert_close(heads.weight, fit.weight)
        assert fit.error == pytest.approx(
            float(loss().detach()) - 0.5 * float((found[:-1].detach() ** 2).sum()) / 2, abs=1e-6
        )


def minimum(x, y, d, penalty: float, coef: float):
    """(w, constant) of least loss, by L-BFGS on the definition."""
    found = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def loss():
        w = found[:-1]
        square = ((x @ w + found[-1] - y) ** 2).mean() / 2 + penalty * (w**2).sum() / 2
        value = square + coef * torch.log1p(torch.exp(-(d @ w))).sum() / len(x)
        optimizer.zero_grad()
        value.backward()
        return value

    optimizer.step(loss)
    return found.detach()


# ---- objectives


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


OBJECTIVES = [
    ("regression", Objective(0.5, 2.0)),
    ("labels", Objective()),
    ("pairs", Objective()),
    ("pairs", Objective(label_smoothing=0.1, margin=0.5, center_coef=0.2)),
    ("joint", Objective(0.5, 2.0, joint_coef=0.3, center_coef=0.1)),
    ("joint", Objective(0.5, 2.0, lm_coef=0.25)),
]


def ragged(draws, kind: str, members: int = 2) -> Texts:
    """Prompts with one to five answers each, of which some have a score, and some of whose pairs people compared."""
    sizes = draws.integers(1, 6, int(draws.integers(1, 6)))
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows = len(group)
    tokens, lengths, _ = batch([TEXTS[int(i)] for i in draws.integers(0, ROWS, rows)])
    scores = draws.integers(0, 2, rows).astype(float) if kind == "labels" else draws.normal(size=rows)
    scores = np.where(draws.random(rows) < 0.3, np.nan, scores)
    pairs = [(i, j) for i in range(rows) for j in range(rows) if group[i] == group[j] and i != j]
    pairs = [pair for pair in pairs if draws.random() < 0.4]
    winner, loser = np.array(pairs, np.int64).reshape(-1, 2).T
    facts = (draws.uniform(0.5, 1, len(pairs)), draws.uniform(0, 3, len(pairs)), draws.uniform(0.2, 1, len(pairs)))
    counts = draws.integers(0, 3, (len(sizes), members)).astype(float)
    begins = torch.from_numpy(draws.integers(1, lengths.numpy()))
    arrays = (torch.from_numpy(np.ascontiguousarray(x)) for x in (group, scores, winner, loser, *facts, counts))
    return Texts(tokens, lengths, begins, *arrays)


@functools.cache
def small_reward_model(reads: str) -> RewardModel:
    generator = torch.Generator().manual_seed(0)
    model = RewardModel(small_model("llama"), "mean", generator, Ensemble(2), language=True, reads=reads)
    return model.double().requires_grad_(False)


@pytest.mark.parametrize(("kind", "o"), OBJECTIVES, ids=str)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), reads=st.sampled_from(READS))
def test_losses_by_the_definition(kind, o, seed, reads):
    """One text, one pair, one head, one number at a time, for prompts with any number of answers."""
    model = small_reward_model(reads)
    texts = ragged(np.random.default_rng(seed), kind)
    got = reward_losses(model, texts, kind, o)
    rows = [row[:n][None] for row, n in zip(texts.tokens, texts.lengths)]
    begins = [b if reads == "answer" else 0 for b in texts.begins.tolist()]
    raw = []
    for row, begin in zip(rows, begins):
        pooled = model.model.trunk(row)[0, begin:].mean(0)
        raw.append((model.head.weight @ pooled + model.head.bias).tolist())
    score_loss = pairs_loss = nats = 0.0
    for r, (mine, score) in enumerate(zip(raw, texts.scores.tolist())):
        for m in range(2):
            if not math.isnan(score):
                loss = (mine[m] - (score - o.mean) / o.deviation) ** 2 / 2
                if kind == "labels":
                    loss = -math.log(sigmoid(mine[m] if score else -mine[m]))
                score_loss += float(texts.counts[texts.group[r], m]) * loss / 2
    for w, l, p, gap, weight in zip(
        *(x.tolist() for x in (texts.winner, texts.loser, texts.p, texts.gap, texts.weight))
    ):
        for m in range(2):
            d, p_ = raw[w][m] - raw[l][m] - o.margin * gap, p * (1 - o.label_smoothing) + (1 - p) * o.label_smoothing
            loss = -p_ * math.log(sigmoid(d)) - (1 - p_) * math.log(sigmoid(-d))
            loss += o.center_coef * (raw[w][m] + raw[l][m]) ** 2
            pairs_loss += float(texts.counts[texts.group[w], m]) * weight * loss / 2
    if o.lm_coef:
        for row, begin in zip(rows, begins):
            logprobs = model.model(row)[0].log_softmax(-1)
            own = [-float(logprobs[t - 1, row[0, t]]) for t in range(max(1, begin), row.shape[1])]
            nats += sum(own) / len(own)
    torch.testing.assert_close(
        got, torch.tensor([score_loss, pairs_loss, nats], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    scored = int((~texts.scores.isnan()).sum())
    assert texts.totals().tolist() == [scored, pytest.approx(float(texts.weight.sum())), len(rows)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.integers(1, 4))
def test_parts_of_a_batch_add_up_to_it(seed, size):
    """Cut between prompts anyhow: the same texts, pairs and losses."""
    model, o = small_reward_model("answer"), Objective(0.5, 2.0, margin=0.2, lm_coef=0.1)
    texts = ragged(np.random.default_rng(seed), "joint")
    order = torch.randperm(len(texts.counts), generator=torch.Generator().manual_seed(seed))
    parts = [texts.part(units.sort().values) for units in order.split(size)]
    whole = reward_losses(model, texts, "joint", o)
    torch.testing.assert_close(
        sum(reward_losses(model, part, "joint", o) for part in parts), whole, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(sum(part.totals() for part in parts), texts.totals())


def test_what_an_objective_weighs():
    o = Objective(joint_coef=0.3, lm_coef=0.1)
    found = {kind: coefficients(kind, o).tolist() for kind in ("regression", "labels", "pairs", "joint")}
    assert found == {"regression": [1, 0, 0.1], "labels": [1, 0, 0.1], "pairs": [0, 1, 0.1], "joint": [0.3, 1, 0.1]}


def test_thurstone():
    """Against draws of two raters."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 0.8, 200_000), rng.normal(0.5, 1.5, 200_000)
    got = thurstone(*(np.array([x]) for x in (1.0, 0.5, 0.8, 1.5)))
    assert float(got[0]) == pytest.approx((a > b).mean(), abs=0.005)
    assert thurstone(np.array([1.0, -1.0, 0.0]), np.zeros(3), 0.0, 0.0).tolist() == [1, 0, 0.5]


def test_labels_of_half_of_the_raters(world):
    """Pairs are those of all raters, turned to what this half thinks; ties are gone."""
    data = Examples(world.path / "data/train")
    half, every = SomeAnswers(data, most_pairs=10**6, column="half_a"), SomeAnswers(data, most_pairs=10**6)
    assert half.column("rating").tolist() == data.column("half_a").astype(np.float32).tolist()
    better, worse, gap = (half.column(f"pair_{name}") for name in ("chosen", "rejected", "gap"))
    assert (gap > 0).all() and np.allclose(half.column("half_a")[better] - half.column("half_a")[worse], gap)
    made = made_pairs(data, 200, column="half_a", deviation="rating_std")
    taken = PairLoader(data, 8, seed=1, made=made, column="half_a").batch(0)
    assert torch.allclose(taken.scores[:, 0] - taken.scores[:, 1], taken.gap) and (taken.p >= 0.5).all()
    assert (PairLoader(data, 8, seed=1, made=made_pairs(data, 200)).batch(0).p == 1).all()
    assert every.column("rating").tolist() != half.column("rating").tolist()


# ---- the mean of several


@pytest.mark.parametrize("trunk", ["full", "adapters", "frozen"])
def test_the_mean_of_weights(trunk, tmp_path):
    """In the mean of adapters, what they add to the base is averaged: exactly, although A and B are not."""
    made = [make(trunk, "last", Ensemble(2), seed) for seed in (0, 2, 4)]
    paths = [str(checkpoint.save(tmp_path / str(i), checkpoint.trained_state(m), c)) for i, (m, c) in enumerate(made)]
    config, tensors = average(paths)
    mean = restored(config, tensors, paths[0], "cpu", BASE)
    if trunk == "adapters":
        assert config["lora_rank"] == 9 and config["lora_alpha"] / config["lora_rank"] == 2
        for model in (mean, *(m for m, _ in made)):
            merge(model.model, "reward")
    for name, x in mean.named_parameters():
        theirs = [dict(m.named_parameters())[name].double() for m, _ in made]
        torch.testing.assert_close(x.double(), sum(theirs) / 3, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_averaged(tmp_path):
    made = [make("adapters", "mean", Ensemble(), seed) for seed in (0, 1)]
    paths = [str(checkpoint.save(tmp_path / str(i), checkpoint.trained_state(m), c)) for i, (m, c) in enumerate(made)]
    with pytest.raises(ValueError, match=f"depth is None in {paths[0]} and 1 in {paths[1]}"):
        average(paths)
    checkpoint.save(tmp_path / "lm", {"x": torch.zeros(1)}, {"kind": "lm", "model": asdict(BASE.model.config)})
    with pytest.raises(ValueError, match="a reward model is needed"):
        average([paths[0], str(tmp_path / "lm")])


# ---- the script


def report_of(run) -> dict:
    return json.loads((run / "report.json").read_text())


FROZEN = dict.fromkeys(("batch", "epochs", "warmup", "log_every", "eval_every", "checkpoint_every"))
FROZEN |= {"trunk": "frozen", "depths": 1, "members": 2, "eval_sentences": "none", "combine": "min"}
ADAPTERS = {"trunk": "adapters", "depth": 1, "members": 2, "combine": "min"}


def test_an_adapter_starts_at_the_ridge_heads(world, tmp_path):
    """It starts as no change: without a learning rate the scores are those of the frozen trunk, on every split's own pairs."""
    world.ok("train_rm.py", out=tmp_path / "head", **FROZEN)
    out = world.ok("train_rm.py", out=tmp_path / "still", **ADAPTERS, start=tmp_path / "head", lr=0, epochs=0.3)
    assert "calibration on" in out and "ECE" in out
    still, head = report_of(tmp_path / "still"), report_of(tmp_path / "head")
    assert still["accuracy"] == head["accuracy"] and still["validation"] == head["validation"]
    assert len(still["members"]) == 2 and still["calibration"].keys() >= {"temperature", "before", "after", "pairs"}
    tensors = checkpoint.load(tmp_path / "still").tensors
    assert float(tensors["temperature"]) == pytest.approx(still["calibration"]["temperature"])
    assert "model.layers.0.mlp.up_proj.lora_A.reward" in tensors
    assert not any("embed" in name or "layers.1" in name or name.endswith("proj.weight") for name in tensors)


@pytest.fixture(scope="module", params=["joy", "mess"])
def votes(request, world, tmp_path_factory):
    """Token files of 80 prompts with votes for one of two answers, always the same one."""
    path = tmp_path_factory.mktemp("votes")
    sides = {"chosen": request.param, "rejected": "mess" if request.param == "joy" else "joy"}
    rows = [{"prompt": f"the film number {i} is", **{k: f" a {v}." for k, v in sides.items()}} for i in range(80)]
    (path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(path / "votes.jsonl"), "--tokenizer=data", f"--out={path / 'data'}"]
    done = world.start(["data.prepare", *command]).wait()
    assert (done.code, done.err) == (0, ""), done
    return path / "data"


@pytest.mark.parametrize("trunk", ["full", "frozen"])
def test_votes_beside_the_ratings(world, tmp_path, votes, trunk):
    """What was voted for is preferred on prompts that nobody voted on: whichever of the two, so the ratings do not decide."""
    small = FROZEN | {"members": None, "combine": None} if trunk == "frozen" else {"epochs": 2}
    out = world.ok("train_rm.py", out=tmp_path / "rm", **small, preferences=votes, preference_coef=5)
    found = report_of(tmp_path / "rm")["preferences"]
    assert found["accuracy"] > 0.9 and found["pairs"] > 3 and f"held-out pairs of {votes}" in out
    assert found["trained_on"] + found["pairs"] < 80  # the validation split is neither


@pytest.mark.slow
def test_adapters_their_mean_and_ppo(world, tmp_path):
    """The chain of commands: adapters on half of the raters, their mean, and policies trained on both."""
    runs = [tmp_path / f"adapters{seed}" for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        options = ADAPTERS | {"objective": "joint", "seed": seed, "pooling": "attention", "labels": "half_a"}
        world.ok("train_rm.py", out=run, **options, epochs=0.3)
    assert float(checkpoint.load(runs[0]).tensors["pool.query"].abs().max()) > 0
    names = ("init", "data", "reference_samples", "response_tokens")
    options, mean = dict.fromkeys(name for name in SMALL["train_rm.py"] if name not in names), tmp_path / "mean"
    world.ok("train_rm.py", **options | {"out": mean, "average": f"{runs[0]},{runs[1]}"})
    base = open_pretrained(world.path / "lm")
    model = load_reward_model(str(mean), base.tokenizer.fingerprint, base=base)
    assert report_of(mean)["averaged"] == [str(run) for run in runs] and model.ensemble == Ensemble(2, "min")
    weak = {"weak_reward": "true", "iterations": 1}
    world.ok("train_ppo.py", out=tmp_path / "ppo", reward=mean, **weak)
    world.ok("train_ppo.py", out=tmp_path / "ppo2", reward=runs[0], layout="adapters", **weak)


@pytest.mark.parametrize(("trunk", "pooling"), [k for k in KINDS if k[0] != "frozen"])
def test_it_learns(trunk, pooling):
    """Four pairs by heart, whatever is trained; and the base has not moved."""
    before = {name: x.clone() for name, x in BASE.model.state_dict().items()}
    model, _ = make(trunk, pooling, Ensemble(2))
    tokens, lengths = batch(TEXTS)[:2]
    rows, ones = torch.arange(8), torch.ones(4)
    texts = Texts(
        tokens,
        lengths,
        0 * rows,
        rows // 2,
        rows * torch.nan,
        rows[::2],
        rows[1::2],
        ones,
        ones,
        ones,
        torch.ones(4, 2),
    )
    optimizer, losses = make_optimizer(model, 1e-2), []
    for _ in range(60):
        loss = reward_losses(model, texts, "pairs", Objective())[1] / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 < losses[0]
    assert all(torch.equal(x, before[name]) for name, x in BASE.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"trunk": "adapters", "depth": 1, "members": 3, "combine": "uncertainty"},
        {"members": 2, "objective": "joint", "lm_coef": 0.1, "center_coef": 0.01},
        {"trunk": "adapters", "objective": "pairs", "pooling": "attention", "lm_coef": 0.1},
    ],
    ids=str,
)
def test_two_processes_train_the_same(world, tmp_path, options):
    options = options | {"epochs": 0.2 if "objective" in options else 1, "log_every": 1, "eval_every": 4}
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, ranks in zip(runs, (0, 2)):
        done = world.together(world.command("train_rm.py", out=run, **options), ranks)
        assert done.code == 0, done
    rows = [lines(run / "metrics.jsonl") for run in runs]
    assert len(rows[0]) == len(rows[1]) > 2
    for a, b in zip(*rows):
        assert a["loss/train"] == pytest.approx(b["loss/train"], rel=1e-3, abs=1e-5)
    ours, theirs = (checkpoint.load(run).tensors for run in runs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"margin": 1}, ("--margin has no effect", "objective is regression")),
        ({"joint_coef": 2, "objective": "pairs"}, ("--joint_coef has no effect", "objective is pairs")),
        ({"objective": "labels"}, ("other scores than 0 and 1", "--objective=regression")),
        ({"lora_rank": 4}, ("--lora_rank", "no effect", "--trunk=full")),
        ({"combine": "min"}, ("--combine=min", "--members=1")),
        ({"members": 2, "uncertainty_coef": 1}, ("--uncertainty_coef", "--combine=mean")),
        ({"objective": "pairs", "soft_labels": "true", "label_smoothing": 0.1}, ("smooth twice",)),
        ({"objective": "pairs", "soft_labels": "true", "labels": "half_b"}, ("spread of all raters", "half_b")),
        ({"trunk": "adapters", "depth": 9}, ("--depth=9", "2 layers")),
        ({"trunk": "adapters", "depth": 1, "lm_coef": 1}, ("--lm_coef", "--depth=1")),
        ({"trunk": "adapters", "depth": 1, "start": "rm"}, ("--start=rm", "base_digest")),
        ({"preference_coef": 2}, ("--preference_coef", "no effect", "--preferences=none")),
        ({"preference_batch": 2}, ("--preference_batch", "no effect", "--preferences=none")),
        ({"average": "rm,rm"}, ("no effect", "--average=rm,rm")),
        ({"average": "rm"}, ("two runs",)),
    ],
    ids=str,
)
def test_options_that_do_not_fit(world, tmp_path, options, words):
    refused(world.run("train_rm.py", out=tmp_path / "out", **options), *words)
    assert not (tmp_path / "out").exists()
