"""Reward models of others: HF's sequence classifiers score what transformers says of the same texts."""

import json

import pytest
import torch
from hf_tokenizers import byte_level, write
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import lines

from data.chat import Chat
from data.records import Record
from data.tokenizer import load_tokenizer
from rlhf.infra.files import read_lines
from rlhf.reward.bridge import open_reader
from rlhf.reward.files import load_classifier
from rlhf.reward.scorer import open_scorer, scorer_of

transformers = pytest.importorskip("transformers", reason="needs the extra compare")

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|eos|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
OTHER = (
    TEMPLATE.replace("[", "<").replace("m<'", "m['").replace("']", "']").replace("]' +", ">' +").replace("t]'", "t>'")
)
SIZES = dict(vocab_size=616, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
FAMILIES = {
    "Llama": SIZES | dict(num_key_value_heads=1, max_position_embeddings=96),
    "Qwen2": SIZES | dict(num_key_value_heads=2, max_position_embeddings=64),
    "GPT2": dict(vocab_size=616, n_embd=32, n_layer=2, n_head=2, n_positions=80),
}


def directory(path, family: str, kind: str, template: str | None = None, labels: int = 1, **config):
    """A random classifier of transformers with a small tokenizer of that kind."""
    made = getattr(transformers, f"{family}Config")(
        **FAMILIES[family],
        num_labels=labels,
        pad_token_id=config.pop("pad_token_id", 5),
        eos_token_id=0,
        bos_token_id=0,
        **config,
    )
    torch.manual_seed(len(family) + labels)
    model = getattr(transformers, f"{family}ForSequenceClassification")(made).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():  # scores that differ: heads start near zero
            x.add_(0.2 * torch.randn_like(x)) if "norm" not in name and "ln_" not in name else None
    model.save_pretrained(path)
    extra = {"chat_template": template} if template else {}
    write(path, byte_level(kind, False), eos_token="<|eos|>", tokenizer_class="PreTrainedTokenizerFast", **extra)
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Three families, three tokenizers; one with a chat template of its own, one with the policy's tokenizer."""
    home = tmp_path_factory.mktemp("classifiers")
    directory(home / "llama", "Llama", "llama-3", TEMPLATE)
    directory(home / "qwen", "Qwen2", "qwen2", OTHER)
    directory(home / "gpt2", "GPT2", "gpt-2")
    directory(home / "two", "GPT2", "gpt-2", labels=2)
    directory(home / "same", "Qwen2", "o200k", pad_token_id=0)
    policy = home / "policy"
    write(policy, byte_level("o200k", False), eos_token="<|eos|>", chat_template=TEMPLATE)
    return home


def theirs(path, texts=None, ids=None, side: str = "right") -> list[float]:
    """transformers' scores of these texts, or of ids, in one padded batch or one by one."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    ids = ids or [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]  # as ours: none is forged
    width, pad = max(map(len, ids)), model.config.pad_token_id
    rows = [row + [pad] * (width - len(row)) if side == "right" else [pad] * (width - len(row)) + row for row in ids]
    tokens = torch.tensor(rows)
    with torch.no_grad():
        if side == "alone":
            return [float(model(input_ids=torch.tensor([row])).logits) for row in ids]
        if side == "right":
            return model(input_ids=tokens).logits[:, 0].tolist()
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        places = (real.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=tokens, attention_mask=real, position_ids=places).logits[:, 0].tolist()


def asked(policy, rows: list[tuple[list[int], list[int]]]):
    """(tokens, lengths, mask) of prompts and responses, right-padded with something that must not be read."""
    width = max(len(p) + len(r) for p, r in rows) + 2
    tokens = torch.tensor([p + r + [77] * (width - len(p) - len(r)) for p, r in rows])
    starts, lengths = (torch.tensor(x) for x in zip(*((len(p), len(p) + len(r)) for p, r in rows)))
    columns = torch.arange(width)
    return tokens, lengths, (columns >= starts[:, None]) & (columns < lengths[:, None])


TEXTS = [("A film", " that is warm, 12 of 10."), ("Why?", ""), ("One \n\n", "\u00fc\u4e2d x"), ("So", " it" * 20)]


def text_rows(policy):
    return [([policy.start, *policy.encode(p)], [*policy.encode(r), policy.eos]) for p, r in TEXTS]


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2"])
def test_plain_texts_across_the_bridge(places, name, capsys):
    policy = load_tokenizer(places / "policy")
    scorer = open_scorer(str(places / name), policy)
    assert "another tokenizer: responses are decoded and encoded again" in capsys.readouterr().out
    ours = scorer.score(*asked(policy, text_rows(policy))).tolist()
    for side in ("right", "left", "alone"):
        assert ours == pytest.approx(theirs(places / name, [p + r for p, r in TEXTS], side=side), abs=1e-4), side
    assert len({round(x, 3) for x in ours}) == 4  # they do differ


@pytest.mark.parametrize("name", ["gpt2", "qwen"])
def test_the_pipeline_says_the_same(places, name):
    pipeline = transformers.pipeline(
        "text-classification", model=str(places / name),
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(places / name), function_to_apply="none",
    )  # fmt: skip
    policy = load_tokenizer(places / "policy")
    ours = open_scorer(str(places / name), policy).score(*asked(policy, text_rows(policy))).tolist()
    found = [pipeline(p + r, truncation=False) for p, r in TEXTS]
    assert ours == pytest.approx([(x[0] if isinstance(x, list) else x)["score"] for x in found], abs=1e-4)


CHATS = [
    ([{"role": "user", "content": "Hi"}], "Hello there"),
    ([{"role": "system", "content": "Be\nkind."}, {"role": "user", "content": " 1+1?"}], "2"),
    (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b <|eos|>"},
            {"role": "user", "content": "c"},
        ],
        "d e",
    ),
]
RECORDS = [Record(messages) for messages, _ in CHATS]


@pytest.mark.parametrize("name", ["llama", "qwen", "gpt2"])
def test_conversations_are_rendered_with_its_own_template(places, name, capsys):
    """As apply_chat_template makes them; without a template, what was said with a blank line after each turn."""
    policy = load_tokenizer(places / "policy")
    chat = Chat(policy)
    rows = [(e.prompt, e.answer) for e in (chat.encode(messages, answer) for messages, answer in CHATS)]
    find = lambda rows: [RECORDS[int(i)] for i in rows]  # noqa: E731
    scorer = open_scorer(str(places / name), policy, records=find, template=chat.sha256)
    said = capsys.readouterr().out
    assert ("as plain text, for it has no template" if name == "gpt2" else "in its chat template") in said
    order = torch.tensor([2, 0, 1])
    ours = scorer.score(*asked(policy, [rows[i] for i in order]), order).tolist()
    if name == "gpt2":
        texts = ["".join(f"{m['content']}\n\n" for m in messages) + answer for messages, answer in CHATS]
        ids = None
    else:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(places / name)
        whole = [[*messages, {"role": "assistant", "content": answer}] for messages, answer in CHATS]
        texts, ids = None, [tokenizer.apply_chat_template(one, tokenize=True, return_dict=False) for one in whole]
        ids[2] = open_reader(str(places / name)).conversation(*CHATS[2])  # a forged control token: HF takes it for one
    found = theirs(places / name, texts, ids, side="alone")
    assert ours == pytest.approx([found[i] for i in order], abs=1e-4)
    with pytest.raises(
        ValueError, match="another tokenizer and another chat template than the data|another tokenizer or chat"
    ):
        open_scorer(str(places / name), policy, template=chat.sha256)


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 599), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(0, 3))
def test_the_same_tokenizer_reads_the_policys_tokens(places, rows, ends):
    """As transformers scores these ids, also where eos is padding: it reads the last token that is not."""
    policy = load_tokenizer(places / "policy")
    scorer = open_scorer(str(places / "same"), policy)
    rows = [row + [0] * ends for row in rows]
    if any(not any(row) for row in rows):
        return  # nothing but padding: transformers reads its first token, or its last, by version
    ours = scorer.score(*asked(policy, [(row[:1], row[1:]) for row in rows])).tolist()
    assert ours == pytest.approx(theirs(places / "same", ids=rows), abs=1e-4) and scorer.context == 64


def test_what_is_too_long_is_cut_from_the_left(places):
    policy = load_tokenizer(places / "policy")
    text = " a long film, 1 2 3" * 40
    (ours,) = open_scorer(str(places / "gpt2"), policy).score(*asked(policy, [([0], policy.encode(text))])).tolist()
    ids = open_reader(str(places / "gpt2")).tokenizer.encode(text)[-80:]
    assert [ours] == pytest.approx(theirs(places / "gpt2", ids=[ids]), abs=1e-4)


def test_what_is_no_reward_model_is_refused(places):
    with pytest.raises(ValueError, match="two has 2 labels; a reward model is a sequence classifier with one"):
        load_classifier(str(places / "two"))
    facts = scorer_of(f"{places / 'gpt2'}:0.5").terms[0]
    assert (facts.kind, facts.temperature, len(facts.digest)) == ("model", 1.0, 64) and facts.parameters > 20_000
    assert json.loads((places / "gpt2" / "config.json").read_text())["architectures"] == [
        "GPT2ForSequenceClassification"
    ]


def test_a_run_with_a_classifier_as_reward_and_judge(world, places, tmp_path):
    """The policy's tokenizer is another, which is said once; a sum takes it too."""
    options = {"reward": f"{places / 'llama'}:0.5,rewards.py:shorter:0.1", "judge": places / "gpt2"} | {
        "sources": "",
        "prompt_tokens": 8,
    }
    out = world.ok("train_ppo.py", out=tmp_path / "ppo", iterations=1, judge_every=1, judge_prompts=8, **options)
    assert out.count("responses are decoded and encoded again") == 2
    (row,) = lines(tmp_path / "ppo" / "metrics.jsonl")
    by_hand = 0.5 * row["reward/llama"] + 0.1 * row["reward/shorter"]
    assert row["objective/scores"] == pytest.approx(by_hand, abs=1e-5) and "judge/mean" in row
    for path, said in ((places / "two", "has 2 labels"), (places / "nothing", "no checkpoint")):
        done = world.run("train_ppo.py", out=tmp_path / "other", reward=path)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1


@pytest.mark.slow
def test_a_classifier_has_a_report_card(world, places, tmp_path):
    """Of sentences prepared with any tokenizer, scored as transformers scores the texts."""
    out = world.ok("evaluate.py rm", model=places / "llama", data="data", out=tmp_path / "card", plots="false")
    assert "is asked as HF's pipeline asks it" in out
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert card["sha256"] == scorer_of(str(places / "llama")).digest and card["pairs"] > 10
    pairs = [{"prompt": "p", "chosen": " good film", "rejected": f" bad film {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for chat in (False, True):
        options = {
            "data": tmp_path / "pairs.jsonl",
            "out": tmp_path / f"{chat}",
            "chat": str(chat).lower(),
            "plots": "false",
        }
        world.ok("evaluate.py rm", model=places / "llama", **options)
        found = json.loads((tmp_path / f"{chat}" / "card.json").read_text())["accuracy"]["all"]["value"]
        write = "[user]p<|eos|>\n[assistant]{}<|eos|>\n" if chat else "p{}"
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(places / "llama")
        said = [[tokenizer(write.format(p[side]))["input_ids"] for side in ("chosen", "rejected")] for p in pairs]
        chosen, rejected = (theirs(places / "llama", ids=list(side), side="alone") for side in zip(*said))
        assert found == pytest.approx(sum(a > b for a, b in zip(chosen, rejected)) / 12)


@pytest.mark.slow
def test_our_own_export_scores_as_the_run_it_was_made_of(world, tmp_path):
    """The same tokens, gain and bias; its card is the run's."""
    world.ok("train_rm.py", out=tmp_path / "rm", pooling="last")
    done = world.start(["export.py", f"--init={tmp_path / 'rm'}", f"--out={tmp_path / 'hf'}"]).wait()
    assert done.code == 0, done
    policy = load_tokenizer(world.path / "lm")
    rows = asked(policy, text_rows(policy))
    ours, exported = (open_scorer(str(tmp_path / name), policy).score(*rows) for name in ("rm", "hf"))
    torch.testing.assert_close(exported, ours, rtol=0, atol=1e-5)
    assert scorer_of(str(tmp_path / "hf")).parameters == scorer_of(str(tmp_path / "rm")).parameters
    for name in ("rm", "hf"):
        world.ok("evaluate.py rm", model=tmp_path / name, data="data", out=tmp_path / f"card-{name}", plots="false")
    ours, theirs = (json.loads((tmp_path / f"card-{name}" / "card.json").read_text()) for name in ("rm", "hf"))
    assert ours["accuracy"] == theirs["accuracy"] and ours["auc"] == theirs["auc"]


@pytest.mark.slow
def test_a_chat_policy_is_judged_in_the_classifiers_own_words(world, places, tmp_path):
    """From an HF model and messages to scores: each is what transformers says of the conversation with the response in it."""
    torch.manual_seed(0)
    made = transformers.LlamaConfig(**FAMILIES["Llama"], eos_token_id=0, bos_token_id=0)
    transformers.LlamaForCausalLM(made).save_pretrained(tmp_path / "policy")
    write(tmp_path / "policy", byte_level("o200k", False), eos_token="<|eos|>", chat_template=TEMPLATE)
    rows = [
        {"prompt": [{"role": "user", "content": f"{w} {i}?"}], "n": i}
        for i in range(12)
        for w in ("Why", "How", "When")
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = [
        "data.prepare",
        str(tmp_path / "chats.jsonl"),
        f"--tokenizer={tmp_path / 'policy'}",
        f"--out={tmp_path / 'data'}",
    ]
    assert world.start(prepare).wait().code == 0
    options = {
        "init": tmp_path / "policy",
        "data": tmp_path / "data",
        "reward": places / "qwen",
        "sources": "",
        "batch": 8,
    }
    out = world.ok("train_ppo.py", out=tmp_path / "ppo", iterations=1, sample_every=1, **options)
    assert "has another tokenizer and another chat template: responses are decoded and encoded again in its chat" in out
    samples = read_lines(tmp_path / "ppo" / "samples.jsonl")  # a random model says U+2028 too
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(places / "qwen")
    ids = []
    for row in samples:
        (asked_for,) = (
            x["prompt"] for x in rows if x["prompt"][0]["content"] in row["prompt"].split("\n")[0].split("]")[1:]
        )
        whole = [*asked_for, {"role": "assistant", "content": row["response"]}]
        ids.append(tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)[-64:])
    assert [row["score"] for row in samples] == pytest.approx(theirs(places / "qwen", ids=ids, side="alone"), abs=1e-4)
