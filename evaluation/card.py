"""The report card of a reward model: what it knows, beside what it has to beat; whether its probabilities can be believed;
whether it knows when it is wrong; and what moves its score that should not.

python evaluate.py rm --model=out/rm --data=out/data/vader
python evaluate.py rm --model=out/rm --data=pairs.jsonl --out=out/card
"""

import importlib.util
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.baselines import CEILINGS, GAPS, agreement, learned_scores, pair_clusters
from data.chat import Chat
from data.containers import Bad, Piece, read, sniff
from data.encoding import Encoder
from data.formats import KNOWN, reader_of
from data.judge import own_judge
from data.loader import cut, open_data, pad
from data.pairs import MOST_TRAINING_PAIRS, SomeAnswers, some_prompts
from data.records import Message, Record
from data.tokenizer import Tokenizer, check_fingerprint, load_tokenizer
from evaluation import probes
from evaluation.words import Table, as_json, markdown_table, show
from rlhf.calibration import reliability_bins
from rlhf.infra import checkpoint, config, distributed, run
from rlhf.infra.files import read_json, write_json, write_text
from rlhf.infra.precision import PrecisionName, chosen
from rlhf.lm.pretrained import is_hf
from rlhf.reward.bridge import open_reader
from rlhf.reward.files import check_form, load_reward_model, template_of
from rlhf.reward.model import FrozenReward, RewardModel
from rlhf.reward.scorer import digest_of_model
from rlhf.statistics import (
    Estimate,
    auc,
    cluster_bootstrap,
    pair_calibration,
    partial_spearman,
    roc,
    spearman,
    win_rate,
)


@dataclass(frozen=True)
class Config:
    model: str = "out/rm"  # reward model: a run or checkpoint of train_rm.py, or an HF sequence classifier's directory
    data: str = "out/data/vader"  # directory made by data.prepare, or a file of comparisons in any form that it reads
    split: Literal["validation", "test"] | None = None  # of the directory; none = test
    out: str | None = None  # directory for card.json, card.md and the plots; none = the model's run
    sentences: int | None = None  # at most so many prompts or texts, every source with its share; none = all
    probe_texts: int = 200  # at most so many texts are changed by each probe
    chat: bool | None = None  # texts as prompts of a file are a user's messages; none = if the model learned from such
    precision: PrecisionName = "auto"  # of matrix products; auto = bf16 where that is fast, else fp32
    plots: bool | None = None  # draw the plots, which needs matplotlib; none = if it is installed

    def __post_init__(self):
        config.at_least(self, sentences=2, probe_texts=2)
        if self.chat is not None and not Path(self.data).is_file():
            raise ValueError(f"--chat has no effect: {self.data} was prepared with a template, or without")


BINS = 10  # of the reliability diagram
COVERAGE = (1.0, 0.75, 0.5, 0.25)  # share of the pairs that the model is allowed to answer, the surest first


def main() -> None:
    cfg = config.parse(Config)
    device = distributed.setup().device
    out = Path(cfg.out or run_of(cfg.model))
    drawn = can_draw(cfg.plots)

    # 1. read: the model, the texts, and which of two people prefer
    cfg, dtype = chosen(cfg, device)
    reward_model, tokenizer, encode = open_model(cfg, device, dtype)
    material = read_material(cfg, tokenizer)

    # 2. score: every text once, as it is and as the probes change it
    originals = [encode(text, text.text) for text in material.texts]
    changes = planned_probes(material, originals, encode, cfg.probe_texts)
    rows = [*originals, *(row for change in changes for side in (change.before, change.after) for row in side)]
    scores, members = score_rows(reward_model, rows, tokenizer.pad, device)

    # 3. report
    card = {
        "model": cfg.model,
        "sha256": digest_of_model(cfg.model),
        "data": cfg.data,
        "texts": len(originals),
        "pairs": len(material.chosen),
        "dropped": list(material.dropped),
        "shortened": sum(row.shortened for row in originals),
        **report(material, scores[: len(originals)], members[: len(originals)], float(reward_model.temperature)),
        "probes": probe_results(material, changes, scores, len(originals)),
        "options": asdict(cfg),
        "seconds": run.seconds_used(),
    }
    out.mkdir(parents=True, exist_ok=True)
    files = draw(card, out) if drawn else []
    text = markdown(card, files)
    write_json(out / "card.json", card)
    write_text(out / "card.md", text)
    print(text)
    if not drawn and cfg.plots is None:
        print("no plots: matplotlib is not installed (the extra plot has it)")
    print(f"{card['seconds']:.0f} s -> {out}: {', '.join(['card.json', 'card.md', *files])}")


