"""From metrics.jsonl, run.json and samples.jsonl to what is wrong with a PPO run: docs/curves.md as a function.

Thresholds stand between what healthy and broken runs of a tiny model show (tests/test_doctor.py makes both).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlhf.infra.files import read_json
from rlhf.infra.healthy import FIRST, HEALTHY, TOLERANCE, mean

FEW_ROWS, FEW_SAMPLES = FIRST, 16  # below these nothing is said


class Finding(NamedTuple):
    """One thing that is wrong."""

    name: str
    evidence: str  # the numbers
    cause: str
    option: str  # what to try

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}. {self.cause}. Try {self.option}."


class Facts:
    """The columns of the metrics, by name; a value that was not finite is NaN."""

    def __init__(self, rows: Sequence[dict], options: dict, samples: Sequence[dict]):
        self.rows, self.options, self.samples = rows, options, samples

    def column(self, name: str) -> np.ndarray:
        """(rows,); empty where a row lacks it."""
        if any(name not in row for row in self.rows):
            return np.empty(0)
        return np.array([np.nan if row[name] is None else row[name] for row in self.rows], dtype=float)

    def start(self, name: str) -> float:
        return mean(self.column(name)[:FIRST])

    def end(self, name: str) -> float:
        return mean(self.column(name)[-FIRST:])

    def sample_scores(self) -> np.ndarray:
        return np.array([row["score"] for row in self.samples if is_number(row.get("score"))], dtype=float)


def is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def diagnose(
    rows: Sequence[dict], options: dict, samples: Sequence[dict] = (), stops: Sequence[Finding] = ()
) -> list[Finding]:
    """What is wrong with the run, the likeliest first; [] for a healthy one, and for one too short to tell.

    rows: of metrics.jsonl; options: run.json; samples: of samples.jsonl, which alone show what the reward pays for; stops:
    what the run itself has noticed, see `stops_of`.
    """
    if len(rows) < FEW_ROWS:
        return [*stops]
    facts, found = Facts(rows, options, samples), [*stops]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a column that is NaN all the way down
        for look in LOOKS:  # a cause explains away the symptoms below it
            if not any(finding.name in EXPLAINED.get(look, ()) for finding in found):
                found += look(facts)
    return found


def stops_of(run: str | Path) -> list[Finding]:
    """The brakes that a run has met: steps that bad numbers made impossible (OUT/bad), and max_kl (report.json)."""
    room, report = Path(run) / "bad", Path(run) / "report.json"
    culprits = {}
    for file in sorted(room.glob("*.json")):
        culprit = read_json(file).get("culprit")
        culprits[file] = culprit if isinstance(culprit, dict) else {}
    found = []
    for file, culprit in [*culprits.items()][-1:]:
        same = sum(x.get("formula") == culprit.get("formula") for x in culprits.values())
        found.append(
            Finding(
                "bad numbers",
                f"{len(culprits)} skipped steps are stored, {same} for {culprit.get('formula')}; the last: "
                f"{culprit.get('words')}",
                str(culprit.get("cause")),
                f"python -m rlhf.replay {file.with_suffix('.safetensors')}",
            )
        )
    brake = read_json(report).get("brake") if report.exists() else None
    if isinstance(brake, dict):
        one = brake.get("mean_of", 1) == 1  # a run may be older than the average
        was = "was" if one else f"and those before it, {brake['mean_of']} together, were on average"
        far = brake.get("objective/kl")
        far = f"{far:.2f}" if isinstance(far, float) else far
        found.append(
            Finding(
                f"{brake.get('name')} reached",
                f"the policy after {brake.get('iteration')} iterations {was} {far} nats from the reference, above "
                f"{brake.get('limit')}; the one after {brake.get('restored')} was kept",
                "The bound did its work; a policy that jumps over it in few iterations learns too fast",
                "a smaller --lr or a larger --kl_coef, to come further within the bound",
            )
        )
    return found


def constant_reward(facts: Facts) -> Iterator[Finding]:
    scores = np.concatenate([facts.column("objective/scores"), facts.sample_scores()])
    if len(scores) and np.ptp(scores) <= 1e-6 * (1 + abs(scores[0])):
        yield Finding(
            "constant reward",
            f"every response of all {len(facts.rows)} iterations scored {scores[0]:.4g}",
            "The reward tells no response from another, so only noise and the KL penalty are learned",
            "--reward=... another one; python evaluate.py rm --model=... says whether a reward model ranks anything",
        )


def no_learning(facts: Facts) -> Iterator[Finding]:
    approxkl, kl, lr = (facts.column(name) for name in ("policy/approxkl", "objective/kl", "lr"))
    still = len(approxkl) and np.nanmax(np.abs(approxkl)) == 0 and np.nanmax(np.abs(kl)) < 1e-3
    if still or len(lr) and np.nanmax(lr) == 0:
        yield Finding(
            "lr 0",
            f"KL to the reference {np.nanmax(np.abs(kl)):.2g} nats at most in {len(kl)} iterations, approxkl 0 in every "
            f"update, gradient norm {facts.end('policy/grad_norm'):.2g}, lr {np.nanmax(lr) if len(lr) else 0:.2g}",
            "No update moves the policy: the learning rate is 0, or far too small for the weights' precision",
            "--lr=3e-4",
        )


def clip_range(facts: Facts) -> Iterator[Finding]:
    clipfrac, approxkl = (facts.column(f"policy/{name}") for name in ("clipfrac", "approxkl"))
    if len(clipfrac) and np.nanmedian(clipfrac) > HEALTHY["policy/clipfrac"].high and np.nanmedian(approxkl) < 1e-2:
        yield Finding(
            "clip 0",
            f"{np.nanmedian(clipfrac):.0%} of the tokens are clipped in the median iteration, though old and new policy are "
            f"{np.nanmedian(approxkl):.1e} nats per token apart; --clip is {facts.options.get('clip')}",
            "The clip range is so small that any movement leaves it: half of the gradient is thrown away",
            "--clip=0.2",
        )


def untrained_critic(facts: Facts) -> Iterator[Finding]:
    explained, values = facts.column("value/explained_var"), facts.column("value/mean")
    needed = facts.options.get("estimator", "gae") == "gae" and facts.options.get("critic") != "none"
    if needed and len(values) and np.all(values == 0) and np.all(explained == 0):
        yield Finding(
            "value_coef 0",
            f"values are exactly 0, and explained_var 0.0, in all {len(values)} iterations; "
            f"--value_coef is {facts.options.get('value_coef')}",
            "The critic is never trained: advantages are the raw returns, and noisy",
            "--value_coef=0.5, or no critic at all: --estimator=rloo --samples_per_prompt=4",
        )


def no_penalty(facts: Facts) -> Iterator[Finding]:
    coef, kl = facts.column("objective/kl_coef"), facts.column("objective/kl")
    if len(coef) and np.nanmax(np.abs(coef)) == 0:
        yield Finding(
            "kl 0",
            f"kl_coef is 0 in all iterations; KL to the reference went to {mean(kl[-FIRST:]):.1f} nats, entropy from "
            f"{facts.start('objective/entropy'):.1f} to {facts.end('objective/entropy'):.1f}, distinct_2 from "
            f"{facts.start('response/distinct_2'):.2f} to {facts.end('response/distinct_2'):.2f}",
            "Nothing holds the policy near the reference: it ends at whatever the reward overrates",
            "--kl_coef=0.1, and --max_kl=10 as a bound",
        )


def large_steps(facts: Facts) -> Iterator[Finding]:
    early = facts.column("policy/approxkl")[: max(5, len(facts.rows) // 3)]
    if len(early) and np.nanmax(early) > 0.4:
        yield Finding(
            "lr too large",
            f"one iteration moved the policy by {np.nanmax(early):.2g} nats per token, {facts.start('policy/clipfrac'):.0%} "
            f"of its tokens were clipped, KL to the reference is {facts.end('objective/kl'):.1f} nats and entropy went from "
            f"{facts.start('objective/entropy'):.1f} to {facts.end('objective/entropy'):.1f}",
            "The steps are too large: what the policy knew is overwritten before the reward is found",
            f"--lr={facts.options.get('lr', 3e-4)} / 10 to / 100, more --minibatches, --target_approxkl=0.05",
        )


def length_reward(facts: Facts) -> Iterator[Finding]:
    rows = [row for row in facts.samples if is_number(row.get("score")) and isinstance(row.get("response"), str)]
    if len(rows) < FEW_SAMPLES:
        return
    scores = [row["score"] for row in rows]
    lengths = {
        "characters": [len(row["response"]) for row in rows],
        "words": [len(row["response"].split()) for row in rows],
        "tokens": [len(row.get("tokens") or ()) for row in rows],
    }
    unit, r = max(((unit, correlation(scores, x)) for unit, x in lengths.items()), key=lambda pair: abs(pair[1]))
    if abs(r) > 0.95:
        yield Finding(
            "length reward",
            f"over {len(rows)} samples the score and the number of {unit} correlate by {r:+.2f}; length went from "
            f"{facts.start('response/length'):.1f} to {facts.end('response/length'):.1f} tokens",
            f"The reward pays for {'long' if r > 0 else 'short'} responses and for nothing else",
            "--reward=... another one: train_rm.py's report says what length alone is worth",
        )


def small_penalty(facts: Facts) -> Iterator[Finding]:
    kl, start, end = facts.end("objective/kl"), facts.start("response/distinct_2"), facts.end("response/distinct_2")
    if kl > HEALTHY["objective/kl"].high and end < HEALTHY["response/distinct_2"].low * start:
        yield Finding(
            "kl_coef too small",
            f"KL to the reference is {kl:.1f} nats, and distinct_2 fell from {start:.2f} to {end:.2f}",
            "The policy repeats what the reward overrates",
            f"a --kl_coef four to ten times {facts.options.get('kl_coef')}, --max_kl=10, an earlier checkpoint",
        )


def random_reward(facts: Facts) -> Iterator[Finding]:
    scores, kl = facts.column("objective/scores"), facts.end("objective/kl")
    seen: dict[tuple, list[float]] = {}
    for row in facts.samples:
        if is_number(row.get("score")):
            seen.setdefault((row.get("prompt"), row.get("response")), []).append(row["score"])
    disagree = sum(max(x) - min(x) > 1e-3 * (1 + abs(x[0])) for x in seen.values())
    explained = facts.end("value/explained_var")
    has_critic = np.any(facts.column("value/mean") != 0)
    t = trend(scores)
    if disagree or len(scores) >= 10 and t < 2 and kl > 0.15 and not (has_critic and explained > 0.01):
        same = f"{disagree} texts got different scores at different times; " if disagree else ""
        critic = f", and the critic explains {explained:.1%} of the returns" if has_critic else ""
        yield Finding(
            "random reward",
            f"{same}scores went from {facts.start('objective/scores'):.2f} to {facts.end('objective/scores'):.2f} (trend of "
            f"{t:.1f} standard errors) while the policy moved by {kl:.2f} nats{critic}",
            "The score has nothing to do with the response that the policy could learn",
            "--reward=... another one; python evaluate.py rm --model=... says whether a reward model ranks anything",
        )


def sampler_mismatch(facts: Facts) -> Iterator[Finding]:
    """Of the largest difference in float32; in half precision of the mean: there one rare token alone may be nats away."""
    precision = facts.options.get("precision", "fp32")
    half = None if precision == "fp32" else TOLERANCE.get(precision)
    gap = facts.column("rollout/logprob_diff_max" if half is None else "rollout/logprob_diff_mean")
    # in float32 ten times what the check before the first update allows: here every later policy counts
    limit, what = (10 * TOLERANCE["fp32"], "by up to") if half is None else (half, "on average by")
    if len(gap) and np.nanmax(gap) > limit:
        yield Finding(
            "sampler and trainer disagree",
            f"the log-prob of a token differs {what} {np.nanmax(gap):.2g} nats, where {limit:g} is the most that rounding does",
            "The ratios of PPO are wrong: a bug in a cache, a mask, a position or a kernel",
            "--precision=fp32; where it stays, no option helps: python -m rlhf.check finds it",
        )


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    a, b = np.array(a, dtype=float), np.array(b, dtype=float)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def trend(y: np.ndarray) -> float:
    """Slope of the least-squares line in its standard errors: above 2 the curve rises."""
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = x @ (y - y.mean()) / (x @ x)
    rest = y - y.mean() - slope * x
    error = np.sqrt(rest @ rest / max(1, len(y) - 2) / (x @ x))
    return float(slope / error) if error > 0 else 0.0


LOOKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    sampler_mismatch, constant_reward, no_learning, clip_range, untrained_critic, no_penalty, large_steps, length_reward,
    small_penalty, random_reward,
)  # fmt: skip
EXPLAINED = {  # symptom -> findings that explain it
    no_learning: ("constant reward",),
    untrained_critic: ("constant reward", "lr 0"),
    small_penalty: ("kl 0", "lr too large"),
    random_reward: ("constant reward", "lr 0", "lr too large", "length reward", "clip 0", "value_coef 0"),
    length_reward: ("constant reward", "lr 0"),
}


def in_words(findings: Sequence[Finding], rows: int) -> str:
    """One line a finding, or one that there is none."""
    if findings:
        return "\n".join(f"doctor: {finding}" for finding in findings)
    return "doctor: nothing is wrong that these numbers show" if rows >= FEW_ROWS else "doctor: too short to tell"
