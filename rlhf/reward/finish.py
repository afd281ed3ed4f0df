"""What every reward model gets after its training: a scale, a temperature, and a report of what it knows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.baselines import GAPS, accuracy, baselines, length_scores, pair_clusters
from data.examples import Examples
from data.judge import own_judge
from data.loader import PromptBatch, answered, drawn, in_order, prompts_of
from data.pairs import SomeAnswers
from model.generate import Sampling, generate, row_uniforms
from rlhf.calibration import fit_temperature, wilson_interval
from rlhf.infra.distributed import Dist
from rlhf.infra.run import peak_memory_gb
from rlhf.lm.pretrained import Pretrained
from rlhf.reward.model import Normalised
from rlhf.statistics import Estimate, cluster_bootstrap, pair_calibration, win_rate

# Independent pairs that a temperature is fitted on. Simulated (margins of deviation 1.5; tests/test_calibration.py): on 64
# it lowers the cross-entropy of other pairs wherever 1 is wrong by more than a factor of 1.4 (.04 nats at 2), and costs
# .009 nats where 1 is right; on 32 it costs .02, on 16 .06.
FEWEST_PAIRS = 64


class References(NamedTuple):
    """Prompts of the samples from the base whose scores get mean 0 and deviation 1 (Ziegler et al. 2019)."""

    prompts: PromptBatch
    response_tokens: int  # longest sample
    seed: int


def references_from(
    train: Examples, count: int, seed: int, prompt_tokens: int | None, response_tokens: int, **how
) -> References:
    """`count` prompts of the training split, or beginnings of its texts, see `prompts_of`; some twice where there are fewer."""
    loader = prompts_of(train, 1, seed, starts=prompt_tokens, response_tokens=response_tokens, **how)
    if not len(loader):
        raise ValueError(f"{train} leaves no prompt for the reference samples: {loader.summary}")
    found = drawn(loader, np.arange(len(loader)), count, seed)
    places = torch.arange(count)  # each sample has its own random numbers
    rows = places % len(found.rows)
    return References(PromptBatch(found.prompts[rows], found.prompt_lengths[rows], places), response_tokens, seed)


@torch.no_grad()
def raw_scores(reward_model: Normalised, base: Pretrained, data: SomeAnswers, dist: Dist, batch: int = 64) -> Tensor:
    """Raw scores of every row (N, M), shared out over the ranks and added up again."""
    scores = torch.zeros(len(data), reward_model.ensemble.members, device=dist.device)
    for rows in batches_of(data, batch)[dist.rank :: dist.world]:
        scores[rows] = reward_model(*(x.to(dist.device) for x in read(data, rows, base.model.config.context)))
    return dist.sum(scores)


def batches_of(data: SomeAnswers, batch: int) -> list[np.ndarray]:
    """All rows once: answers to one prompt behind one another, since what they share is read once, then by length."""
    lengths, prompts = data.lengths(), data.data.prompt_of(data.answers)
    longest = np.zeros(data.data.prompts, np.int64)
    np.maximum.at(longest, prompts, lengths)
    order = np.lexsort((np.arange(len(data)), prompts, longest[prompts]))
    return [order[rows] for rows in in_order(len(data), batch)]


def read(data: SomeAnswers, rows: np.ndarray, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (R, T), lengths (R,) and prompt lengths (R,) of these rows; what is too long begins later, see `answered`."""
    answers = data.answers[rows]
    return answered(data.data, answers, context - data.data.answer_lengths(answers))


@torch.no_grad()
def normalise_and_calibrate(
    reward_model: Normalised, base: Pretrained, references: References, raw: Tensor, validation: SomeAnswers, dist: Dist
) -> str | None:
    """Gain and bias from the references, temperature from the pairs of the validation split, whose raw scores are given.

    Returns why no temperature could be fitted, if so; it is 1 then.
    """
    prompts = references.prompts
    scores = torch.zeros(len(prompts.rows), raw.shape[1], device=dist.device)
    mine = slice(dist.rank, None, dist.world)
    if len(prompts.rows[mine]):
        share = references._replace(prompts=PromptBatch(*(x[mine] for x in prompts)))
        scores[mine] = reference_scores(reward_model, base, share)
    reward_model.normalise(dist.sum(scores))
    temperature, problem = temperature_or_one(
        pair_margins(reward_model, raw, validation), independent_pairs(validation)
    )
    reward_model.temperature.fill_(temperature)
    return problem


