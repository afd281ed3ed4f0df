"""Base against tuned models on held-out prompts: reward, an independent judge, KL, diversity, alignment tax, best-of-n.

python evaluate.py --base=out/lm --tuned=out/ppo --reward=out/rm --data=out/data/vader --out=out/evaluation
python evaluate.py --base=out/lm --tuned=out/ppo_1,out/ppo_2 --reward=out/rm_2 --other_rewards=out/rm_1
python evaluate.py rm --model=out/rm --data=out/data/vader  # a reward model's report card: see rm --help
python evaluate.py overoptimisation --run=out/ppo --proxy=out/rm_a --gold=out/rm_b --out=out/overoptimisation
python evaluate.py report --run=out/demo  # a run, or a directory of runs, as one HTML page and Markdown
python evaluate.py compare out/quick results/quick  # its curves beside those of our seeds: inside their band, or where not
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.examples import Examples
from data.judge import own_judge
from data.loader import TextLoader, in_order, open_data
from data.records import Record
from data.tokenizer import Tokenizer, check_fingerprint, load_tokenizer
from evaluation import band, card, minimal_pairs, overoptimisation, report, safety, verifiable
from evaluation.comparison import (
    LEGEND,
    elo,
    elo_line,
    mean_and_interval,
    own_samples_table,
    pairs_table,
    pairwise,
    ranking_of_own_samples,
    results_table,
)
from evaluation.held_out import (
    HeldOut,
    held_out_prompts,
    measured,
    nth_of,
    sample_groups,
    token_by_token,
    trimmed,
)
from evaluation.words import markdown_table, show
from model.generate import Generated, Sampling
from model.half import store
from model.transformer import Transformer
from rlhf.infra import config, distributed, run
from rlhf.infra.files import read_json, write_json, write_lines, write_text
from rlhf.infra.precision import PrecisionName, chosen
from rlhf.infra.screen import printable
from rlhf.lm.frozen import FrozenStates
from rlhf.lm.language_model import LanguageModel
from rlhf.lm.pretrained import Pretrained, open_pretrained
from rlhf.ppo.roles import Reference, logprobs_of, reference_on
from rlhf.ppo.update import distinct_n
from rlhf.reward.files import check_form
from rlhf.reward.model import Score
from rlhf.reward.scorer import open_scorer
from rlhf.statistics import best_of_n, best_of_n_kl, paired_bootstrap


@dataclass(frozen=True)
class Config:
    base: str = "out/lm"  # language model before PPO (run, HF directory, GGUF file or name); KL is measured against it
    tuned: tuple[str, ...] = ("out/ppo",)  # language model after PPO, or several, each compared with all before it
    reward: str = "out/rm"  # the reward that PPO maximised: a directory, or file.py:function
    other_rewards: tuple[str, ...] = ()  # beside reward on every model's own samples: which agrees with the judge
    judge: str | None = None  # score that PPO never saw: as reward, or data: what they bring; none = data if they do
    data: str = "out/data/vader"  # directory made by data.prepare
    split: Literal["validation", "test"] = "test"  # where prompts and human text come from; tune on validation
    out: str = "out/evaluation"  # directory for summary.json, results.md, samples.jsonl and tokens.jsonl
    sources: tuple[str, ...] = ()  # prompts from these sources of the data alone; none given = all
    prompts: int = 512  # held-out prompts
    prompt_tokens: int | None = None  # first tokens of a text as its prompt; none = the data's prompts, or 4 of a text
    max_prompt: int | None = None  # longest prompt of the data, tokens; none = what leaves room for the response
    long_prompts: Literal["drop", "left"] = "drop"  # leave longer ones out, or cut them from the left
    response_tokens: int = 24  # longest response, tokens
    human_texts: int | None = None  # held-out texts whose perplexity is measured, spread over the split; none = all
    temperature: float = 1.0  # of sampling and of the KL
    best_of: int = 16  # samples per prompt for best-of-n; reported for 4 and for all of them; 1 = none
    samples: int | None = None  # per prompt: pass@k, and pairs that test the rewards; none = 2 with other_rewards, or 1
    greedy: bool = False  # one more answer per prompt, always the likeliest token
    minimal_pairs: str | None = None  # JSON lines of sentence_good, sentence_bad (phenomenon), as BLiMP: likelier?
    safety_prompts: str | None = None  # JSON lines of prompt, answered once by every model: refusals, reward, judge, KL
    safety_tokens: int = 48  # longest answer to one of them, tokens [safety_prompts]
    precision: PrecisionName = "auto"  # of matrix products; auto = bf16 where that is fast, else fp32
    seed: int = 7  # of prompts and samples; all models draw with the same random numbers

    def __post_init__(self):
        config.at_least(self, prompts=1, prompt_tokens=1, max_prompt=1, response_tokens=1, samples=1, best_of=1)
        config.at_least(self, human_texts=1, temperature=1e-3, safety_tokens=1, seed=0)
        if not self.tuned:
            raise ValueError("--tuned is empty: name at least one model")
        for option, given in (("tuned", self.tuned), ("other_rewards", (self.reward, *self.other_rewards))):
            if again := [spec for spec in given if given.count(spec) > 1]:
                raise ValueError(f"--{option}: {again[0]} would be compared with itself; name it once")
        if len(self.tuned) > 1 and (taken := {"base", "before"}.intersection(self.tuned)):
            raise ValueError(
                f"--tuned: {min(taken)} among several has the name of what --base is; write ./{min(taken)}"
            )
        if self.other_rewards and self.samples == 1:
            raise ValueError("--other_rewards has no effect with --samples=1: pairs of samples are what rewards rank")


def main() -> None:
    cfg = config.parse(Config)
    device = distributed.setup().device
    torch.set_grad_enabled(False)
    tokenizer, texts = load_tokenizer(cfg.data), open_data(cfg.data, cfg.split)
    check_fingerprint(texts.fingerprint, tokenizer.fingerprint, f"{cfg.data}/{cfg.split}")
    cfg, dtype = chosen(cfg, device)
    models = open_models(cfg, tokenizer, device, dtype)
    held_out = held_out_prompts(cfg.data, cfg.split, cfg.prompts, cfg.seed, tokenizer, **prompt_options(cfg, models))
    print(f"prompts: {len(held_out.rows)}, of {held_out.summary}")
    reference, frozen = reference_on(models["base"].model, cfg.temperature)
    asking = open_asking(cfg, models["base"], held_out, tokenizer, device, dtype, frozen)
    sentences, probes = open_extras(cfg, models, tokenizer, device)

    # 1. every model answers the same prompts with the same random numbers; the base often enough for best-of-n
    samples = cfg.samples or (2 if cfg.other_rewards else 1)
    results, known, answers, earned, greedy, looked_at = {}, {}, {}, {}, {}, {}
    for name, model in models.items():
        drawn = max(samples, cfg.best_of) if name == "base" else samples
        logprobs = reference if name == "base" else logprobs_of(model.model, cfg.temperature)
        pool, earned[name], moved = asking.answers(model.model, drawn, logprobs=(logprobs, reference))
        firsts = nth_of(pool, drawn)
        looked_at[name] = trimmed(firsts[0], slice(0, LOOKED_AT))
        results[name] = {
            **{what: x[:, 0] for what, x in earned[name].items() if what in ("reward", "judge")},
            **moved,
            **answered(firsts, tokenizer, whole=held_out.are_starts),
            "perplexity": perplexity(model.model, texts, cfg.human_texts, device),
        }
        if cfg.greedy:
            greedy[name] = {what: x[:, 0] for what, x in asking.answers(model.model, 1, greedy=True)[1].items()}
        if sentences:
            known[name] = minimal_pairs.known(logprobs_of(model.model), sentences, tokenizer.pad, device)
        if probes:
            drawing = (replace(asking.sampling, max_new_tokens=cfg.safety_tokens), cfg.seed)
            judges = {what: score for what, score in asking.scores.items() if what in ("reward", "judge")}
            answers[name] = safety.answer(model.model, probes, tokenizer, *drawing, judges, (logprobs, reference))

    # 2. rows of the table, and every model against every one before it
    rows = {name: describe(result) for name, result in results.items()}
    rows |= best_of_rows(earned["base"], cfg.best_of)
    pairs = pairwise(results)
    own = {name: {what: x[:, :samples] for what, x in found.items()} for name, found in earned.items()}
    summary = {
        **reward_model_summary(cfg.reward),
        "ppo": last_against_base(rows, pairs, [*models][-1]),
        "rows": rows,
        "pairwise": pairs,
        **({"elo": elo(results)} if len(results) > 2 and asking.judge else {}),
        **({"verifiable": found} if (found := verdicts(own, greedy)) else {}),
        **({"new_distribution": asking.rankings(own)} if samples > 1 and asking.judge else {}),
        **({"minimal_pairs": minimal_pairs.report(sentences, known)} if known else {}),
        **({"safety": safety.report(answers)} if answers else {}),
        "prompts": len(held_out.rows),
        "options": asdict(cfg),
        "seconds": stage_seconds(cfg),
    }
    rows_of = {"samples.jsonl": side_by_side(results, held_out)}
    rows_of["tokens.jsonl"] = by_token(looked_at, results, held_out, logprobs, reference, tokenizer)
    if probes:
        rows_of["safety.jsonl"] = safety.side_by_side(probes, answers)
    write(cfg.out, summary, rows_of)


def prompt_options(cfg: Config, models: dict[str, Pretrained]) -> dict:
    """Which prompts, and how long they may be for the shortest context."""
    return dict(
        prompt_tokens=cfg.prompt_tokens,
        context=min(model.model.config.context for model in models.values()),
        response_tokens=cfg.response_tokens,
        max_prompt=cfg.max_prompt,
        long_prompts=cfg.long_prompts,
        sources=cfg.sources,
    )


@dataclass(frozen=True)
class Asking:
    """How every model is asked, and who scores its answers."""

    held_out: HeldOut
    sampling: Sampling
    seed: int
    device: torch.device
    scores: dict[str, Score]  # "reward", "judge" where there is one, and the other rewards by their specs
    temperatures: dict[str, float]  # of the rewards
    reward: str  # the spec of "reward"

    @property
    def judge(self) -> bool:
        return "judge" in self.scores

    def answers(
        self, model: Transformer, n: int, greedy: bool = False, logprobs: tuple[Reference, Reference] | None = None
    ) -> tuple[list[Generated], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """n answers to each of the P prompts, what each score says of them, and how far the first moved, see `measured`."""
        prompts, lengths = self.held_out.prompts.to(self.device), self.held_out.lengths.to(self.device)
        sampling = replace(self.sampling, temperature=0.0) if greedy else self.sampling
        pool = sample_groups(model, prompts, lengths, n, sampling, self.seed)
        return pool, *measured(pool, self.scores, self.held_out.rows, n, logprobs)

    def rankings(self, own: dict[str, dict[str, np.ndarray]]) -> dict[str, dict]:
        """Of every model's own samples: how far each reward agrees with the judge, see `ranking_of_own_samples`."""
        found = {}
        for name, by in own.items():
            rewards = {self.reward: by["reward"]} | {k: x for k, x in by.items() if k not in ("reward", "judge")}
            found[name] = ranking_of_own_samples(rewards, self.temperatures, by["judge"])
        return found


