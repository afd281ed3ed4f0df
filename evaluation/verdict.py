"""What a report says first: one sentence, and the few numbers that it rests on, in words with the metric's name beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evaluation.page import escape, escape_markdown
from evaluation.sources import Source, series
from evaluation.words import brief, estimate_of
from rlhf.infra.healthy import FIRST, mean
from rlhf.statistics import Estimate


@dataclass(frozen=True)
class Fact:
    """One number that a reader takes home."""

    number: str
    words: str
    name: str  # the metric's, as the files spell it


@dataclass(frozen=True)
class Verdict:
    sentence: str
    facts: Sequence[Fact] = ()
    note: str = ""

    def html(self) -> str:
        tiles = "".join(
            f"<li><b>{escape(x.number)}</b><span>{escape(x.words)}</span><code>{escape(x.name)}</code></li>"
            for x in self.facts
        )
        facts = f'<ul class="facts">{tiles}</ul>' if tiles else ""
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return f'<p class="verdict">{escape(self.sentence)}</p>{facts}{note}'

    def markdown(self) -> str:
        lines = [f"- {x.number} {x.words} ({x.name})" for x in self.facts]
        texts = [f"**{escape_markdown(self.sentence)}**", "\n".join(map(escape_markdown, lines))]
        return "\n\n".join(filter(None, [*texts, escape_markdown(self.note)]))


def verdict(sources: Sequence[Source]) -> Verdict | None:
    """Of the strongest evidence there is: an evaluation, rounds, a run of PPO, a reward model; None where there is none of
    them, or where what there is cannot be read, which its section says.
    """
    evaluated = [x for x in sources if isinstance(x.files.get("summary.json", {}).get("ppo"), dict)]
    tries = [(of_several, evaluated)] if len(evaluated) > 1 else []
    tries += [(say, source) for file, say in SAYERS for source in sources if file in source.files]
    for say, what in tries:
        try:
            if found := say(what):
                return found
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue
    return None


def of_evaluation(source: Source) -> Verdict | None:
    """The last model against the base, by the judge, or by the reward where there is no judge."""
    summary = source.files["summary.json"]
    ppo, rows, prompts = summary["ppo"], summary["rows"], summary["prompts"]
    what = next((x for x in ("judge", "reward") if f"{x}_gain" in ppo), None)
    if what is None:
        return None
    gain, wins = estimate_of(ppo[f"{what}_gain"]), ppo.get(f"win_rate_{what}")
    base, tuned = rows["base"], [row for name, row in rows.items() if not name.startswith("best of")][-1]
    before, after = brief(base[what]["mean"]), brief(tuned[what]["mean"])
    right = what in (summary.get("verifiable") or {})  # 1 and 0: a share of right answers
    subject = "The share of right answers" if right else f"The {what}"
    facts = [Fact(f"{before} → {after}", "right answers" if right else f"what the {what} says, before and after", what)]
    if wins and not right:
        low, high = wins["low"], wins["high"]
        words = f"of {prompts} held-out prompts are won by the tuned model; 95%: {low:.0%} to {high:.0%}"
        facts.append(Fact(f"{wins['mean']:.0%}", words, f"win_rate_{what}"))
    facts.append(Fact(f"{tuned['kl']:.1f} nats", "away from the base, per answer", "kl"))
    if "distinct_3" in base and "distinct_3" in tuned:
        change = f"{base['distinct_3']:.1%} → {tuned['distinct_3']:.1%}"
        facts.append(Fact(change, "of all runs of three tokens are different: variety", "distinct_3"))
    won = f"; tuned answers win {wins['mean']:.0%}" if wins and not right else ""
    sentence = f"{subject} {moved(gain)} at {tuned['kl']:.1f} nats{won}."
    return Verdict(sentence, facts, beside_training(rows, what, right))


def moved(gain: Estimate) -> str:
    """`rose by +.35 [.28, .41]`, `fell by .20 [.10, .30]`, where the interval says so."""
    if gain.low > 0:
        return f"rose by {brief(gain.value, '+')} {interval(gain)}"
    if gain.high < 0:
        return f"fell by {brief(-gain.value)} {interval(Estimate(-gain.value, -gain.high, -gain.low))}"
    return f"did not move beyond chance, {brief(gain.value, '+')} {interval(gain)},"


def beside_training(rows: dict[str, dict], what: str, right: bool) -> str:
    """What the same would be without training, and how far the number can be believed."""
    best = [name for name in rows if name.startswith("best of") and what in rows[name]]
    told = ["No judge was asked but the reward that was trained on."] * (what == "reward" and not right)
    if best:
        free = rows[best[-1]][what]["mean"] - rows["base"][what]["mean"]
        told.append(f"Without any training, the {best[-1]} samples of the base gains {brief(free, '+')}.")
    return " ".join(told)


def of_several(sources: Sequence[Source]) -> Verdict:
    """Evaluations of several runs, as of several seeds: how many gain, and each with its interval."""
    found = {x.name: x.files["summary.json"]["ppo"] for x in sources}
    what = "judge" if all("judge_gain" in ppo for ppo in found.values()) else "reward"
    gains = {name: estimate_of(ppo[f"{what}_gain"]) for name, ppo in found.items()}
    rose, values = sum(x.low > 0 for x in gains.values()), [x.value for x in gains.values()]
    facts = [Fact(brief(x.value, "+"), f"{name}; 95%: {interval(x)}", f"{what}_gain") for name, x in gains.items()]
    told = f"The {what} rose beyond chance in {rose} of {len(gains)} runs"
    return Verdict(f"{told}, by {brief(min(values), '+')} to {brief(max(values), '+')}.", facts[:MOST])


MOST = 8  # facts


def of_rounds(source: Source) -> Verdict | None:
    content = source.files["rounds.json"]
    found = content["rounds"]
    if not found:
        return None
    first, last = estimate_of(found[0]["judge_base"]), estimate_of(found[-1]["judge"])
    promoted, votes = sum(bool(x["promoted"]) for x in found), sum(x["votes"] for x in found[-1:])
    facts = [
        Fact(f"{promoted} of {len(found)}", "rounds made the model better beyond chance", "promoted"),
        Fact(f"{votes}", f"pairs decided by: {content['rater']}", "votes"),
        Fact(f"{found[-1]['kl']:.1f} nats", "away from the base, per answer", "kl"),
    ]
    count = f"{len(found)} round{'s' * (len(found) > 1)}"
    return Verdict(
        f"In {count} the judge went from {brief(first.value)} to {brief(last.value)} {interval(last)}.", facts
    )


def of_training(source: Source) -> Verdict | None:
    """A run of PPO that nobody has evaluated yet."""
    found = series(source.files["metrics.jsonl"], lambda name: name in ("objective/scores", "objective/kl"))
    if source.kind != "PPO" or len(found) < 2:
        return None
    scores, kl = found["objective/scores"][1], found["objective/kl"][1]
    start, end, far = mean(scores[:FIRST]), mean(scores[-FIRST:]), mean(kl[-FIRST:])
    so_far = "" if "report.json" in source.files else " so far"
    facts = [
        Fact(f"{brief(start)} → {brief(end)}", "mean reward, first and last five iterations", "objective/scores"),
        Fact(f"{far:.1f} nats", "away from the base, per answer", "objective/kl"),
        Fact(str(len(scores)), f"iterations{so_far}", "step"),
    ]
    sentence = (
        f"The reward went from {brief(start)} to {brief(end)} at {far:.1f} nats{so_far}; no judge has seen it yet."
    )
    return Verdict(sentence, facts, "python evaluate.py --base=... --tuned=... asks one, on held-out prompts.")


def of_reward_model(source: Source) -> Verdict | None:
    report = source.files["report.json"]
    right, baselines = report["accuracy"], report["baselines"]
    facts = [Fact(f"{right['all']:.0%}", "of held-out pairs are ranked as people rank them", "accuracy")]
    names = {"length": "by length alone", "rules": "by the rules of the data", "one_rater": "by one person"}
    facts += [Fact(f"{baselines[x]['all']:.0%}", text, x) for x, text in names.items() if x in baselines]
    least = f", where length alone ranks {baselines['length']['all']:.0%}" if "length" in baselines else ""
    return Verdict(f"The reward model ranks {right['all']:.0%} of held-out pairs right{least}.", facts)


SAYERS: Sequence[tuple[str, Callable[[Source], Verdict | None]]] = (
    ("summary.json", of_evaluation),
    ("rounds.json", of_rounds),
    ("metrics.jsonl", of_training),
    ("report.json", of_reward_model),
)


def interval(x: Estimate) -> str:
    """[.28, .41]"""
    return f"[{brief(x.low)}, {brief(x.high)}]"
