"""The loop: sample pairs, collect votes, refine the reward model on old and new data, PPO, promote what a judge likes more.

python iterate.py --init=out/lm --data=out/data/vader --out=out/rounds                              # people vote
python iterate.py --init=out/lm --data=out/data/vader --out=out/rounds --rater=out/rm_b --judge=out/rm_b  # a simulated rater

Every stage is a command of its own, which is printed; what it leaves in OUT says that it is done. So the loop can be stopped
at any point, and the same command goes on. Where people vote it ends when votes are missing, says how to give them, and
the same command goes on from there. OUT/rounds.md is the table of rounds; OUT/feedback.sqlite holds every vote.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.chat import Chat
from data.encoding import Encoder
from data.judge import own_judge
from data.loader import StartLoader, drawn, open_data, pad, prompts_of, unseen
from data.pipeline import TEMPLATE
from data.records import Record
from data.tokenizer import check_fingerprint
from evaluation.comparison import rounds_table
from evaluation.held_out import sample_groups
from evaluation.words import markdown_table
from model.generate import Sampling
from rlhf.feedback.preferences import disagreement
from rlhf.feedback.store import Comparison, FeedbackStore
from rlhf.infra import config, run, signals
from rlhf.infra.files import read_json, read_lines, write_json, write_lines, write_text
from rlhf.lm.pretrained import digest_of, open_pretrained
from rlhf.reward.files import load_reward_model
from rlhf.reward.scorer import open_scorer, scorer_of

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    init: str = "out/lm"  # language model: policy 0, the reference, and the base of every reward model
    data: str = "out/data/vader"  # directory made by data.prepare: ratings of the first reward model, and the prompts
    out: str = "out/rounds"  # directory of the rounds
    rounds: int = 3  # may be raised later: finished rounds stay
    # collect
    rater: str = "people"  # who votes: people, or a simulated rater: a reward model, or file.py:function
    rater_noise: float | None = None  # P(left) = sigmoid(difference / noise); 0 = none; none = the rater's temperature
    pairs: int = 256  # votes per round, each on two answers of the best policy so far to one prompt
    pool: int = 1  # times as many pairs are sampled as voted on
    order: Literal["random", "active"] = "random"  # which of them; active: where the reward model's heads disagree most
    raters: int = 1  # people per pair
    sources: tuple[str, ...] = ()  # prompts from these sources of the data alone; none given = all
    prompt_tokens: int | None = None  # first tokens of a text as its prompt; none = the data's prompts, or 4 of a text
    max_prompt: int | None = None  # longest prompt of the data, tokens; none = what leaves room for the response
    long_prompts: Literal["drop", "left"] = "drop"  # leave longer ones out, or cut them from the left
    response_tokens: int = 24  # longest answer, tokens
    # learn
    start: Literal["base", "policy"] = "base"  # PPO of a round starts from init, or from the best policy so far
    rm: str = ""  # further options of train_rm.py, as one text: "--trunk=frozen --sentences=2000"
    refine: str = ""  # more of them from round 1 on, where there are votes: "--preference_coef=0.5"
    ppo: str = ""  # further options of train_ppo.py
    processes: int = 1  # of training, by torchrun
    # judge
    judge: str = "data"  # held-out judge: a new policy is promoted only if its 95% interval says better
    evaluate: str = ""  # further options of evaluate.py
    seed: int = 1  # of prompts, samples, votes and training

    def __post_init__(self):
        config.at_least(self, rounds=1, rater_noise=0, pairs=1, pool=1, raters=1, prompt_tokens=1, response_tokens=1)
        config.at_least(self, max_prompt=1, processes=1, seed=0)
        if (self.order == "active") != (self.pool > 1):
            raise ValueError(
                f"--order={self.order} with --pool={self.pool}: active chooses from a larger pool, random does not"
            )
        if self.rater == "people" and self.rater_noise is not None:
            raise ValueError("--rater_noise has no effect with --rater=people: they bring their own")
        if self.rater != "people" and self.raters > 1:
            raise ValueError(f"--raters={self.raters}: a simulated rater is one; leave it out")
        for name, taken in TAKEN.items():
            for word in shlex.split(getattr(self, name)):
                if (option := word.partition("=")[0].lstrip("-")) in taken:
                    raise ValueError(f"--{name} sets --{option}, which the loop itself sets; leave it out")


PROMPTS = ("sources", "prompt_tokens", "response_tokens")  # which prompts are answered, and how long
LONG = ("max_prompt", "long_prompts")  # more of that, for those who answer the data's own prompts
TAKEN = {
    "rm": ("init", "data", "out", "preferences", "seed", *PROMPTS),
    "ppo": ("init", "reward", "data", "out", "seed", *PROMPTS, *LONG),
    "evaluate": ("base", "tuned", "reward", "other_rewards", "judge", "data", "out", *PROMPTS, *LONG),
}
TAKEN["refine"] = TAKEN["rm"]


def main() -> None:
    cfg = config.parse(Config)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    run.hold(out, inherit=True)
    begin(cfg)
    store = FeedbackStore(out / "feedback.sqlite", cfg.seed)
    stage("round 0, reward model", out / "round_0/rm", reward_model_command(cfg, 0))
    rounds = []
    for k in range(1, cfg.rounds + 1):
        here, best = out / f"round_{k}", best_policy(cfg, rounds)
        clock = run.Clock()
        if not (here / "round.json").exists():
            # 1. sample    pairs of answers by the best policy so far
            sample_pairs(cfg, k, best)
            clock.lap("sample")
            # 2. collect   a vote on every pair, by people or by the simulated rater
            if waiting := collect(cfg, k, store):
                print(how_to_vote(cfg, k, waiting))
                return
            clock.lap("collect")
            # 3. refine    the reward model on the ratings and on all votes so far
            stage(f"round {k}, votes", here / "data", votes_command(cfg, here))
            stage(f"round {k}, reward model", here / "rm", reward_model_command(cfg, k))
            clock.lap("refine")
            # 4. improve   PPO against it
            stage(f"round {k}, PPO", here / "ppo", ppo_command(cfg, k, best))
            clock.lap("ppo")
            # 5. promote   only if the judge's interval says better than the best policy so far
            stage(f"round {k}, evaluation", here / "evaluation", evaluate_command(cfg, k, best))
            clock.lap("evaluate")
            write_json(here / "round.json", verdict(cfg, k, best, clock.laps))
        rounds.append(read_json(here / "round.json"))
        write_page(cfg, rounds)
    print((out / "rounds.md").read_text())


# state


def begin(cfg: Config) -> None:
    """ValueError if OUT was begun with other options or other inputs: rounds of two experiments are not comparable."""
    path = Path(cfg.out) / "run.json"
    ours = {name: value for name, value in asdict(cfg).items() if name not in ("rounds", "out")}
    if cfg.judge == "data" and own_judge(cfg.data) is None:
        raise ValueError(
            f"--judge=data: {cfg.data} brings no judge; name a reward model's directory or file.py:function"
        )
    ours |= {"init_sha256": digest_of(cfg.init), "judge_sha256": scorer_of(cfg.judge, rules=True).digest}
    ours["rater_sha256"] = None if cfg.rater == "people" else scorer_of(cfg.rater).digest
    if not path.exists():
        write_json(path, ours)
    theirs = {name: value for name, value in (config.defaults(Config) | read_json(path)).items() if name in ours}
    if changed := run.differences(theirs, ours):
        begun, says = (", ".join(f"{name}={pair[i]}" for name, pair in changed.items()) for i in (0, 1))
        raise ValueError(
            f"{cfg.out} was begun with {begun}, this command says {says}: repeat its options to go on, or choose another --out"
        )


def stage(name: str, done: Path, command: list[str]) -> None:
    """Run a command of ours unless its result is there; each of them resumes what it had begun."""
    finished = {"data": "manifest.json", "evaluation": "summary.json"}.get(done.name, "report.json")
    if (done / finished).exists():
        return
    print(f"{name}: {shlex.join(command[1:])}", flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else None
    process, passed = subprocess.Popen(command, env=env, close_fds=False), []

    def pass_on(number: int, frame) -> None:
        passed.append(number)
        process.send_signal(number)

    with signals.handled(pass_on):  # it finishes its step and saves
        code = process.wait()
    if code - 128 in signals.NUMBERS or code and passed:
        raise signals.Interrupted(passed[0] if passed else code - 128)
    if code:
        raise ValueError(f"{name} ended with {code}; what it said stands above. The same command goes on from here")


def best_policy(cfg: Config, rounds: list[dict]) -> str:
    return next((row["policy"] for row in reversed(rounds) if row["promoted"]), cfg.init)


# 1. sample


@torch.no_grad()
def sample_pairs(cfg: Config, k: int, best: str) -> None:
    """round_K/pairs.jsonl: prompt and two different answers of the best policy a line, as `rlhf.feedback` imports them."""
    file = Path(cfg.out) / f"round_{k}/pairs.jsonl"
    if file.exists():
        return
    opened, data = open_pretrained(best), open_data(cfg.data, "train")
    tokenizer, context = opened.tokenizer, opened.model.config.context
    check_fingerprint(data.fingerprint, tokenizer.fingerprint, best)
    long = dict(max_prompt=cfg.max_prompt, long_prompts=cfg.long_prompts, sources=cfg.sources)
    loader = prompts_of(
        data, 1, cfg.seed, cfg.prompt_tokens, context=context, response_tokens=cfg.response_tokens, **long
    )
    units = unseen(loader)  # different ones: two pairs of one prompt would share their split
    count = cfg.pool * cfg.pairs
    if count * k > len(units):
        raise ValueError(f"round {k} needs {count * k} different prompts, {cfg.data} has {len(units)}: lower --pairs")
    batch = drawn(loader, units, count, cfg.seed, k - 1)
    sampling = Sampling(cfg.response_tokens, opened.ends_of(data.template), tokenizer.pad)
    groups = sample_groups(opened.model.eval(), batch.prompts, batch.prompt_lengths, 2, sampling, cfg.seed + k)
    heads = None
    if cfg.order == "active":
        rm, base = f"{cfg.out}/round_{k - 1}/rm", open_pretrained(cfg.init)
        heads = load_reward_model(rm, tokenizer.fingerprint, base=base)
    rows, records = [], iter(loader.records(batch.rows))
    for g in groups:
        members = heads.member_scores(g.tokens, g.lengths, g.mask).numpy() if heads else None  # (rows, M)
        for i in range(0, len(g.tokens), 2):
            asked = None if isinstance(loader, StartLoader) else next(records).prompt
            prompt, *answers = as_texts(tokenizer, asked, g.tokens[i : i + 2], g.lengths[i : i + 2], g.mask[i : i + 2])
            if len({*answers}) == 2 and all(map(str.strip, answers)):  # a rater must have something to read
                responses = [{"model": name_of(cfg, best), "text": answer} for answer in answers]
                urgent = float(disagreement(members[i : i + 1], members[i + 1 : i + 2])[0]) if heads else 0.0
                rows.append((urgent, {"prompt": prompt, "responses": responses}))
    rows = sorted(rows, key=lambda row: -row[0])[: cfg.pairs]  # stable: in the order of the draw without heads
    write_lines(file, (row for _, row in rows))


def as_texts(
    tokenizer, asked: str | list[dict] | None, tokens: torch.Tensor, lengths: torch.Tensor, mask: torch.Tensor
) -> list[str | list[dict]]:
    """Prompt and answers. Those to a conversation (asked: its messages) are texts of their own.

    Others joined with the prompt are the texts of the whole rows: decoded alone, an answer loses its space. Where the
    beginning of a text (asked: None) ends within a character, it goes up to that one, and the answer begins with it.
    """
    if isinstance(asked, list):
        return [asked, *(tokenizer.decode(row[m].tolist()) for row, m in zip(tokens, mask))]
    whole = [tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens, lengths)]
    prompt = tokenizer.decode(tokens[0, : int(lengths[0] - mask[0].sum())].tolist())
    prompt = os.path.commonprefix([prompt, *whole])
    return [asked or prompt, *(text[len(prompt) :] for text in whole)]


def name_of(cfg: Config, policy: str) -> str:
    return "base" if policy == cfg.init else Path(policy).parent.name.replace("_", " ")


# 2. collect


def collect(cfg: Config, k: int, store: FeedbackStore) -> int:
    """Put the round's pairs before the raters; -> how many votes are missing. With none, preferences.jsonl is written."""
    here = Path(cfg.out) / f"round_{k}"
    if (here / "preferences.jsonl").exists():
        return 0
    store.import_jsonl(here / "pairs.jsonl", raters=cfg.raters)
    if cfg.rater != "people":
        simulate(cfg, store)
    if waiting := store.missing_votes():
        return waiting
    counts = store.export_jsonl(here / "preferences.jsonl")
    print(f"round {k}, votes: {', '.join(f'{name} {count}' for name, count in counts.items())}", flush=True)
    return 0


