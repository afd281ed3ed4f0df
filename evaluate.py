"""Base against tuned models on held-out prompts: reward, an independent judge, KL, diversity, alignment tax, best-of-n.

python evaluate.py --base=out/lm --tuned=out/ppo --reward=out/rm --data=out/data/vader --out=out/evaluation
python evaluate.py --base=out/lm --tuned=out/ppo_1,out/ppo_2 --reward=out/rm_2 --other_rewards=out/rm_1
python evaluate.py rm --model=out/rm --data=out/data/vader  # a reward model's report card: see rm --help
python evaluate.py overoptimisation --run=out/ppo --proxy=out/rm_a --gold=out/rm_b --out=out/overoptimisation
python evaluate.py report --run=out/demo  # a run, or a directory of runs, as one HTML page and Markdown
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.batches import TextLoader
from data.loader import PromptLoader, TokenFile, in_order
from data.tokenizer import Tokenizer, check_fingerprint, load_tokenizer
from evaluation import card, minimal_pairs, overoptimisation, report, safety
from evaluation.comparison import (
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
    divergence,
    held_out_prompts,
    nth_of,
    sample_groups,
    scores,
)
from evaluation.words import markdown_table, show
from model.generate import Generated, Sampling
from model.transformer import Transformer
from rlhf.infra import config, distributed, run
from rlhf.infra.files import read_json, write_json, write_lines, write_text
from rlhf.lm.language_model import LanguageModel
from rlhf.lm.pretrained import Pretrained, open_pretrained
from rlhf.ppo.roles import logprobs_of
from rlhf.ppo.update import distinct_n
from rlhf.reward.scorer import open_scorer
from rlhf.statistics import best_of_n, best_of_n_kl, paired_bootstrap


@dataclass(frozen=True)
class Config:
    base: str = "out/lm"  # language model before PPO (run, HF directory, GGUF file or name); KL is measured against it
    tuned: tuple[str, ...] = ("out/ppo",)  # language model after PPO, or several, each compared with all before it
    reward: str = "out/rm"  # the reward that PPO maximised: a directory, or file.py:function
    other_rewards: tuple[str, ...] = ()  # beside reward on every model's own samples: which agrees with the judge
    judge: str = "data"  # score that PPO never saw: data = what they bring, a reward model, or file.py:function
    data: str = "out/data/vader"  # directory made by data.prepare
    split: Literal["validation", "test"] = "test"  # where prompts and human text come from; tune on validation
    out: str = "out/evaluation"  # directory for summary.json, results.md and samples.jsonl
    sources: tuple[str, ...] = ()  # prompts from these sources of the data alone; none given = all
    prompts: int = 512  # held-out prompts
    prompt_tokens: int = 4  # text tokens of a prompt, after bos
    response_tokens: int = 24  # longest response, tokens
    human_texts: int | None = None  # held-out texts whose perplexity is measured, spread over the split; none = all
    temperature: float = 1.0  # of sampling and of the KL
    best_of: int = 16  # samples per prompt for best-of-n; reported for 4 and for all of them; 1 = none
    samples: int | None = None  # per prompt; their pairs test the rewards; none = 2 with other_rewards, else 1
    minimal_pairs: str | None = None  # JSON lines of sentence_good, sentence_bad (phenomenon), as BLiMP: likelier?
    safety_prompts: str | None = None  # JSON lines of prompt, answered once by every model: refusals, reward, judge, KL
    safety_tokens: int = 48  # longest answer to one of them, tokens [safety_prompts]
    seed: int = 7  # of prompts and samples; all models draw with the same random numbers

    def __post_init__(self):
        config.at_least(self, prompts=1, prompt_tokens=1, response_tokens=1, human_texts=1, temperature=1e-3, best_of=1)
        config.at_least(self, samples=1, safety_tokens=1, seed=0)
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
    tokenizer = load_tokenizer(cfg.data)
    test = TokenFile(f"{cfg.data}/{cfg.split}")
    check_fingerprint(test.fingerprint, tokenizer.fingerprint, test.path)
    models = open_models(cfg, tokenizer, device)
    opened = models["base"]
    scorers = {spec: open_scorer(spec, tokenizer, device, opened) for spec in (cfg.reward, *cfg.other_rewards)}
    rewards = {spec: scorer.score for spec, scorer in scorers.items()}
    temperatures = {spec: scorer.temperature for spec, scorer in scorers.items()}
    judge = open_scorer(cfg.judge, tokenizer, device, opened, data=cfg.data).score
    starts = held_out_prompts(cfg.data, cfg.split, cfg.prompt_tokens, cfg.sources)
    prompts, lengths, _ = PromptLoader(starts, test.pad, min(cfg.prompts, len(starts)), cfg.seed).batch(0)
    prompts, lengths = prompts.to(device), lengths.to(device)
    sampling = Sampling(cfg.response_tokens, opened.stop_ids, tokenizer.pad, cfg.temperature)

    context = min(model.model.config.context for model in models.values())
    sentences, probes = [], None
    if cfg.minimal_pairs:
        sentences = minimal_pairs.read_pairs(cfg.minimal_pairs, tokenizer, context)
    if cfg.safety_prompts:
        probes = safety.read_probes(cfg.safety_prompts, tokenizer, context, opened.stop_ids, device)

    # 1. every model answers the same prompts with the same random numbers; the base often enough for best-of-n
    reference, samples = logprobs_of(opened.model, cfg.temperature), cfg.samples or (2 if cfg.other_rewards else 1)
    results, new_distribution, known, answers = {}, {}, {}, {}
    for name, model in models.items():
        drawn = max(samples, cfg.best_of) if name == "base" else samples
        pool = sample_groups(model.model, prompts, lengths, drawn, sampling, cfg.seed)
        earned = {spec: scores(score, pool, drawn) for spec, score in rewards.items()}  # (P, n) each
        judged = scores(judge, pool, drawn)  # (P, n)
        firsts = nth_of(pool, drawn)
        logprobs = reference if name == "base" else logprobs_of(model.model, cfg.temperature)
        results[name] = {
            "reward": earned[cfg.reward][:, 0],
            "judge": judged[:, 0],
            **divergence(firsts, logprobs, reference),
            **answered(firsts, tokenizer),
            "perplexity": perplexity(model.model, test, cfg.human_texts, device),
        }
        if name == "base":
            proxy, gold = earned[cfg.reward], judged
        if samples > 1:
            own = {spec: x[:, :samples] for spec, x in earned.items()}
            new_distribution[name] = ranking_of_own_samples(own, temperatures, judged[:, :samples])
        if sentences:
            known[name] = minimal_pairs.known(logprobs_of(model.model), sentences, tokenizer.pad, device)
        if probes:
            drawing = (replace(sampling, max_new_tokens=cfg.safety_tokens), cfg.seed)
            judging = (rewards[cfg.reward], judge, (logprobs, reference))
            answers[name] = safety.answer(model.model, probes, tokenizer, *drawing, *judging)

    # 2. rows of the table, and every model against every one before it
    rows = {name: describe(result) for name, result in results.items()} | best_of_rows(proxy, gold, cfg.best_of)
    pairs = pairwise(results)
    summary = {
        **reward_model_summary(cfg.reward),
        "ppo": last_against_base(rows, pairs, [*models][-1]),
        "rows": rows,
        "pairwise": pairs,
        **({"elo": elo(results)} if len(results) > 2 else {}),
        **({"new_distribution": new_distribution} if new_distribution else {}),
        **({"minimal_pairs": minimal_pairs.report(sentences, known)} if known else {}),
        **({"safety": safety.report(answers)} if answers else {}),
        "prompts": len(prompts),
        "options": asdict(cfg),
        "seconds": stage_seconds(cfg),
    }
    texts = {WHEN.get(name, name): result["texts"] for name, result in results.items()}
    rows_of = {"samples.jsonl": [dict(zip(texts, row)) for row in zip(*texts.values())]}
    if probes:
        rows_of["safety.jsonl"] = safety.side_by_side(probes, answers)
    write(cfg.out, summary, rows_of)


WHEN = {"base": "before", "tuned": "after"}  # of samples.jsonl


def open_models(cfg: Config, tokenizer: Tokenizer, device) -> dict[str, Pretrained]:
    """The base and the tuned models by their names in the tables, all of the tokenizer of the data."""
    names = ("base", "tuned") if len(cfg.tuned) == 1 else ("base", *cfg.tuned)
    models = {name: open_pretrained(spec, device) for name, spec in zip(names, (cfg.base, *cfg.tuned))}
    for model in models.values():
        check_fingerprint(tokenizer.fingerprint, model.tokenizer.fingerprint, model.spec)
        model.model.eval()
    return models


def answered(groups: Sequence[Generated], tokenizer: Tokenizer) -> dict:
    """One model's answers: their tokens, their texts behind the prompts, and whether they ended (P,)."""
    return {
        "responses": [row[m].tolist() for g in groups for row, m in zip(g.tokens, g.mask)],
        "texts": [tokenizer.decode(row[:n].tolist()) for g in groups for row, n in zip(g.tokens, g.lengths)],
        "finished": torch.cat([g.finished for g in groups]).double().cpu().numpy(),
    }