def open_asking(
    cfg: Config,
    base: Pretrained,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    device,
    dtype: torch.dtype,
    frozen: FrozenStates,
) -> Asking:
    """The rewards and the judge, which read `frozen` where they can. ValueError for data without a judge that is needed."""
    stop_ids = tuple(sorted({*base.stop_ids, *held_out.stop_ids}))
    sampling = Sampling(cfg.response_tokens, stop_ids, tokenizer.pad, cfg.temperature)
    opening = dict(tokenizer=tokenizer, device=device, base=base, dtype=dtype, frozen=frozen)
    opening |= {"records": held_out.records, "template": held_out.template}
    specs = (cfg.reward, *cfg.other_rewards)
    opened = {spec: open_scorer(spec, **opening) for spec in specs}
    found = {"reward" if spec == cfg.reward else spec: scorer.score for spec, scorer in opened.items()}
    judge = cfg.judge or ("data" if own_judge(cfg.data) else None)
    asked = [*opened.values()]
    if judge:
        asked.append(open_scorer(judge, **opening, data=cfg.data))
        found["judge"] = asked[-1].score
    elif cfg.other_rewards:
        raise ValueError(f"--other_rewards are held against a judge, and {cfg.data} brings none: name one, --judge=")
    for scorer in asked:
        scorer.check_room(int(held_out.lengths.max()), cfg.response_tokens)
    for path in [path for scorer in asked for path in scorer.own_models]:
        check_form(path, open_data(cfg.data, cfg.split))
    temperatures = {spec: scorer.temperature for spec, scorer in opened.items()}
    return Asking(held_out, sampling, cfg.seed, device, found, temperatures, cfg.reward)


