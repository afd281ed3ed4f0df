"""Base against tuned model on held-out prompts: reward, an independent judge, KL, diversity, alignment tax, best-of-n.

python evaluate.py --base=out/lm --tuned=out/ppo --reward=out/rm --data=out/data/vader --out=out/evaluation
python evaluate.py rm --model=out/rm --data=out/data/vader  # a reward model's report card: see rm --help
python evaluate.py overoptimisation --run=out/ppo --proxy=out/rm_a --gold=out/rm_b --out=out/overoptimisation
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.loader import PromptLoader, SentenceLoader, TokenFile, in_order
from data.tokenizer import check_fingerprint, load_tokenizer
from evaluation import card, overoptimisation
from evaluation.held_out import held_out_prompts, load_judge, sample_groups
from model.generate import Generated
from model.transformer import Transformer
from rlhf.actor_critic import logprobs_of
from rlhf.evaluation import best_of_n, best_of_n_kl, paired_bootstrap, win_rate
from rlhf.infra import config, distributed, run
from rlhf.kl import k1, k3
from rlhf.language_model import LanguageModel
from rlhf.ppo import distinct_n
from rlhf.pretrained import open_base, open_pretrained
from rlhf.reward_model import load_reward


@dataclass(frozen=True)
class Config:
    base: str = "out/lm"  # language model before PPO (run, HF directory, GGUF file or name); KL is measured against it
    tuned: str = "out/ppo"  # language model after PPO
    reward: str = "out/rm"  # the reward that PPO maximised: a directory, or file.py:function
    judge: str = "vader"  # score that PPO never saw: "vader" = rules in the data, a reward model, or file.py:function
    data: str = "out/data/vader"  # directory made by data.prepare
    split: Literal["validation", "test"] = "test"  # where prompts and human text come from; tune on validation
    out: str = "out/evaluation"  # directory for summary.json, results.md and samples.jsonl
    domain: str | None = "film"  # prompts from this domain alone; none = all
    prompts: int = 512  # held-out prompts
    prompt_tokens: int = 4  # text tokens of a prompt, after bos
    response_tokens: int = 24  # longest response, tokens
    human_texts: int | None = None  # held-out texts whose perplexity is measured, spread over the split; none = all
    temperature: float = 1.0  # of sampling and of the KL
    best_of: int = 16  # samples per prompt for best-of-n; reported for 4 and for all of them; 1 = none
    seed: int = 7  # of prompts and samples; both models draw with the same random numbers

    def __post_init__(self):
        config.at_least(self, prompts=1, prompt_tokens=1, response_tokens=1, human_texts=1, temperature=1e-3, best_of=1)
        config.at_least(self, seed=0)


def main() -> None:
    cfg = config.parse(Config)
    device = distributed.setup().device
    torch.set_grad_enabled(False)
    tokenizer = load_tokenizer(cfg.data)
    test = TokenFile(f"{cfg.data}/{cfg.split}")
    check_fingerprint(test.fingerprint, tokenizer.fingerprint, test.path)
    opened = [open_pretrained(spec, device) for spec in (cfg.base, cfg.tuned)]
    for model in opened:
        check_fingerprint(tokenizer.fingerprint, model.tokenizer.fingerprint, model.spec)
    base, tuned, stop_ids = opened[0].model.eval(), opened[1].model.eval(), opened[0].stop_ids
    reward = load_reward(cfg.reward, tokenizer, device, base=opened[0], open_base=open_base)
    judge = load_judge(cfg.judge, cfg.data, tokenizer, device, opened[0])
    starts = held_out_prompts(cfg.data, cfg.split, cfg.prompt_tokens, cfg.domain)
    prompts, lengths, _ = PromptLoader(starts, test.pad, min(cfg.prompts, len(starts)), cfg.seed).batch(0)
    prompts, lengths = prompts.to(device), lengths.to(device)
    logprobs = {"base": logprobs_of(base, cfg.temperature), "tuned": logprobs_of(tuned, cfg.temperature)}

    sampling = (cfg.seed, cfg.response_tokens, stop_ids, tokenizer.pad, cfg.temperature)

    def scores(score, groups: list[Generated]) -> np.ndarray:
        """One number per response (rows,)."""
        return torch.cat([score(g.tokens, g.lengths, g.mask) for g in groups]).double().cpu().numpy()

    pool = sample_groups(base, prompts, lengths, cfg.best_of, *sampling)
    firsts = [first_of(group, cfg.best_of) for group in pool]
    results = {}
    for name, groups in (("base", firsts), ("tuned", sample_groups(tuned, prompts, lengths, 1, *sampling))):
        results[name] = {
            "reward": scores(reward, groups),
            "judge": scores(judge, groups),
            **divergence(groups, logprobs[name], logprobs["base"]),
            "responses": [row[m].tolist() for g in groups for row, m in zip(g.tokens, g.mask)],
            "texts": [tokenizer.decode(row[:n].tolist()) for g in groups for row, n in zip(g.tokens, g.lengths)],
            "finished": torch.cat([g.finished for g in groups]).double().cpu().numpy(),
            "perplexity": perplexity({"base": base, "tuned": tuned}[name], test, cfg.human_texts, device),
        }
    proxy, gold = (scores(score, pool).reshape(len(prompts), cfg.best_of) for score in (reward, judge))

    rows = {name: describe(result) for name, result in results.items()}
    for n in sorted({min(4, cfg.best_of), cfg.best_of} - {1}):
        chosen = {"reward": best_of_n(proxy, proxy, n), "judge": best_of_n(proxy, gold, n)}
        rows[f"best of {n}"] = {**{k: mean_and_interval(v) for k, v in chosen.items()}, "kl": best_of_n_kl(n)}
    before, after = results["base"], results["tuned"]
    comparison = {
        "judge_gain": mean_and_interval(after["judge"] - before["judge"]),
        "reward_gain": mean_and_interval(after["reward"] - before["reward"]),
        "win_rate_judge": mean_and_interval(win_rate(after["judge"], before["judge"])),
        "win_rate_reward": mean_and_interval(win_rate(after["reward"], before["reward"])),
    }
    summary = {
        **reward_model_summary(cfg.reward),
        "ppo": {
            **{f"{k}_{when}": rows[name][k]["mean"] for k in ("judge", "reward") for name, when in WHEN.items()},
            "kl": rows["tuned"]["kl"],
            **{f"distinct{n}_{when}": rows[name][f"distinct_{n}"] for n in (2, 3) for name, when in WHEN.items()},
            **comparison,
        },
        "rows": rows,
        "prompts": len(prompts),
        "options": asdict(cfg),
        "seconds": stage_seconds(cfg),
    }
    pairs = [{"before": a, "after": b} for a, b in zip(before["texts"], after["texts"])]
    write(cfg.out, summary, pairs)


WHEN = {"base": "before", "tuned": "after"}


def first_of(group: Generated, n: int) -> Generated:
    """The first of every prompt's n responses."""
    return Generated(**{name: x[::n] for name, x in vars(group).items()})


