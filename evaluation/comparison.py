"""Several models on the same prompts, with the same random numbers: who is better, and can the reward still tell?

Every measurement is a number per prompt, and every interval is bootstrapped over prompts.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from evaluation.words import Table, as_json, markdown_table, number, show
from rlhf.statistics import (
    ELO,
    bootstrap_weights,
    bradley_terry,
    cluster_bootstrap,
    length_controlled_win_rate,
    pair_calibration,
    paired_bootstrap,
    win_rate,
)


def mean_and_interval(x: np.ndarray) -> dict[str, float]:
    """Mean over prompts and its 95% bootstrap interval."""
    return as_json(x.mean(), *paired_bootstrap(x))


def compare(ours: dict, theirs: dict) -> dict:
    """What one model gains over another: rewards, judgements (where there are any) and lengths in tokens, (P,) each, of the
    same prompts.
    """
    both = [k for k in ("judge", "reward") if k in ours and k in theirs]
    found = {f"{k}_gain": mean_and_interval(ours[k] - theirs[k]) for k in both}
    found |= {f"win_rate_{k}": mean_and_interval(win_rate(ours[k], theirs[k])) for k in both}
    if "judge" in both:
        wins, longer = win_rate(ours["judge"], theirs["judge"]), ours["length"] - theirs["length"]
        controlled, *resampled = length_controlled_win_rate(wins, longer, bootstrap_weights(len(wins)))
        found["win_rate_judge_length_controlled"] = as_json(controlled, *np.quantile(resampled, [0.025, 0.975]))
    return found


def pairwise(results: dict[str, dict]) -> list[dict]:
    """Every later model against every earlier one, the base first: [{"a": later, "b": earlier, ...}]."""
    return [{"a": a, "b": b, **compare(results[a], results[b])} for b, a in itertools.combinations(results, 2)]


def elo(results: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Bradley-Terry strengths by the judge's wins in all pairs of models, in Elo points above the first."""
    names = [*results]
    first, second = np.array([*itertools.combinations(range(len(names)), 2)]).T
    wins = np.stack(
        [win_rate(results[names[i]]["judge"], results[names[j]]["judge"]) for i, j in zip(first, second)], 1
    )
    weights = bootstrap_weights(len(wins))  # (1 + B, P); all pairings of a prompt are drawn together
    points = ELO * bradley_terry(first, second, weights @ wins, len(wins))  # (1 + B, models)
    low, high = np.quantile(points[1:], [0.025, 0.975], axis=0)
    return {name: as_json(x, a, b, "value") for name, x, a, b in zip(names, points[0], low, high)}


def ranking_of_own_samples(
    rewards: dict[str, np.ndarray], temperatures: dict[str, float], judge: np.ndarray, resamples: int = 1000
) -> dict:
    """Do rewards still prefer what the judge prefers, among several samples of one model for one prompt?

    rewards {name: (P, n)} and judge (P, n) of the same samples, n >= 2. All pairs of a prompt count, but for those where
    the judge ties. Accuracy, and calibration of sigmoid(difference / temperature), of every reward; "gain": accuracy of
    the first reward minus that of each other.
    """
    i, j = np.triu_indices(judge.shape[1], 1)
    better = np.sign(judge[:, i] - judge[:, j])  # (P, pairs of a prompt)
    prompt, pair = np.nonzero(better)
    if not len(prompt):
        nothing = dict.fromkeys(("accuracy", "ece", "brier"), as_json(*[np.nan] * 3))
        found = {name: {"pairs": 0, **nothing, "temperature": temperatures[name]} for name in rewards}
        return found | {"gain": {name: nothing["accuracy"] for name in [*rewards][1:]}}
    clusters, found, right = prompt[:, None], {}, {}
    for name, x in rewards.items():
        margins = (better * (x[:, i] - x[:, j]))[prompt, pair]
        calibration = pair_calibration(margins, temperatures[name], clusters, resamples=resamples)
        right[name] = win_rate(margins, np.zeros(len(margins)))
        found[name] = {
            "pairs": len(margins),
            "accuracy": clustered_mean(right[name], clusters, resamples),
            **{measure: as_json(*calibration[measure]) for measure in ("ece", "brier")},
            "temperature": temperatures[name],
        }
    first, *others = right
    found["gain"] = {name: clustered_mean(right[first] - right[name], clusters, resamples) for name in others}
    return found


def clustered_mean(x: np.ndarray, clusters: np.ndarray, resamples: int) -> dict[str, float]:
    ((low, high),) = cluster_bootstrap(lambda w: w @ x / w.sum(), clusters, resamples)
    return as_json(x.mean(), low, high)