def open_model(
    cfg: Config, device, dtype: torch.dtype
) -> tuple[RewardModel | FrozenReward, Tokenizer, Callable[..., "Row"]]:
    """The reward model, its tokenizer, and encode(asked, text, ended=True) -> Row in the form that it knows."""
    if not is_hf(Path(cfg.model)):
        tokenizer, template = load_tokenizer(checkpoint.resolve(cfg.model)), template_of(cfg.model)
        if cfg.chat and template is None:
            raise ValueError(f"--chat=true: {cfg.model} was trained without a chat template; leave it out")
        if Path(cfg.data).is_dir():
            check_form(cfg.model, open_data(cfg.data, cfg.split or "test"))
        model = load_reward_model(cfg.model, tokenizer.fingerprint, device, dtype=dtype)
        context = (model.states.model if isinstance(model, FrozenReward) else model.model).config.context
        chat = Chat(tokenizer) if template and cfg.chat is not False else None
        return model, tokenizer, encoder(tokenizer, chat, context)
    reader = open_reader(cfg.model, device, dtype)
    if reader.model.ours:
        chat = Chat(reader.tokenizer) if cfg.chat else None
        return reader.model, reader.tokenizer, encoder(reader.tokenizer, chat, reader.context)
    if cfg.chat and reader.chat is None:
        raise ValueError(f"--chat has no effect: {cfg.model} has no chat template")
    print(
        f"{cfg.model} is asked as HF's pipeline asks it: its own tokenizer, cut from the left to {reader.context} tokens"
    )

    def encode(asked: Text, text: str, ended: bool = True) -> Row:
        messages = asked.prompt if isinstance(asked.prompt, list) else [{"role": "user", "content": asked.prompt}]
        if cfg.chat or isinstance(asked.prompt, list):
            ids = reader.conversation(messages, text, ended)
        else:
            ids = reader.text(asked.prompt + text, ended)
        return Row(reader.fitted(ids), len(ids) > reader.context)

    return reader.model, reader.tokenizer, encode


def run_of(path: str) -> Path:
    """The run directory of a checkpoint: itself, or the one that holds this step."""
    return Path(path).parent if re.fullmatch(r"step_\d+", Path(path).name) else Path(path)


def beats_length(reward: str) -> None:
    """ValueError unless the reward model at `reward` ranks pairs better than length alone, by its card or its report.

    By its card it does where the whole 95% interval of the difference is above 0; train_rm.py's report has no interval.
    """
    card, report = (run_of(reward) / name for name in ("card.json", "report.json"))
    if card.exists():
        found = read_json(card)
        if found["sha256"] != digest_of_model(reward):
            raise ValueError(f"{card} is about other weights than {reward}: make it again with evaluate.py rm")
        over = found["over_length"]
        good, margin = over["low"] > 0, show(over, "+.3f")
        source = f"{card}, {found['pairs']} pairs"
    elif report.exists() and "accuracy" in (found := read_json(report)):
        both = found["accuracy"]["all"], found["baselines"]["length"]["all"]
        over = math.nan if None in both else both[0] - both[1]
        good, margin, source = over > 0, f"{over:+.3f}", str(report)
    else:  # weights without their report, or no reward model at all
        return
    if not good:
        raise ValueError(
            f"reward model {reward} does not beat length alone: accuracy {margin} beside it ({source}); train it "
            "better, or accept it with --weak_reward=true"
        )


# --- what is read ---


class Text(NamedTuple):
    prompt: str | list[Message]  # "" where the text answers nothing
    text: str
    before: np.ndarray | None = None  # tokens of the prompt as data.prepare made them


class Row(NamedTuple):
    tokens: np.ndarray  # (T,)
    shortened: bool  # to the model's context
    begins: int = 0  # where the answer begins


@dataclass(frozen=True)
class Material:
    """Texts, and which of two people prefer."""

    texts: list[Text]
    group: np.ndarray  # (texts,) domain or subset
    groups: list[str]  # their names
    chosen: np.ndarray  # (pairs,) rows of the better text
    rejected: np.ndarray  # (pairs,)
    gaps: dict[str, np.ndarray]  # (pairs,) bool: pairs whose ratings differ by more than so many points
    clusters: np.ndarray  # (pairs, K) what was sampled: both sentences of a pair, or its prompt
    text_clusters: np.ndarray  # (texts, 1)
    ratings: np.ndarray | None  # (texts,) mean human rating
    baselines: dict[str, np.ndarray]  # (texts,) scores of what the reward model has to beat, "length" among them
    ceilings: dict[str, tuple[np.ndarray, np.ndarray]]  # (pairs,) right, (pairs,) gap: what people reach
    dropped: tuple[str, ...] = ()  # rows of a file that were turned away, and why

    @property
    def answers(self) -> bool:
        """Do the texts answer prompts?"""
        return any(text.prompt for text in self.texts)


def read_material(cfg: Config, tokenizer: Tokenizer) -> Material:
    """The pairs of prepared data or of a file; ValueError for options that have no effect on what --data is."""
    if Path(cfg.data).is_file():
        if cfg.split:
            raise ValueError(f"--split has no effect: {cfg.data} is a file, without splits")
        return comparisons(cfg)
    return prepared(cfg, tokenizer)