def independent_pairs(data: SomeAnswers) -> int:
    """How many pairs have no answer or prompt in common: those of one prompt count once, so do those of one text."""
    clusters = pair_clusters(data)
    return len(np.unique(clusters)) // clusters.shape[1]


def temperature_or_one(margins: Tensor, independent: int) -> tuple[float, str | None]:
    """The temperature that fits these margins (pairs,) of people's choices; or 1, and why none does."""
    if independent < FEWEST_PAIRS:
        few = f"{len(margins)} validation pairs, {independent} of them independent, are too few to fit one"
        return 1.0, f"{few}: at least {FEWEST_PAIRS} are needed"
    try:
        return fit_temperature(margins, torch.ones_like(margins)), None
    except ValueError as problem:  # too good or too bad for one: a finding about the model, not a reason to lose it
        return 1.0, str(problem)


def reference_scores(reward_model: Normalised, base: Pretrained, references: References) -> Tensor:
    """Raw scores of continuations sampled from the base model: (N, M)."""
    (prompts, lengths, rows), longest, seed = references
    device = base.model.embed_tokens.weight.device
    uniforms = row_uniforms(seed, 0, rows.tolist(), longest)
    prompts, lengths = prompts.to(device), lengths.to(device)
    samples = generate(base.model, prompts, lengths, Sampling(longest, base.stop_ids, base.tokenizer.pad), uniforms)
    return reward_model(samples.tokens, samples.lengths, lengths)


def pair_margins(reward_model: Normalised, raw: Tensor, data: SomeAnswers) -> Tensor:
    """Score of the better rated text minus that of the other, for every pair of the split: (pairs,) float64."""
    scores = reward_model.combined(raw).cpu().double()
    chosen, rejected = pair_rows(data)
    return scores[chosen] - scores[rejected]


def pair_rows(data: SomeAnswers) -> list[Tensor]:
    """Which rows are the better and the other text of every pair: (pairs,) int64 each."""
    return [torch.from_numpy(data.column(f"pair_{side}").astype(np.int64)) for side in ("chosen", "rejected")]


# the report


def agreement(reward_model: Normalised, base: Pretrained, train: SomeAnswers, test: SomeAnswers, dist: Dist) -> dict:
    """How often the reward model prefers what people chose, on the held-out pairs of --preferences; null where none is."""
    if not test.pairs:
        return {"accuracy": None, "low": None, "high": None, "pairs": 0, "trained_on": train.pairs}
    margins = pair_margins(reward_model, raw_scores(reward_model, base, test, dist), test)
    right = float((margins > 0).double().sum() + 0.5 * (margins == 0).double().sum())
    low, high = wilson_interval(right, len(margins))
    found = {"accuracy": right / len(margins), "low": low, "high": high, "pairs": len(margins)}
    return found | {"trained_on": train.pairs}


def calibration(reward_model: Normalised, raw: Tensor, data: SomeAnswers, problem: str | None) -> dict:
    """ECE and Brier score on the pairs of a split, at temperature 1 and at the fitted one, with 95% intervals.

    See `pair_calibration`; the intervals are bootstrapped over sentences, which the pairs share.
    """
    margins, temperature = pair_margins(reward_model, raw, data), float(reward_model.temperature)
    report = {"temperature": temperature, "pairs": len(margins), "problem": problem, "before": {}, "after": {}}
    for when, t in (("before", 1.0), ("after", temperature)):
        found = pair_calibration(margins.numpy(), t, pair_clusters(data))
        for what in ("ece", "brier"):
            value, low, high = map(float, found[what])
            report[when] |= {what: value, f"{what}_interval": [low, high]}
    return report