def open_extras(cfg: Config, models: dict[str, Pretrained], tokenizer: Tokenizer, device) -> tuple[list, object]:
    """Minimal pairs and safety prompts, where the options name them."""
    context, sentences, probes = min(model.model.config.context for model in models.values()), [], None
    if cfg.minimal_pairs:
        sentences = minimal_pairs.read_pairs(cfg.minimal_pairs, tokenizer, context)
    if cfg.safety_prompts:
        probes = safety.read_probes(cfg.safety_prompts, tokenizer, context, models["base"].stop_ids, device)
    return sentences, probes


def verdicts(own: dict[str, dict[str, np.ndarray]], greedy: dict[str, dict[str, np.ndarray]]) -> dict[str, dict]:
    """Accuracy and pass@k by every score that says right or wrong."""
    found = {}
    for what in next(iter(own.values())):
        samples = {name: by[what] for name, by in own.items()}
        if verifiable.is_verdict(samples):
            found[what] = verifiable.report(samples, {name: by[what] for name, by in greedy.items()})
    return found


def side_by_side(results: dict[str, dict], held_out: HeldOut) -> list[dict]:
    """One row per prompt, every model's text in it; beside the prompt where texts are answers alone."""
    texts = {WHEN.get(name, name): result["texts"] for name, result in results.items()}
    rows = [dict(zip(texts, row)) for row in zip(*texts.values())]
    if held_out.are_starts:
        return rows
    prompts = map(shown_prompt, held_out.records(held_out.rows))
    return [{"prompt": prompt, **row} for prompt, row in zip(prompts, rows)]


