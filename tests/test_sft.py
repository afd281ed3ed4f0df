"""Supervised fine-tuning: the loss is transformers' on the same ids and mask, packed rows and adapters change nothing else."""

import json
import random

import pytest
import torch
from test_chat import CONTROL, TEMPLATES, tokenizer  # noqa: F401  a fixture

from data.chat import Chat
from data.examples import Encoded, Examples, write_shard, write_split
from data.loader import TextLoader
from data.pipeline import main
from data.records import Record
from data.tokenizer import write_hf
from model.hf import save_hf
from model.transformer import ModelConfig, Transformer
from rlhf.infra import optim
from rlhf.infra.distributed import Dist
from rlhf.lm.language_model import LanguageModel
from train_lm import accumulate_gradient

TALKS = [
    [("user", "What is it?"), ("assistant", "A film.")],
    [
        ("system", "Be kind."),
        ("user", "Hello there"),
        ("assistant", "Hello!"),
        ("user", "Bye"),
        ("assistant", "So soon?"),
    ],
    [
        ("user", "<|im_end|> <|eot_id|> [INST]"),
        ("assistant", "I see <|im_end|>"),
        ("user", "and?"),
        ("assistant", "No."),
    ],
    [
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
        ("user", "five"),
        ("assistant", "6"),
    ],
]


def model_of(tokenizer, **shape) -> Transformer:  # noqa: F811
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, context=256, **shape))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def write_chat_model(tokenizer, directory) -> None:  # noqa: F811
    """An HF directory with the tokenizer's template."""
    save_hf(directory, model_of(tokenizer), eos_ids=[tokenizer.eos], pad_id=tokenizer.pad, bos_id=tokenizer.bos)
    write_hf(tokenizer, directory)


def prepared(tokenizer, template: str, directory) -> tuple[Examples, list]:  # noqa: F811
    """The talks in a split of their own, and what Chat made of each."""
    chat, rows = Chat(tokenizer, TEMPLATES[template]), []
    for talk in TALKS:
        messages = [{"role": role, "content": text} for role, text in talk]
        if template == "mistral" and messages[0]["role"] == "system":
            messages = messages[1:]
        rows.append((messages, chat.encode(messages[:-1], messages[-1]["content"])))
    encoded = [
        Encoded(e.prompt, [e.answer], e.trained[: len(e.prompt)], Record(m[:-1], (m[-1]["content"],))) for m, e in rows
    ]
    write_shard(directory / "train" / "00000", encoded, tokenizer, chat.sha256)
    write_split(directory / "train")
    return Examples(directory / "train"), [e for _, e in rows]


@pytest.mark.parametrize("template", ["smollm2", "chatml", "llama3", "mistral", "qwen3"])
def test_the_loss_is_transformers_on_the_same_ids_and_mask(tokenizer, template, tmp_path):  # noqa: F811
    """Several turns; labels -100 outside of what the assistant wrote, as everybody's trainers have it."""
    transformers = pytest.importorskip("transformers")
    data, conversations = prepared(tokenizer, template, tmp_path)
    model = model_of(tokenizer)
    save_hf(tmp_path / "hf", model, eos_ids=[tokenizer.eos])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    loader = TextLoader(data, batch_size=len(TALKS), seed=1)
    batch = loader.take(range(len(loader)))
    ours = LanguageModel(model)
    with torch.no_grad():
        packed = ours(batch.tokens, batch.mask, batch.lengths)
        padded = ours(batch.tokens, batch.mask)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    nll, count = 0.0, 0
    for row, conversation in enumerate(conversations):
        ids = torch.tensor([conversation.prompt + conversation.answer])
        assert batch.tokens[row, : ids.shape[1]].tolist() == ids[0].tolist() and batch.lengths[row] == ids.shape[1]
        labels = torch.where(torch.tensor([conversation.trained]), ids, -100)
        with torch.no_grad():
            loss = theirs(input_ids=ids, labels=labels).loss
        n = int((labels[:, 1:] != -100).sum())
        nll, count = nll + float(loss) * n, count + n
    assert count == int(batch.mask.sum()) and count == len(packed)
    assert float(packed.mean()) == pytest.approx(nll / count, abs=1e-5)


def test_the_mask_is_that_of_a_template_with_generation_tags(tokenizer, tmp_path):  # noqa: F811
    """An outside oracle: transformers' return_assistant_tokens_mask on ChatML with the tags that TRL's templates have."""
    transformers = pytest.importorskip("transformers")
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    write_hf(tokenizer, tmp_path)
    chat, theirs = Chat(tokenizer, template), transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = template
    for talk in (TALKS[0], TALKS[1], TALKS[3]):
        messages = [{"role": role, "content": text} for role, text in talk]
        out = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ours = chat.encode(messages[:-1], messages[-1]["content"])
        ids, n = ours.prompt + ours.answer, len(ours.trained)
        assert out["input_ids"][:n] == ids and out["assistant_masks"][:n] == [int(t) for t in ours.trained]


@pytest.mark.slow
def test_two_ranks_with_packing_and_accumulation_are_one(world, tmp_path):
    """Chats of several turns, loss on answers: every step's loss and gradient are those of one process and whole batches."""
    rng = random.Random(0)
    say = lambda: " ".join(rng.choices("apple bread cloud dream earth flame".split(), k=rng.randint(1, 12)))  # noqa: E731
    chats = [[("user", say()), ("assistant", say())] * rng.randint(1, 3) for _ in range(150)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([str(tmp_path / "chats.jsonl"), f"--out={tmp_path / 'data'}"])
    steps = {}
    cuts = {"one": {}, "two": {"micro_batch": 2}, "tokens": {"micro_batch_tokens": 256}}
    for name, cut in cuts.items():
        out = tmp_path / name
        options = dict(data=tmp_path / "data", out=out, batch=12, epochs=2, log_every=1, eval_every=100, warmup=2)
        done = world.together(world.command("train_lm.py", **options, **cut), 0 if name == "one" else 2)
        assert done.code == 0 and "loss on answers" in done.out, done
        steps[name] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps["one"]) == len(steps["two"]) == len(steps["tokens"]) >= 12
    for one, *others in zip(*steps.values()):
        for name in ("loss/train", "grad_norm"):
            assert [other[name] for other in others] == pytest.approx([one[name]] * 2, rel=1e-5), (name, one, others)
    losses = [json.loads((tmp_path / name / "report.json").read_text())["validation/loss"] for name in steps]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


@pytest.mark.parametrize("times, packed", [(1, False), (2, True), (2.5, False)])
def test_what_shares_a_forward_changes_no_gradient(tmp_path, tokenizer, times, packed):  # noqa: F811
    """In float64, of rows whose padding and order are cut differently."""
    model = LanguageModel(model_of(tokenizer).double())
    loader = TextLoader(prepared(tokenizer, "chatml", tmp_path)[0], 4, 0)
    batch, precision, found = loader.batch(0), optim.amp(torch.device("cpu")), []
    tokens = int(times * batch.lengths.max())
    for parts in ([torch.arange(4)], loader.forwards(0, 1, None, tokens, packed)):
        model.zero_grad()
        nll = accumulate_gradient(model, batch, parts, Dist(), precision)
        found.append([nll, *(x.grad for x in model.parameters())])
    assert len(parts) > 1 and torch.cat(parts).sort().values.equal(torch.arange(4))
    for whole, cut in zip(*found):
        torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-12)