def prepared(cfg: Config, tokenizer: Tokenizer) -> Material:
    """Answers with their pairs, and with their ratings where people gave some."""
    data = open_data(cfg.data, cfg.split or "test")
    ours = not is_hf(Path(cfg.model))  # what HF's classifiers are given is text
    if ours:
        check_fingerprint(data.fingerprint, tokenizer.fingerprint, str(data))
    some = SomeAnswers(data, some_prompts(data, cfg.sentences, seed=1))
    ratings, chosen, rejected, gap = (
        np.array(some.column(name)) for name in ("rating", "pair_chosen", "pair_rejected", "pair_gap")
    )
    if not len(gap):
        raise ValueError(f"{data} has no pairs among {len(some)} answers: use more (--sentences)")
    baselines = learned_scores(SomeAnswers(open_data(cfg.data, "train"), most_pairs=MOST_TRAINING_PAIRS), some)
    if rules := own_judge(cfg.data):
        baselines["rules"] = np.array([rules(text) for text in some.texts])
    prompts = data.prompt_of(some.answers)
    return Material(
        texts=texts_of(some, prompts, ours),
        group=np.array(some.column("domain")),
        groups=some.domains,
        chosen=chosen,
        rejected=rejected,
        gaps={name: gap > least for name, least in GAPS.items() if (gap > least).any()},
        clusters=pair_clusters(some),
        text_clusters=np.unique(prompts, return_inverse=True)[1][:, None],
        ratings=ratings if data.has("score") and not np.isnan(ratings).any() else None,
        baselines=baselines,
        ceilings={
            name: agreement(*map(some.column, columns), some)
            for name, columns in CEILINGS.items()
            if some.has(*columns)
        },
    )


def texts_of(some: SomeAnswers, prompts: np.ndarray, tokens: bool) -> list[Text]:
    """The answers behind their prompts: (answers,) numbers. tokens: the prompts' own, too."""
    first, found, last = some.data.answers_of(prompts)[:, 0], [], -1
    for prompt, nth in zip(prompts, some.answers - first):
        if prompt != last:
            record, before, last = some.data.record(prompt), some.data.prompt(prompt) if tokens else None, prompt
        found.append(Text(record.prompt, record.answers[nth], before))
    return found


def comparisons(cfg: Config) -> Material:
    """The comparisons of a file, in any form that data.prepare reads; of several answers all that people compared."""
    records, turned_away = read_file(cfg.data)
    records = [record for record in records if record.pairs]
    if not records:
        why = f" ({len(turned_away)} rows turned away: {turned_away[0]})" if turned_away else ""
        raise ValueError(f"{cfg.data} holds no comparison of two different answers{why}")
    if cfg.sentences is not None:
        records = [records[i] for i in np.sort(np.random.default_rng(1).permutation(len(records))[: cfg.sentences])]
    groups = list(dict.fromkeys(record.source for record in records))
    number = {group: i for i, group in enumerate(dict.fromkeys(record.group for record in records))}
    texts = [Text(record.prompt, answer) for record in records for answer in record.answers]
    sizes = [len(record.answers) for record in records]
    first = np.cumsum(sizes) - sizes
    pairs = np.array([(n + x.winner, n + x.loser) for n, record in zip(first, records) for x in record.pairs])
    prompt = np.repeat([number[record.group] for record in records], sizes)
    longer = np.array([len(text.text) for text in texts], float)
    liked = win_rate(longer[pairs[:, 0]], longer[pairs[:, 1]]).mean() >= 0.5  # in hindsight: no training split to tell
    return Material(
        texts=texts,
        group=np.repeat([groups.index(record.source) for record in records], sizes),
        groups=groups,
        chosen=pairs[:, 0],
        rejected=pairs[:, 1],
        gaps={"all": np.ones(len(pairs), bool)},
        clusters=prompt[pairs[:, :1]],
        text_clusters=prompt[:, None],
        ratings=None,
        baselines={"length": longer if liked else -longer},
        ceilings={},
        dropped=tuple(turned_away),
    )


def read_file(path: str) -> tuple[list[Record], list[str]]:
    """The records of a file, and the rows that are none, each with its line and the reason."""
    container = sniff(Path(path), KNOWN)
    sample = (row for _, row in itertools.islice(read(Piece(container)), 100))
    reader, records, turned_away = reader_of(sample, source=Path(path).name.split(".")[0]), [], []
    for line, row in read(Piece(container)):
        try:
            _, found = reader.records(row)
        except ValueError as e:
            found = [Bad(str(e))]
        turned_away += [f"line {line}: {one.reason}" for one in found if isinstance(one, Bad)]
        records += [one for one in found if isinstance(one, Record)]
    return records, turned_away


def encoder(tokenizer: Tokenizer, chat: Chat | None, context: int) -> Callable[..., Row]:
    """encode(asked, text, ended=True) -> Row: the prompt of `asked` and this text behind it; at most `context` tokens.

    Both are encoded apart, as a policy continues an encoded prompt, and as data.prepare does: conversations, and with
    `chat` plain prompts as a message of the user, in the template. Of what is too long the prompt is cut from the left, and
    only where the text alone does not fit it keeps its beginning and its end. ended: with what ends an answer.
    """

    def encode(asked: Text, text: str, ended: bool = True) -> Row:
        prompt = asked.prompt
        if isinstance(prompt, str) and prompt and chat:
            prompt = [{"role": "user", "content": prompt}]
        encoded = Encoder(tokenizer, chat).encode(Record(prompt, (text,)))
        answer = np.array(encoded.answers[0], np.int64)
        before = np.array(encoded.prompt if asked.before is None else asked.before, np.int64)
        answer = answer if ended else answer[:-1]
        if len(before) + len(answer) <= context:
            return Row(np.append(before, answer), False, len(before))
        kept = before[cut(before, max(1, context - len(answer)), tokenizer.start)]
        if len(kept) + len(answer) > context:
            answer = np.append(answer[: context - len(kept) - 1], answer[-1])
        return Row(np.append(kept, answer), True, len(kept))

    return encode