LOOKED_AT = 10  # prompts whose answers the report shows token by token


def by_token(looked_at: dict[str, Generated], results: dict, held_out: HeldOut, tuned, base, tokenizer) -> list[dict]:
    """One row per prompt, the base's answer in it and the last model's, each with what both models think of its tokens."""
    ends = {"before": "base", "after": [*looked_at][-1]}
    answers = {when: token_by_token(looked_at[name], tuned, base, tokenizer) for when, name in ends.items()}
    for when, name in ends.items():
        for i, answer in enumerate(answers[when]):
            answer |= {
                what: float(results[name][what][i]) for what in ("judge", "reward", "kl") if what in results[name]
            }
    count = len(answers["before"])
    if held_out.are_starts:
        prompts = [tokenizer.decode(held_out.prompts[i, : held_out.lengths[i]].tolist()) for i in range(count)]
    else:
        prompts = map(shown_prompt, held_out.records(held_out.rows[:count]))
    return [dict(zip(("prompt", *answers), row)) for row in zip(prompts, *answers.values())]


def shown_prompt(record: Record) -> str:
    """What the last user said, or the whole prompt where it is plain text."""
    return record.prompt if isinstance(record.prompt, str) else record.prompt[-1]["content"]


WHEN = {"base": "before", "tuned": "after"}  # of samples.jsonl


def open_models(cfg: Config, tokenizer: Tokenizer, device, dtype: torch.dtype) -> dict[str, Pretrained]:
    """The base and the tuned models by their names in the tables, all of the tokenizer of the data."""
    names = ("base", "tuned") if len(cfg.tuned) == 1 else ("base", *cfg.tuned)
    near = (cfg.base,)  # a run of adapters or a branch finds its base there, wherever that has moved
    models = {name: open_pretrained(spec, device, near=near) for name, spec in zip(names, (cfg.base, *cfg.tuned))}
    for model in models.values():
        check_fingerprint(tokenizer.fingerprint, model.tokenizer.fingerprint, model.spec)
        store(model.model.eval().requires_grad_(False), dtype)
    return models