def best_of_rows(proxy: np.ndarray, gold: np.ndarray, most: int) -> dict[str, dict]:
    """Rows of best-of-4 and best-of-`most` of the base, chosen by the reward: proxy and gold (P, >= most)."""
    rows = {}
    for n in sorted({min(4, most), most} - {1}):
        chosen = {"reward": best_of_n(proxy, proxy, n), "judge": best_of_n(proxy, gold, n)}
        rows[f"best of {n}"] = {**{k: mean_and_interval(v) for k, v in chosen.items()}, "kl": best_of_n_kl(n)}
    return rows


def last_against_base(rows: dict[str, dict], pairs: list[dict], last: str) -> dict:
    """The last model's row and the base's, and what the one gains over the other."""
    both = {"before": rows["base"], "after": rows[last]}
    versus = next(x for x in pairs if (x["a"], x["b"]) == (last, "base"))
    return {
        **{f"{k}_{when}": x[k]["mean"] for k in ("judge", "reward") for when, x in both.items()},
        "kl": both["after"]["kl"],
        **{f"distinct{n}_{when}": x[f"distinct_{n}"] for n in (2, 3) for when, x in both.items()},
        **{key: x for key, x in versus.items() if key not in ("a", "b")},
    }


def perplexity(model: Transformer, test: TokenFile, count: int | None, device) -> float:
    """Of the human texts of the split, or of `count` that are spread over it: of all their tokens but the first."""
    loader, language_model = (
        TextLoader(test.data, 32, 0, context=model.config.context, loss="all"),
        LanguageModel(model),
    )
    chosen = np.linspace(0, len(loader) - 1, min(count or len(loader), len(loader))).astype(np.int64)
    chosen = chosen[np.argsort(loader.lengths(chosen), kind="stable")]  # neighbours need little padding
    losses = []
    for places in in_order(len(chosen), loader.batch_size):
        batch = loader.take(chosen[places])
        losses.append(language_model(batch.tokens.to(device), batch.mask.to(device)).double())
    return math.exp(float(torch.cat(losses).mean()))