@torch.no_grad()
def simulate(cfg: Config, store: FeedbackStore) -> None:
    """Votes of a rater that is a model, and is stored as one: P(left) = sigmoid((score of left - score of right) / noise).

    The noise of Bradley and Terry's rater is by default the temperature that was fitted to the human pairs.
    """
    opened = open_pretrained(cfg.init)
    tokenizer, name = opened.tokenizer, rater_name(cfg.rater)
    rater = open_scorer(cfg.rater, tokenizer, base=opened)
    noise = rater.temperature if cfg.rater_noise is None else cfg.rater_noise
    store.add_rater(name, "model")
    while shown := store.next_comparison(name):
        left, right = rater.score(*rows_to_rate(tokenizer, shown, rater.is_function)).double().tolist()
        draw = np.random.default_rng([cfg.seed, shown.id]).random()  # of the comparison alone: the same after a stop
        chance = float(left > right) if noise == 0 else 1 / (1 + np.exp(np.clip((right - left) / noise, -700, 700)))
        store.vote(shown.id, name, "left" if draw < chance else "right", nonce=f"simulated {shown.id}")


def rater_name(spec: str) -> str:
    """How the store calls a simulated rater: names there are printable, and have at most 100 characters."""
    name = "".join(c if c.isprintable() else "?" for c in f"simulated by {spec}".strip())
    return name if len(name) <= 100 else f"simulated by ...{name[-84:]}"