def answered(groups: Sequence[Generated], tokenizer: Tokenizer, whole: bool) -> dict:
    """One model's answers: their tokens, their texts (`whole`: behind the prompts), and whether they ended (P,)."""
    responses = [row[m].tolist() for g in groups for row, m in zip(g.tokens, g.mask)]
    rows = [row[:n].tolist() for g in groups for row, n in zip(g.tokens, g.lengths)] if whole else responses
    return {
        "responses": responses,
        "texts": [tokenizer.decode(row) for row in rows],
        "finished": torch.cat([g.finished for g in groups]).cpu().double().numpy(),
    }


def best_of_rows(earned: dict[str, np.ndarray], most: int) -> dict[str, dict]:
    """Rows of best-of-4 and best-of-`most` of the base, chosen by the reward among its samples (P, >= most)."""
    rows = {}
    for n in sorted({min(4, most), most} - {1}):
        chosen = {what: best_of_n(earned["reward"], earned[what], n) for what in ("reward", "judge") if what in earned}
        rows[f"best of {n}"] = {**{k: mean_and_interval(v) for k, v in chosen.items()}, "kl": best_of_n_kl(n)}
    return rows


def last_against_base(rows: dict[str, dict], pairs: list[dict], last: str) -> dict:
    """The last model's row and the base's, and what the one gains over the other."""
    both = {"before": rows["base"], "after": rows[last]}
    versus = next(x for x in pairs if (x["a"], x["b"]) == (last, "base"))
    return {
        **{f"{k}_{when}": x[k]["mean"] for k in ("judge", "reward") for when, x in both.items() if k in x},
        "kl": both["after"]["kl"],
        **{f"distinct{n}_{when}": x[f"distinct_{n}"] for n in (2, 3) for when, x in both.items()},
        **{key: x for key, x in versus.items() if key not in ("a", "b")},
    }


def perplexity(model: Transformer, texts: Examples, count: int | None, device) -> float | None:
    """Of what people wrote in the split, or of `count` rows that are spread over it; None where nobody did.

    Of plain texts all tokens but the first, of answers those of the answers.
    """
    loader, language_model = TextLoader(texts, 32, 0, context=model.config.context), LanguageModel(model)
    if not len(loader):
        return None
    chosen = np.linspace(0, len(loader) - 1, min(count or len(loader), len(loader))).astype(np.int64)
    chosen = chosen[np.argsort(loader.lengths(chosen), kind="stable")]  # neighbours need little padding
    losses = []
    for places in in_order(len(chosen), loader.batch_size):
        batch = loader.take(chosen[places])
        losses.append(language_model(batch.tokens.to(device), batch.mask.to(device)).cpu().double())
    return math.exp(float(torch.cat(losses).mean()))


def describe(result: dict) -> dict:
    """One row of the results table."""
    responses = result["responses"]
    ids = torch.tensor([i for response in responses for i in response], dtype=torch.int64)
    lengths = torch.tensor([len(response) for response in responses])
    return {
        **{what: mean_and_interval(result[what]) for what in ("reward", "judge") if what in result},
        "kl": float(result["kl"].mean()),
        "kl_interval": paired_bootstrap(result["kl"]),
        "kl_k3": float(result["kl_k3"].mean()),
        **{f"distinct_{n}": distinct_n(ids, lengths, n) for n in (1, 2, 3)},
        "length": float(result["length"].mean()),
        "eos_rate": float(result["finished"].mean()),
        "perplexity_of_human_text": result["perplexity"],
        "perplexity_for_base": math.exp(result["nll"].sum() / result["length"].sum()),
    }


def read_report(directory: str) -> dict:
    path = Path(directory) / "report.json"
    return read_json(path) if path.exists() else {}


def reward_model_summary(directory: str) -> dict:
    """What train_rm.py reported, if the reward is a model of ours."""
    report = read_report(directory)
    if not report:
        return {}
    baselines = {k: {"accuracy": v["all"], "accuracy_gap1": v["1"]} for k, v in report["baselines"].items()}
    accuracy = report["accuracy"]
    return {
        "rm": {"accuracy": accuracy["all"], "accuracy_gap1": accuracy["1"], "by_gap": accuracy, "baselines": baselines}
    }