def report_of(
    reward_model: Normalised, raw: Sequence[Tensor], files: Sequence[SomeAnswers], data: str, problem: str | None
) -> dict:
    """What report.json says of the model; raw are the scores (N, M) of the validation and of the test rows in `files`."""
    train, validation, test = files
    scores = [reward_model.combined(x).cpu().numpy() for x in raw]
    members = [accuracy(x.cpu().numpy(), test) for x in raw[1].T]
    return {
        "accuracy": accuracy(scores[1], test),
        **beside_length(scores[1], train, test),
        "validation": accuracy(scores[0], validation),
        "members": members if len(members) > 1 else [],
        "calibration": calibration(reward_model, raw[1], test, problem),
        "baselines": baselines(train, test, own_judge(data)),
        "sentences": {"train": len(train), "validation": len(validation), "test": len(test)},
        "pairs": {"validation": validation.pairs, "test": test.pairs},
        "peak_memory_gb": peak_memory_gb(raw[0].device),
    }


def beside_length(scores: np.ndarray, train: SomeAnswers, test: SomeAnswers) -> dict:
    """The accuracy on all test pairs and what it has over that of length alone, with 95% intervals (see `pair_clusters`)."""
    if not test.pairs:
        return {}
    a, b = test.column("pair_chosen"), test.column("pair_rejected")
    right, length = (win_rate(x[a], x[b]) for x in (scores, length_scores(train, test)))
    found = {}
    for name, x in (("accuracy_all", right), ("over_length", right - length)):
        with np.errstate(invalid="ignore"):  # a resample without any pair
            ((low, high),) = cluster_bootstrap(lambda w, x=x: w @ x / w.sum(), pair_clusters(test))
        found[name] = {"value": float(x.mean()), "low": float(low), "high": float(high), "n": len(x)}
    return found


def in_words(report: dict, preferences: str | None) -> str:
    """The report as a table and two lines."""
    lines = [accuracy_table(report)]
    if "accuracy_all" in report:
        ours, over = (
            Estimate(*(report[k][x] for x in ("value", "low", "high"))) for k in ("accuracy_all", "over_length")
        )
        lines.append(f"{report['accuracy_all']['n']} test pairs: accuracy {ours}, over length alone {over:+.3f}")
    lines.append(calibration_line(report["calibration"]))
    if (found := report.get("preferences")) and not found["pairs"]:
        lines.append(f"held-out pairs of {preferences}: none, {found['trained_on']} to learn from")
    elif found:
        interval = Estimate(found["accuracy"], found["low"], found["high"])
        learned = f"{interval} of {found['pairs']}, {found['trained_on']} to learn from"
        lines.append(f"held-out pairs of {preferences}: {learned}")
    return "\n".join(lines)


def accuracy_table(report: dict) -> str:
    """Pairwise accuracy on the test split, one line per scorer, one column per rating gap."""
    rows = {"reward model": report["accuracy"], **report["baselines"]}
    gaps = [gap for gap in GAPS if report["accuracy"][gap] is not None and not math.isnan(report["accuracy"][gap])]
    head = f"{'test accuracy, rating gap':<28}" + "".join(f"{gap:>8}" for gap in gaps)
    known = {name: [math.nan if row[gap] is None else row[gap] for gap in gaps] for name, row in rows.items()}
    lines = [f"{name:<28}" + "".join(f"{x:8.3f}" for x in row) for name, row in known.items()]
    return "\n".join([head, *lines])


def calibration_line(report: dict) -> str:
    def shown(what: str) -> str:
        before, after = report["before"], report["after"]
        return f"{before[what]:.3f} -> {Estimate(after[what], *after[f'{what}_interval'])}"

    line = f"calibration on {report['pairs']} test pairs: ECE {shown('ece')}, Brier {shown('brier')}"
    return f"{line}, temperature {report['temperature']:.3f}" + (f" ({report['problem']})" if report["problem"] else "")