def rows_to_rate(tokenizer, shown: Comparison, as_texts: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both answers behind their prompt: tokens (2, T), lengths (2,), mask (2, T) of the answers.

    As data.prepare encodes them; or `as_texts` for a function, which gets back the very texts that were compared.
    """
    chat = Chat(tokenizer) if isinstance(shown.asked, list) else None
    encoded = Encoder(tokenizer, chat).encode(Record(shown.asked, (shown.left, shown.right)))
    before, answers = encoded.prompt, encoded.answers
    if as_texts and not chat:
        answers = [[*tokenizer.encode(text), tokenizer.eos] for text in (shown.left, shown.right)]
    tokens, lengths = pad([np.array([*before, *answer]) for answer in answers], tokenizer.pad)
    t = torch.arange(tokens.shape[1])
    return tokens, lengths, (t >= len(before)) & (t < lengths[:, None])


def how_to_vote(cfg: Config, k: int, waiting: int) -> str:
    votes = Path(cfg.out) / "feedback.sqlite"
    return (
        f"round {k}: {waiting} votes are missing in {votes}. Vote on the page (#compare) or in the terminal:\n"
        f"  python serve.py --init={cfg.init} --feedback={votes}\n"
        f"  python -m rlhf.feedback --store={votes} --rater=YOUR_NAME\n"
        "then run the same command again."
    )


# 3. to 5.: the other scripts


def script(name: str, options: dict, further: str = "", processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    given = [f"--{key}={config.show(value)}" for key, value in options.items()]
    return [sys.executable, *launcher, str(ROOT / name), *given, *shlex.split(further)]


def prompt_options(cfg: Config, *more: str) -> dict:
    return {name: value for name in (*PROMPTS, *more) if (value := getattr(cfg, name)) is not None}


def votes_command(cfg: Config, here: Path) -> list[str]:
    """The votes as data of the same tokenizer, and of the same template where the prompts are conversations."""
    prepare = [
        str(ROOT / "plain_rlhf.py"),  # not -m data.prepare: where this runs may be another `data`
        "prepare",
        str(here / "preferences.jsonl"),
        f"--tokenizer={cfg.data}",
        f"--out={here / 'data'}",
    ]
    template = Path(cfg.data, TEMPLATE)
    return [sys.executable, *prepare, *([f"--template={template}"] if template.exists() else [])]


def reward_model_command(cfg: Config, k: int) -> list[str]:
    """Round 0 learns the ratings alone; round k the ratings again, and the votes of rounds 1 to k."""
    here = f"{cfg.out}/round_{k}"
    options = {"init": cfg.init, "data": cfg.data, "out": f"{here}/rm", "seed": cfg.seed, **prompt_options(cfg)}
    if k:
        options["preferences"] = f"{here}/data"
    return script("train_rm.py", options, f"{cfg.rm} {cfg.refine if k else ''}", cfg.processes)


def ppo_command(cfg: Config, k: int, best: str) -> list[str]:
    here = f"{cfg.out}/round_{k}"
    options = {"init": best if cfg.start == "policy" else cfg.init, "reward": f"{here}/rm", "data": cfg.data}
    options |= {"out": f"{here}/ppo", "seed": cfg.seed + k, **prompt_options(cfg, *LONG)}
    return script("train_ppo.py", options, cfg.ppo, cfg.processes)


def evaluate_command(cfg: Config, k: int, best: str) -> list[str]:
    here = f"{cfg.out}/round_{k}"
    tuned = ([] if best == cfg.init else [best]) + [f"{here}/ppo"]
    options = {"base": cfg.init, "tuned": ",".join(tuned), "reward": f"{here}/rm", "judge": cfg.judge}
    options |= {"other_rewards": f"{cfg.out}/round_0/rm", "data": cfg.data, "out": f"{here}/evaluation"}
    return script("evaluate.py", options | prompt_options(cfg, *LONG), cfg.evaluate)


# the verdict, and the page of rounds


def verdict(cfg: Config, k: int, best: str, seconds: dict[str, float]) -> dict:
    """Round k in numbers: old test accuracy, the reward on the policy's own samples, the judge, promoted or refused."""
    here = Path(cfg.out) / f"round_{k}"
    summary, report, first = (
        read_json(path)
        for path in (
            here / "evaluation/summary.json",
            here / "rm/report.json",
            Path(cfg.out) / "round_0/rm/report.json",
        )
    )
    new, reward, reward_0 = f"{cfg.out}/round_{k}/ppo", f"{cfg.out}/round_{k}/rm", f"{cfg.out}/round_0/rm"
    name, before = ("tuned", "base") if best == cfg.init else (new, best)
    gain = next(x for x in summary["pairwise"] if (x["a"], x["b"]) == (name, before))["judge_gain"]
    own = summary["new_distribution"][name]
    return {
        "round": k,
        "policy": new,
        "sampled_from": best,
        "votes": len(read_lines(here / "preferences.jsonl")),  # pairs that they decided, in all rounds so far
        "rm": {
            "accuracy": report["accuracy"]["all"],
            "accuracy_gap1": report["accuracy"]["1"],
            "accuracy_gap1_round_0": first["accuracy"]["1"],
            "held_out_votes": report["preferences"],
            "on_own_samples": own[reward],
            "on_own_samples_round_0": own[reward_0],
            "gain_on_own_samples": own["gain"][reward_0],
        },
        "judge": summary["rows"][name]["judge"],
        "judge_base": summary["rows"]["base"]["judge"],
        "gain_over_previous": gain,
        "kl": summary["rows"][name]["kl"],
        "promoted": gain["low"] > 0,
        "seconds": seconds,
    }


def write_page(cfg: Config, rounds: list[dict]) -> None:
    """OUT/rounds.json and rounds.md; finished rounds alone."""
    rater = "people" if cfg.rater == "people" else f"SIMULATED by {cfg.rater}, noise {config.show(cfg.rater_noise)}"
    write_json(Path(cfg.out) / "rounds.json", {"rater": rater, "judge": cfg.judge, "rounds": rounds})
    said = f"Votes by: {rater}. Judge: {cfg.judge}. 95% intervals."
    table = markdown_table(*rounds_table(rounds), rule="---")
    write_text(Path(cfg.out) / "rounds.md", f"{said}\n\n{table}\n")


if __name__ == "__main__":
    config.run(main)