# --- scores ---


@torch.no_grad()
def score_rows(
    reward_model, rows: Sequence[Row], pad_id: int, device, tokens_per_batch: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Score (N,) and the members' scores (N, M) of every row; equal rows are read once, those of equal length together."""

    def key(row: Row) -> tuple[bytes, int]:
        return row.tokens.tobytes(), row.begins

    places = {key(row): row for row in rows}
    distinct = sorted(places.values(), key=lambda row: len(row.tokens))
    batches, start = [], 0
    for i, row in enumerate(distinct):  # the longest so far is the last
        if (i + 1 - start) * len(row.tokens) > tokens_per_batch and i > start:
            batches.append(distinct[start:i])
            start = i
    batches.append(distinct[start:])
    found = {}
    for batch in tqdm(batches, desc="score", leave=False, disable=None):
        tokens, lengths = (x.to(device) for x in pad([row.tokens for row in batch], pad_id))
        raw = reward_model(tokens, lengths, torch.tensor([row.begins for row in batch], device=device))  # (B, M)
        both = torch.cat([reward_model.combined(raw)[:, None], reward_model.members_of(raw)], 1)
        found |= dict(zip(map(key, batch), both.cpu().double().numpy()))
    both = np.stack([found[key(row)] for row in rows])
    return both[:, 0], both[:, 1:]


# --- the report ---


def report(material: Material, scores: np.ndarray, members: np.ndarray, temperature: float) -> dict:
    """All but the probes: scores (texts,), members (texts, M)."""
    a, b = material.chosen, material.rejected
    difference = scores[a] - scores[b]  # (pairs,) > 0 is right
    length = np.array([len(text.text) for text in material.texts])  # characters: the same for every tokenizer
    longer = length[a] - length[b]

    right = {"reward model": win_rate(scores[a], scores[b])}
    right |= {name: win_rate(x[a], x[b]) for name, x in material.baselines.items()}
    right["over_length"] = right["reward model"] - right["length"]

    by_group = {}
    for i, name in enumerate(material.groups):
        inside = material.group[a] == i
        by_group |= {(name, gap): inside & material.gaps[gap] for gap in ("all", "1") if gap in material.gaps}
    low, high = np.quantile(longer, [1 / 3, 2 / 3])
    by_length = {
        "the better text is longer": longer > 0,
        "equally long": longer == 0,
        "the better text is shorter": longer < 0,
        f"lowest third of the differences (up to {low:+.0f})": longer <= low,
        "middle third": (longer > low) & (longer <= high),
        f"highest third (above {high:+.0f})": longer > high,
    }
    found = accuracies(right, material.gaps | by_group | by_length, material.clusters)
    ours, over = found.pop("reward model"), found.pop("over_length")
    table = {name: {gap: row[gap] for gap in material.gaps if gap in row} for name, row in found.items()}
    for name, (agrees, gap) in material.ceilings.items():
        groups = {key: gap > least for key, least in GAPS.items()}
        table |= accuracies({name: agrees}, groups, material.clusters)

    groups = {
        name: {gap: ours[name, gap] for gap in ("all", "1") if (name, gap) in ours} for name in material.groups if name
    }
    right_in = {name: inside for (name, gap), inside in by_group.items() if gap == "all"}
    result = {
        **rewardbench(right["reward model"], right_in, material.clusters),
        "accuracy": {gap: ours[gap] for gap in material.gaps if gap in ours},
        "baselines": table,
        "over_length": over["all"],
        "groups": groups,
        "length": {name: ours[name] for name in by_length if name in ours},
        "auc": ranking(material, scores),
        "calibration": calibration(difference, material.clusters, temperature),
        "uncertainty": uncertainty(difference, members[a] - members[b], material.clusters),
        "length_correlation": length_correlation(material, scores, length),
    }
    if material.ratings is not None:
        result["middle"] = middle_of(material.ratings)
        result["spearman"] = correlate(spearman, material.text_clusters, scores, material.ratings)
        for i, name in enumerate(material.groups):
            rows = material.group == i
            if rows.sum() > 2:
                columns = (material.text_clusters, scores, material.ratings)
                groups.setdefault(name, {})["spearman"] = correlate(spearman, *(x[rows] for x in columns))
    return result


def estimate(value: float, interval: Sequence[float], n: int) -> dict:
    """With its 95% interval and what it was counted on."""
    return as_json(value, *interval, "value", n=int(n))


def accuracies(right: dict[str, np.ndarray], groups: dict, clusters: np.ndarray) -> dict[str, dict]:
    """Mean of every `right` (pairs,) in every group of pairs that is not empty, drawn together: {name: {group: estimate}}."""
    groups = {name: pairs for name, pairs in groups.items() if pairs.any()}
    values = np.stack(list(right.values()), 1)  # (pairs, S)
    inside = np.stack(list(groups.values())).astype(float)  # (G, pairs)

    def means(w: np.ndarray) -> np.ndarray:
        weight = inside * w
        with np.errstate(invalid="ignore"):  # a group that is not in this resample
            return ((weight @ values) / weight.sum(1, keepdims=True)).ravel()

    points = means(np.ones(len(values)))
    found = [
        estimate(x, interval, pairs.sum())
        for x, interval, pairs in zip(
            points, cluster_bootstrap(means, clusters), (p for p in groups.values() for _ in right)
        )
    ]
    return {name: dict(zip(groups, found[i :: len(right)])) for i, name in enumerate(right)}


SECTIONS = {  # of RewardBench (Lambert et al. 2024, arXiv:2403.13787, table 1)
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}  # fmt: skip


def rewardbench(right: np.ndarray, groups: dict[str, np.ndarray], clusters: np.ndarray) -> dict:
    """RewardBench's sections and its score, their mean, where all four are there; {} for other data. right (pairs,)

    A section is the mean over its pairs; in Reasoning math weighs as much as all of the code (section 4.3 of the paper).
    """
    weights = {}
    for section, subsets in SECTIONS.items():
        there = {name: groups[name] for name in subsets if name in groups and groups[name].any()}
        if not there:
            return {}
        weight = sum(inside.astype(float) for inside in there.values())
        code = sum(inside.sum() for name, inside in there.items() if name != "math-prm")
        if "math-prm" in there and code:
            weight[there["math-prm"]] *= code / there["math-prm"].sum()
        weights[section] = weight

    def means(w: np.ndarray) -> np.ndarray:
        found = np.array([(x * w) @ right / ((x * w).sum() or np.nan) for x in weights.values()])
        return np.append(found, found.mean())

    points, intervals = means(np.ones(len(right))), cluster_bootstrap(means, clusters)
    counts = [int((x > 0).sum()) for x in weights.values()]
    names = [*SECTIONS, "RewardBench"]
    found = zip(names, points, intervals, [*counts, sum(counts)])
    return {"rewardbench": {name: estimate(x, interval, n) for name, x, interval, n in found}}


def correlate(measure: Callable, clusters: np.ndarray, *columns: np.ndarray) -> dict:
    """measure(*columns, weights) with its interval."""
    (interval,) = cluster_bootstrap(lambda w: measure(*columns, w), clusters)
    return estimate(measure(*columns), interval, len(clusters))


def ranking(material: Material, scores: np.ndarray) -> dict:
    """AUC of one text at a time: rated above the middle against below, or chosen against rejected over all prompts."""
    if material.ratings is None:
        label = np.zeros(len(scores), bool)
        label[material.chosen] = True
        kept = np.ones(len(scores), bool)
    else:
        middle = middle_of(material.ratings)
        label, kept = material.ratings > middle, material.ratings != middle
    return correlate(auc, material.text_clusters[kept], scores[kept], label[kept])


def middle_of(ratings: np.ndarray) -> float:
    """What divides good from bad: 0 on a scale with both signs, else the mean."""
    return 0.0 if ratings.min() < 0 < ratings.max() else float(ratings.mean())


def calibration(difference: np.ndarray, clusters: np.ndarray, temperature: float) -> dict:
    """Reliability, ECE and Brier score at temperature 1 and at the stored one, see `pair_calibration`."""
    margin = torch.from_numpy(np.abs(difference))
    right = torch.from_numpy(win_rate(difference, np.zeros(len(difference))))
    result = {"temperature": temperature}
    for name, t in (("before", 1.0), ("after", temperature)):
        bins = reliability_bins(torch.sigmoid(margin / t), right, BINS)
        found = pair_calibration(difference, t, clusters, BINS)
        ece, brier = (estimate(x[0], x[1:], len(difference)) for x in (found["ece"], found["brier"]))
        observed = [estimate(x[0], x[1:], n) for x, n in zip(found["observed"], bins.count.tolist())]
        rows = [{"predicted": x, "observed": o} for x, o in zip(bins.predicted.tolist(), observed) if o["n"]]
        result[name] = {"ece": ece, "brier": brier, "reliability": rows}
    return result


def uncertainty(difference: np.ndarray, members: np.ndarray, clusters: np.ndarray) -> dict:
    """Does it know when it is wrong? difference (pairs,), members (pairs, M) of the same pairs.

    Doubt is a small difference; with several members also their disagreement, the deviation of their differences. Its AUC:
    P(more doubt about a pair that is ranked wrong than about one that is ranked right).
    """
    wrong = difference <= 0
    doubts = {"difference": -np.abs(difference)}
    if members.shape[1] > 1:
        doubts["disagreement"] = members.std(1)
    surest = np.argsort(-np.abs(difference), kind="stable")
    result = {"members": members.shape[1], "errors": float(wrong.mean()), "auc": {}, "roc": {}}
    for name, doubt in doubts.items():
        result["auc"][name] = correlate(auc, clusters, doubt, wrong)
        curve = np.stack(roc(doubt, wrong), 1)
        result["roc"][name] = curve[np.linspace(0, len(curve) - 1, 101).round().astype(int)].tolist()  # enough to draw
    kept = {share: surest[: max(1, round(share * len(surest)))] for share in COVERAGE}
    result["coverage"] = {f"{share:.0%}": float(1 - wrong[rows].mean()) for share, rows in kept.items()}
    if members.shape[1] > 1:
        quarters = np.array_split(np.argsort(doubts["disagreement"], kind="stable"), 4)
        result["disagreement"] = [
            {"mean": float(doubts["disagreement"][rows].mean()), "errors": float(wrong[rows].mean())}
            for rows in quarters
            if len(rows)
        ]
    return result


def length_correlation(material: Material, scores: np.ndarray, length: np.ndarray) -> dict:
    """Rank correlation of score and length: at equal rating; where there are none, of the differences within a pair."""
    if material.ratings is None:
        a, b = material.chosen, material.rejected
        found = correlate(spearman, material.clusters, scores[a] - scores[b], (length[a] - length[b]).astype(float))
        return found | {"of": "differences within a pair", "passed": None, "verdict": "-"}
    found = correlate(partial_spearman, material.text_clusters, scores, length, material.ratings)
    moved = found["value"] is not None and abs(found["value"]) > probes.MEAN_SHIFT and found["low"] * found["high"] > 0
    text = "depends on length although people do not" if moved else "stays"
    return found | {"of": "texts at equal rating", "passed": not moved, "verdict": text}


# --- probes ---


@dataclass(frozen=True)
class Comparison:
    """What one probe compares."""

    name: str
    expect: probes.Expect
    texts: np.ndarray  # (n,) which of the material's
    before: list[Row]
    after: list[Row]
    of_original: bool  # is `before` the text as it is?


def planned_probes(material: Material, originals: list[Row], encode: Callable, count: int) -> list[Comparison]:
    """Up to `count` texts, changed by every probe that applies to them; a probe that applies to none is left out."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(originals))[:count])
    planned = []
    for probe in probes.probes(material.answers):
        rows, before, after = [], [], []
        for i in chosen:
            asked, text = material.texts[i], material.texts[i].text
            changed = probe.change(text, int(i))
            if changed is not None and changed != text:
                rows.append(i)
                before.append(encode(asked, probe.against(text, int(i))) if probe.against else originals[i])
                after.append(encode(asked, changed, probe.ended))
        if rows:
            planned.append(Comparison(probe.name, probe.expect, np.array(rows), before, after, probe.against is None))
    return [*planned, *swapped_prompts(material, originals, encode, chosen)]


PROMPT_TOKENS = 4  # what counts as the prompt of a text that answers none: as PPO's default


def swapped_prompts(material: Material, originals: list[Row], encode: Callable, chosen: np.ndarray) -> list[Comparison]:
    """The same answer behind the prompt of the next text with another one; it should lose.

    A text that answers nothing gets the first four tokens of the next: what people would think of that is not known.
    """
    rows, after = [], []
    for i, j in zip(chosen, np.roll(chosen, -1)):
        if material.answers:
            others = (material.texts[k] for k in np.roll(chosen, -int(np.searchsorted(chosen, i))))
            other = next((text for text in others if text.prompt != material.texts[i].prompt), None)
            changed = None if other is None else encode(other, material.texts[i].text)
        else:
            own, theirs = originals[i].tokens, originals[j].tokens
            enough = min(len(own), len(theirs)) > PROMPT_TOKENS + 2  # bos and eos
            tokens = np.concatenate([theirs[: 1 + PROMPT_TOKENS], own[1 + PROMPT_TOKENS :]])
            changed = Row(tokens, False, originals[i].begins) if enough else None
        if changed is not None:
            rows.append(i)
            after.append(changed)
    name = "answer behind another prompt" if material.answers else "first four tokens of another text"
    expect = "down" if material.answers else "any"
    return [Comparison(name, expect, np.array(rows), [originals[i] for i in rows], after, True)] if rows else []


def probe_results(material: Material, changes: list[Comparison], scores: np.ndarray, texts: int) -> list[dict]:
    """What every probe did: scores (all rows,) of the `texts` originals, then before and after of every change."""
    original, results, at = scores[:texts], [], texts
    deviation = float(original.std())
    if not deviation > 0:
        raise ValueError(f"the reward model gives all {texts} texts the same score: it is untrained")
    for change in changes:
        n = len(change.texts)
        before, after = scores[at : at + n], scores[at + n : at + 2 * n]
        at += 2 * n
        right = None
        if change.of_original:
            gamed = np.full(texts, np.nan)
            gamed[change.texts] = after
            pairs = ~np.isnan(gamed[material.rejected])  # the worse text can be changed
            a, b = material.chosen[pairs], material.rejected[pairs]
            right = win_rate(original[a], original[b]), win_rate(original[a], gamed[b])
        clusters = material.text_clusters[change.texts]
        measured = probes.measure(change.expect, before, after, deviation, clusters, right)
        results.append({"name": change.name, **measured})
    return results


# --- files ---


def can_draw(wanted: bool | None) -> bool:
    """Whether to draw; ValueError where plots are wanted and cannot be."""
    installed = importlib.util.find_spec("matplotlib") is not None
    if wanted and not installed:
        raise ValueError("--plots=true needs matplotlib: install the extra plot, or leave --plots out")
    return installed if wanted is None else wanted


NAMES = {
    "rules": "rules of the data",
    "bow": "bag of words, trained on all labels",
    "human": "half of the raters against the other half",
    "one_rater": "one person against the mean of the others",
}


def markdown(card: dict, plots: Sequence[str] = ()) -> str:
    """The card for people."""
    return (
        "\n\n".join(
            [
                *headlines(card),
                "## Accuracy",
                *accuracy_part(card),
                "## Length",
                *length_part(card),
                "## Calibration",
                *calibration_part(card["calibration"]),
                "## Does it know when it is wrong?",
                *doubt_part(card["uncertainty"]),
                "## What moves the score",
                *probes_part(card["probes"]),
                *(f"![{Path(file).stem}]({file})" for file in plots),
            ]
        )
        + "\n"
    )


def headlines(card: dict) -> list[str]:
    """Title, what it was measured on, and the four sentences."""
    over, calibration, doubt = card["over_length"], card["calibration"], card["uncertainty"]
    failed = [probe["name"] for probe in card["probes"] if probe["passed"] is False]
    better = "beats" if over["low"] > 0 else "is not shown to beat"
    knows = "knows" if (doubt["auc"]["difference"]["low"] or 0) > 0.5 else "is not shown to know"
    said = [
        f"- It {better} length alone: accuracy {show(over, '+.3f')} beside it.",
        f"- Calibration: ECE {show(calibration['after']['ece'])} with the stored temperature "
        f"{calibration['temperature']:.2f} ({show(calibration['before']['ece'])} without).",
        f"- It {knows} when it is wrong: AUC {show(doubt['auc']['difference'])}, where 0.5 is chance.",
        f"- Probes: {len(card['probes'])}, of which {len(failed)} failed"
        + (f": {', '.join(failed)}." if failed else "."),
    ]
    return [
        f"# Report card: {card['model']}",
        f"{card['texts']} texts, {card['pairs']} pairs of {card['data']}; 95% intervals by resampling "
        + ("texts" if "spearman" in card else "prompts")
        + (f"; {len(card['dropped'])} rows turned away ({card['dropped'][0]})" if card["dropped"] else "")
        + (f"; {card['shortened']} texts shortened to the model's context" if card["shortened"] else ""),
        "\n".join(said),
    ]


def accuracy_part(card: dict) -> list[str]:
    """Pairs beside the baselines, one text at a time, and by domain."""
    middle = f"{card.get('middle', 0):.3g}"
    rank = f"rated above {middle} against below" if "spearman" in card else "chosen against rejected, over all prompts"
    alone = f"One text at a time: AUC {show(card['auc'])} ({rank})"
    if "spearman" in card:
        alone += f"; Spearman with the mean rating {show(card['spearman'])}"
    tables = [accuracy_table(card), *([groups_table(card["groups"])] if card["groups"] else [])]
    if sections := card.get("rewardbench"):
        rows = [[name, show(x), str(x["n"])] for name, x in sections.items()]
        tables.append(Table(["section of RewardBench", "accuracy", "pairs"], rows))
    first, *groups = (markdown_table(*table) for table in tables)
    return [first, alone, *groups]


def accuracy_table(found: dict, shown: Callable = show) -> Table:
    """Of a card, or with `shown` = number of what train_rm.py reports."""
    gaps = [gap for gap in GAPS if gap in found["accuracy"]]
    rows = {"**reward model**": found["accuracy"], **found["baselines"]}
    rows = [[NAMES.get(name, name), *(shown(row.get(gap)) for gap in gaps)] for name, row in rows.items()]
    return Table(["pairs ranked right", *map(gap_name, gaps)], rows)


def gap_name(gap: str) -> str:
    return "all" if gap == "all" else f"gap > {gap}"


def groups_table(groups: dict[str, dict]) -> Table:
    head = {"all": "accuracy", "1": "gap > 1", "spearman": "Spearman"}
    some = [key for key in head if any(key in row for row in groups.values())]
    rows = [
        [name, *(show(row.get(key)) for key in some), str(row["all"]["n"]) if "all" in row else "0"]
        for name, row in groups.items()
    ]
    return Table(["source", *(head[key] for key in some), "pairs"], rows)


def length_part(card: dict) -> list[str]:
    rows = [[name, show(x), str(x["n"])] for name, x in card["length"].items()]
    found = card["length_correlation"]
    return [
        markdown_table(["characters, better minus worse text", "accuracy", "pairs"], rows),
        f"Rank correlation of score and length, {found['of']}: {show(found, '+.3f')}: {found['verdict']}",
    ]


def calibration_part(calibration: dict) -> list[str]:
    bins = calibration["after"]["reliability"]
    return [
        markdown_table(*calibration_table(calibration)),
        markdown_table(
            ["probability of the side it prefers, with temperature", "share where people do", "pairs"],
            [[f"{x['predicted']:.3f}", show(x["observed"]), str(x["observed"]["n"])] for x in bins],
        ),
    ]


def calibration_table(calibration: dict) -> Table:
    sides = (("without", "1", "before"), ("with", f"{calibration['temperature']:.2f}", "after"))
    rows = [[name, t, *(show(calibration[when][key]) for key in ("ece", "brier"))] for name, t, when in sides]
    return Table(["temperature", "its value", "ECE", "Brier"], rows)


def doubt_part(doubt: dict) -> list[str]:
    named = {"difference": "small difference", "disagreement": f"disagreement of {doubt['members']} members"}
    parts = [
        markdown_table(["doubt", "AUC against error"], [[named[name], show(x)] for name, x in doubt["auc"].items()]),
        markdown_table(*coverage_table(doubt["coverage"])),
    ]
    if "disagreement" in doubt:
        quarters = doubt["disagreement"]
        parts.append(
            markdown_table(
                ["quarter by disagreement", *(f"{x['mean']:.3f}" for x in quarters)],
                [["share ranked wrong", *(f"{x['errors']:.3f}" for x in quarters)]],
            )
        )
    return parts


def coverage_table(coverage: dict[str, float]) -> Table:
    return Table(["surest pairs", *coverage], [["accuracy", *(f"{x:.3f}" for x in coverage.values())]])


def probes_part(found: list[dict]) -> list[str]:
    return [
        "Shift of the score in its deviations between texts; the last two numbers are accuracies where the worse text of "
        "a pair is left as it is, and where it alone is changed.",
        markdown_table(*probes_table(found)),
    ]


def probes_table(found: list[dict]) -> Table:
    head = ["change of the text", "mean shift of the score", "mean size", "texts", "verdict", "accuracy", "gamed"]
    return Table(head, [probe_row(probe) for probe in found])


def probe_row(probe: dict) -> list[str]:
    shift = f"{Estimate(probe['mean_shift'], probe['low'], probe['high']):+.3f}"
    gamed = [f"{probe[key]:.3f}" if key in probe else "-" for key in ("accuracy", "accuracy_gamed")]
    mark = "**" if probe["passed"] is False else ""
    size = f"{probe['mean_absolute_shift']:.3f}"
    return [probe["name"], shift, size, str(probe["texts"]), f"{mark}{probe['verdict']}{mark}", *gamed]


def draw(card: dict, out: Path) -> list[str]:
    """reliability.png, roc.png and, where pairs have a gap, gaps.png; returns their names."""
    from matplotlib.figure import Figure

    def errors(rows: list[dict]) -> np.ndarray:
        """Distances to both ends of the intervals (2, n), as matplotlib wants them."""
        values, low, high = (np.array([x[key] for x in rows], float) for key in ("value", "low", "high"))
        return np.nan_to_num(np.stack([values - low, high - values]).clip(min=0))

    def axes(title: str, x: str, y: str):
        figure = Figure(figsize=(5, 4), layout="constrained")
        ax = figure.subplots()
        ax.set(title=title, xlabel=x, ylabel=y)
        ax.grid(alpha=0.3)
        return figure, ax

    figures = {}
    figures["reliability.png"], ax = axes("Reliability", "probability of the side it prefers", "share where people do")
    ax.plot([0.5, 1], [0.5, 1], color="gray", linewidth=1)
    for name, label in (("before", "without temperature"), ("after", "with temperature")):
        x = card["calibration"][name]
        observed = [row["observed"] for row in x["reliability"]]
        text = f"{label}, ECE {x['ece']['value']:.3f}"
        places = [row["predicted"] for row in x["reliability"]]
        ax.errorbar(places, [o["value"] for o in observed], errors(observed), marker="o", capsize=2, label=text)
    ax.legend()

    figures["roc.png"], ax = axes(
        "Does it know when it is wrong?", "share of right pairs doubted", "share of wrong pairs doubted"
    )
    ax.plot([0, 1], [0, 1], color="gray", linewidth=1)
    for name, curve in card["uncertainty"]["roc"].items():
        value = card["uncertainty"]["auc"][name]["value"]
        ax.plot(*zip(*curve), label=f"{name}, AUC " + ("-" if value is None else f"{value:.3f}"))
    ax.legend()

    if len(card["accuracy"]) > 1:
        figures["gaps.png"], ax = axes("Accuracy by gap of the ratings", "gap above, points", "pairs ranked right")
        for row in (card["accuracy"], *card["baselines"].values()):
            places = [GAPS[gap] for gap in row]
            values = list(row.values())
            ax.errorbar(places, [x["value"] for x in values], errors(values), marker="o", capsize=2)
        ax.legend([NAMES.get(name, name) for name in ("reward model", *card["baselines"])], fontsize="small")
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=120)
    return list(figures)