COLUMNS = {  # of the results table: title -> key, format
    "judge": ("judge", None),
    "reward": ("reward", None),
    "KL, nats": ("kl", ".2f"),
    "distinct-3": ("distinct_3", ".3f"),
    "length": ("length", ".1f"),
    "ends": ("eos_rate", ".2f"),
    "ppl of human text": ("perplexity_of_human_text", ".1f"),
    "ppl for base": ("perplexity_for_base", ".1f"),
}


LEGEND = (
    "[95% intervals over prompts]; KL: nats per answer from the base; distinct-3: share of all trigrams that differ; length "
    "in tokens;\nends: share that ended by itself; ppl of human text: the model's perplexity; ppl for base: the answers' under "
    "the base."
)


def results_table(rows: dict[str, dict]) -> Table:
    """Every model, and best-of-n of the base, of which reward, judge and a bound of the KL alone are known."""

    def cell(row: dict, key: str, form: str | None) -> str:
        if row.get(key) is None:
            return "-"
        bound = "<= " if key == "kl" and "distinct_3" not in row else ""  # best-of-n: an analytic bound
        return bound + (show(row[key]) if form is None else f"{row[key]:{form}}")

    known = {title: column for title, column in COLUMNS.items() if any(column[0] in row for row in rows.values())}
    cells = [[name, *(cell(row, *column) for column in known.values())] for name, row in rows.items()]
    return Table(["model", *known], cells)


def pairs_table(pairs: Sequence[dict]) -> Table:
    columns = {
        "judge_gain": "judge, gain",
        "win_rate_judge": "wins, judge",
        "win_rate_judge_length_controlled": "wins at equal length, judge",
        "win_rate_reward": "wins, reward",
    }
    known = {key: title for key, title in columns.items() if any(key in x for x in pairs)}
    rows = [[x["a"], x["b"], *(show(x.get(key)) for key in known)] for x in pairs]
    return Table(["model", "against", *known.values()], rows)


def elo_line(points: dict[str, dict]) -> str:
    shown = [f"{name} {show(x, '+.0f')}" for name, x in points.items()]
    return "Elo points above the base, by the judge's wins (Bradley-Terry): " + ", ".join(shown[1:])


def own_samples_table(found: dict[str, dict]) -> str:
    head = ["samples of", "reward", "pairs", "as the judge", "ECE", "Brier", "gain of the first"]
    rows = [
        [model, name, str(x["pairs"]), *(show(x[key]) for key in ("accuracy", "ece", "brier")), gain]
        for model, rewards in found.items()
        for name, x in rewards.items()
        if name != "gain"
        for gain in [show(rewards["gain"][name], "+.3f") if name in rewards["gain"] else "-"]
    ]
    what = "Pairs of samples of one model for one prompt: how often a reward prefers what the judge prefers."
    return f"{what}\n\n{markdown_table(head, rows)}"


GATE = {True: "promoted", False: "refused"}  # what iterate.py did with the policy of a round


def rounds_table(rounds: Sequence[dict]) -> Table:
    """The rounds of iterate.py, after a row 0 for the models that it began with."""
    columns = {
        "round": lambda x: str(x["round"]),
        "gate": lambda x: GATE[x["promoted"]],
        "pairs decided": lambda x: str(x["votes"]),
        "judge": lambda x: show(x["judge"]),
        "gain over the best before": lambda x: show(x["gain_over_previous"]),
        "KL, nats": lambda x: f"{x['kl']:.2f}",
        "reward model, gap > 1": lambda x: number(x["rm"]["accuracy_gap1"]),
        "on own samples": lambda x: show(x["rm"]["on_own_samples"]["accuracy"]),
        "round 0's there": lambda x: number(x["rm"]["on_own_samples_round_0"]["accuracy"]["mean"]),
        "gain there": lambda x: show(x["rm"]["gain_on_own_samples"], "+.3f"),
        "seconds": lambda x: f"{sum(x['seconds'].values()):.0f}",
    }
    rows = [[cell(x) for cell in columns.values()] for x in rounds]
    if rounds:
        began = {"round": "0", "pairs decided": "0", "KL, nats": "0", "judge": show(rounds[0]["judge_base"])}
        began["reward model, gap > 1"] = number(rounds[0]["rm"]["accuracy_gap1_round_0"])
        rows.insert(0, [began.get(name, "-") for name in columns])
    return Table([*columns], rows)