def divergence(groups: list[Generated], policy, base) -> dict[str, np.ndarray]:
    """KL to the base in nats per response, by k1 and k3, and its perplexity for the base: (rows,) each."""
    parts = []
    for group in groups:
        theirs = base(group.tokens, group.mask)  # (B, T), zero outside
        ours = theirs if policy is base else policy(group.tokens, group.mask)
        parts.append(torch.stack([k1(ours, theirs).sum(1), k3(ours, theirs).sum(1), -theirs.sum(1), group.mask.sum(1)]))
    kl, kl_k3, nll, length = torch.cat(parts, 1).double().cpu().numpy()
    return {"kl": kl, "kl_k3": kl_k3, "nll": nll, "length": length}


def perplexity(model: Transformer, test: TokenFile, count: int | None, device) -> float:
    """Of the human sentences of the split, or of `count` that are spread over it."""
    loader, language_model = SentenceLoader(test, 32, seed=0, context=model.config.context), LanguageModel(model)
    chosen = np.linspace(0, len(loader) - 1, min(count or len(loader), len(loader))).astype(np.int64)
    chosen = chosen[np.argsort(np.diff(loader.windows[chosen])[:, 0], kind="stable")]  # neighbours need little padding
    losses = []
    for places in in_order(len(chosen), loader.batch_size):
        batch = loader.take(chosen[places])
        losses.append(language_model(batch.tokens.to(device), batch.mask.to(device)).double())
    return math.exp(float(torch.cat(losses).mean()))