def stage_seconds(cfg: Config) -> dict[str, float]:
    """Wall seconds of every stage that left a report, and of this one."""
    tuned = ["ppo"] if len(cfg.tuned) == 1 else [f"ppo {spec}" for spec in cfg.tuned]
    seconds = {
        name: read_report(path).get("seconds")
        for name, path in (("lm", cfg.base), ("rm", cfg.reward), *zip(tuned, cfg.tuned))
    }
    seconds["evaluate"] = run.seconds_used()
    return {**seconds, "total": sum(x for x in seconds.values() if x)}


def write(out: str, summary: dict, files: dict[str, list[dict]]) -> None:
    write_json(f"{out}/summary.json", summary)
    for name, rows in files.items():
        write_lines(f"{out}/{name}", rows)
    parts = {
        "verifiable": lambda found: markdown_table(*verifiable.table(found)),
        "new_distribution": own_samples_table,
        "minimal_pairs": minimal_pairs.markdown,
        "safety": safety.markdown,
    }
    text = "\n\n".join(
        [
            continuations(files["samples.jsonl"][:5]),
            *filter(None, [verdict(summary)]),
            markdown_table(*results_table(summary["rows"]), rule="---"),
            LEGEND,
            comparison_lines(summary),
            *(part(summary[name]) for name, part in parts.items() if name in summary),
        ]
    )
    write_text(f"{out}/results.md", text + "\n")
    print(text)
    seconds = " ".join(f"{name} {x:.0f}" for name, x in summary["seconds"].items() if x)
    print(f"\nseconds: {seconds}\nwrote {out}/{', '.join(['summary.json', 'results.md', *files])}")


def verdict(summary: dict) -> str:
    """What one tuned model is worth, in a sentence, and what costs no training in another; "" for several models."""
    if len(summary["pairwise"]) > 1:
        return ""
    ppo, rows, what = summary["ppo"], summary["rows"], "judge" if "judge_gain" in summary["ppo"] else "reward"
    gain, wins = ppo[f"{what}_gain"], ppo[f"win_rate_{what}"]["mean"]
    told = (
        "likes the tuned model better than the base" if gain["low"] > 0 else "cannot tell the tuned model from the base"
    )
    told = "likes the tuned model less than the base" if gain["high"] < 0 else told
    text = (
        f"The {what} {told}: {ppo[f'{what}_before']:.3f} -> {ppo[f'{what}_after']:.3f}, {show(gain, '+.3f')}; it wins "
        f"{wins:.0%} of {summary['prompts']} held-out prompts, {ppo['kl']:.1f} nats from the base; distinct-3 "
        f"{ppo['distinct3_before']:.3f} -> {ppo['distinct3_after']:.3f}."
    )
    if best := [name for name in rows if name.startswith("best of")]:
        chosen = rows[best[-1]][what]["mean"] - rows["base"][what]["mean"]
        text += f"\nWithout training, the {best[-1]} samples of the base, chosen by the reward, gains {chosen:+.3f}."
    return text


def comparison_lines(summary: dict) -> str:
    def line(text: str, x: dict[str, float]) -> str:
        return f"{text} {show(x)}, 95% interval"

    if len(summary["pairwise"]) > 1:
        tables = [markdown_table(*pairs_table(summary["pairwise"])), *map(elo_line, filter(None, [summary.get("elo")]))]
        return "\n\n".join(tables)
    names = {
        "judge_gain": "judge, tuned - base:",
        "reward_gain": "reward, tuned - base:",
        "win_rate_judge": "tuned wins against base, by the judge:",
        "win_rate_judge_length_controlled": "the same at equal length:",
        "win_rate_reward": "tuned wins against base, by the reward:",
    }
    ppo = summary["ppo"]
    return "\n".join(line(text, ppo[key]) for key, text in names.items() if key in ppo)


def continuations(pairs: list[dict[str, str]]) -> str:
    width = max(map(len, pairs[0])) + 1
    return "\n".join(
        f"{f'{i}.' if n == 0 else '':<3}{f'{name}:':<{width}} {printable(' '.join(text.split()))}"
        for i, pair in enumerate(pairs, 1)
        for n, (name, text) in enumerate(pair.items())
    )


COMMANDS = {"rm": card, "overoptimisation": overoptimisation, "report": report, "compare": band}

if __name__ == "__main__":
    command = COMMANDS[sys.argv.pop(1)].main if sys.argv[1:2] and sys.argv[1] in COMMANDS else main
    config.run(command, stopped="stopped")