def describe(result: dict) -> dict:
    """One row of the results table."""
    return {
        "reward": mean_and_interval(result["reward"]),
        "judge": mean_and_interval(result["judge"]),
        "kl": float(result["kl"].mean()),
        "kl_interval": paired_bootstrap(result["kl"]),
        "kl_k3": float(result["kl_k3"].mean()),
        **{f"distinct_{n}": distinct_n(result["responses"], n) for n in (1, 2, 3)},
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
        "new_distribution": own_samples_table,
        "minimal_pairs": minimal_pairs.markdown,
        "safety": safety.markdown,
    }
    found = [part(summary[name]) for name, part in parts.items() if name in summary]
    text = "\n\n".join(
        [
            markdown_table(*results_table(summary["rows"]), rule="---"),
            comparison_lines(summary),
            *found,
            continuations(files["samples.jsonl"][:5]),
        ]
    )
    write_text(f"{out}/results.md", text + "\n")
    print(text)
    seconds = " ".join(f"{name} {x:.0f}" for name, x in summary["seconds"].items() if x)
    print(f"\nseconds: {seconds}\nwrote {out}/{', '.join(['summary.json', 'results.md', *files])}")


def comparison_lines(summary: dict) -> str:
    def line(text: str, x: dict[str, float]) -> str:
        return f"{text} {show(x)}, 95% interval"

    if len(summary["pairwise"]) > 1:
        return f"{markdown_table(*pairs_table(summary['pairwise']))}\n\n{elo_line(summary['elo'])}"
    ppo = summary["ppo"]
    return "\n".join(
        [
            line("judge, tuned - base:", ppo["judge_gain"]),
            line("tuned wins against base, by the judge:", ppo["win_rate_judge"]),
            line("the same at equal length:", ppo["win_rate_judge_length_controlled"]),
            line("tuned wins against base, by the reward:", ppo["win_rate_reward"]),
        ]
    )


def continuations(pairs: list[dict[str, str]]) -> str:
    width = max(map(len, pairs[0])) + 1
    return "\n".join(
        f"{f'{i}.' if n == 0 else '':<3}{f'{name}:':<{width}} {text}"
        for i, pair in enumerate(pairs, 1)
        for n, (name, text) in enumerate(pair.items())
    )


COMMANDS = {"rm": card, "overoptimisation": overoptimisation, "report": report}

if __name__ == "__main__":
    command = COMMANDS[sys.argv.pop(1)].main if sys.argv[1:2] and sys.argv[1] in COMMANDS else main
    config.run(command, stopped="stopped")