def mean_and_interval(x: np.ndarray) -> dict[str, float]:
    """Mean over prompts and its 95% bootstrap interval."""
    low, high = paired_bootstrap(x)
    return {"mean": float(x.mean()), "low": low, "high": high}


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
    return json.loads(path.read_text()) if path.exists() else {}


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
    manifest = Path(cfg.data) / "manifest.json"
    seconds = {"prepare": json.loads(manifest.read_text()).get("seconds")}
    seconds |= {
        name: read_report(path).get("seconds")
        for name, path in (("lm", cfg.base), ("rm", cfg.reward), ("ppo", cfg.tuned))
    }
    seconds["evaluate"] = run.seconds_used()
    return {**seconds, "total": sum(x for x in seconds.values() if x)}


def write(out: str, summary: dict, pairs: list[dict[str, str]]) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    run.write_json(f"{out}/summary.json", summary)
    with open(f"{out}/samples.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    text = "\n\n".join([results_table(summary), comparison_lines(summary), continuations(pairs[:5])])
    Path(f"{out}/results.md").write_text(text + "\n")
    print(text)
    seconds = " ".join(f"{name} {x:.0f}" for name, x in summary["seconds"].items() if x)
    print(f"\nseconds: {seconds}\nwrote {out}/summary.json, results.md, samples.jsonl")


def results_table(summary: dict) -> str:
    columns = ("judge", "reward", "KL, nats", "distinct-3", "length", "ends", "ppl of human text", "ppl for base")
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in summary["rows"].items():
        cells = [f"{row[k]['mean']:.3f} [{row[k]['low']:.3f}, {row[k]['high']:.3f}]" for k in ("judge", "reward")]
        cells.append(f"{row['kl']:.2f}" if "distinct_3" in row else f"<= {row['kl']:.2f}")
        if "distinct_3" in row:
            cells += [f"{row['distinct_3']:.3f}", f"{row['length']:.1f}", f"{row['eos_rate']:.2f}"]
            cells += [f"{row['perplexity_of_human_text']:.1f}", f"{row['perplexity_for_base']:.1f}"]
        cells += ["-"] * (len(columns) - len(cells))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_lines(summary: dict) -> str:
    def line(text: str, x: dict[str, float]) -> str:
        return f"{text} {x['mean']:.3f}, 95% interval [{x['low']:.3f}, {x['high']:.3f}]"

    ppo = summary["ppo"]
    return "\n".join(
        [
            line("judge, tuned - base:", ppo["judge_gain"]),
            line("tuned wins against base, by the judge:", ppo["win_rate_judge"]),
            line("tuned wins against base, by the reward:", ppo["win_rate_reward"]),
        ]
    )


def continuations(pairs: list[dict[str, str]]) -> str:
    return "\n".join(f"{i}. before: {pair['before']}\n   after:  {pair['after']}" for i, pair in enumerate(pairs, 1))


COMMANDS = {"rm": card, "overoptimisation": overoptimisation}

if __name__ == "__main__":
    config.run(COMMANDS[sys.argv.pop(1)].main if sys.argv[1:2] and sys.argv[1] in COMMANDS else main)
