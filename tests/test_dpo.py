"""train_dpo.py: TRL's losses step by step; every layout learns from where it starts; ranks and micro-batches change nothing."""

import json

import numpy as np
import pytest
import torch
from test_chat import tokenizer  # noqa: F401  a fixture
from tiny import World

from data.examples import Encoded, write_shard, write_split
from data.loader import PairLoader, open_data
from data.records import Pair, Record
from data.tokenizer import load_tokenizer, write_hf
from model.hf import save_hf
from model.transformer import ModelConfig, Transformer

PAIRS, STEPS, BATCH = 160, 20, 8


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):  # noqa: F811
    """A model as an HF directory, and pairs of random tokens: of the answers, the winner has more low ids."""
    home = tmp_path_factory.mktemp("dpo")
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, kv_heads=1, context=64)
    )
    model.init_weights(torch.Generator().manual_seed(0))
    save_hf(home / "hf", model, eos_ids=[tokenizer.eos])
    write_hf(tokenizer, home / "hf")
    read, rng = load_tokenizer(home / "hf"), np.random.default_rng(0)
    low = len(tokenizer.control)
    for split, count in (("train", PAIRS), ("validation", 40)):
        rows = []
        for i in range(count):
            prompt = [read.start, *rng.integers(low, read.vocab_size, rng.integers(1, 12)).tolist()]
            good, bad = (
                [*rng.integers(low, most, rng.integers(1, 16)).tolist(), read.eos]
                for most in (low + 60, read.vocab_size)
            )
            record = Record(f"p{split}{i}", ("a", "b"), pairs=(Pair(0, 1),))
            rows.append(Encoded(prompt, [good, bad], None, record))
        write_shard(home / "data" / split / "00000", rows, read)
        write_split(home / "data" / split)
    read.save(home / "data" / "tokenizer")
    return home


def train(place, out, *options, ranks: int = 0) -> list[dict]:
    """The lines of metrics.jsonl of a run."""
    words = [f"--init={place / 'hf'}", f"--data={place / 'data'}", f"--out={out}", f"--batch={BATCH}", "--log_every=1"]
    words += ["--warmup=0", "--precision=fp32", *options]
    done = World(place).together(["train_dpo.py", *words], ranks)
    assert done.code == 0, done
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("loss, beta", [("dpo", 0.1), ("dpo", 0.5)])
def test_losses_and_margins_are_trls(place, tmp_path, loss, beta):
    trl = pytest.importorskip("trl", reason="needs the extra compare")
    import transformers
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    class InOrder(trl.DPOTrainer):
        """The same tokens in the same order: what is compared is the arithmetic."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    data = open_data(place / "data", "train")
    loader = PairLoader(data, BATCH, seed=1, context=64)
    rows = []
    for step in range(STEPS):
        for pair in loader.order.rows(step):
            winner, loser = (int(side[0]) for side in data.pair(np.array([pair]))[:2])
            prompt = data.prompt(int(data.prompt_of(np.array([winner]))[0])).tolist()
            rows.append(
                {
                    "prompt_ids": prompt,
                    "chosen_ids": data.answer(winner).tolist(),
                    "rejected_ids": data.answer(loser).tolist(),
                }
            )
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32)
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=BATCH, learning_rate=1e-3, beta=beta, loss_type="sigmoid",
        num_train_epochs=1, logging_steps=1, lr_scheduler_type="linear", warmup_steps=0, max_length=None, report_to=[],
        save_strategy="no", gradient_checkpointing=False, bf16=False, use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = InOrder(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(place / "hf"),
    )
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    ours = train(place, tmp_path / "ours", "--lr=1e-3", f"--beta={beta}", f"--loss={loss}", "--epochs=1")
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs):
        assert mine["loss/policy"] == pytest.approx(other["loss"], abs=1e-4)
        assert mine["rewards/margin"] == pytest.approx(other["rewards/margins"], abs=1e-4)
        assert mine["rewards/accuracy"] == pytest.approx(other["rewards/accuracies"])
    assert ours[0]["loss/policy"] == pytest.approx(np.log(2), abs=1e-6) and ours[-1]["loss/policy"] < 0.68


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["full", "adapters", "branch"])
def test_every_layout_learns_and_is_a_model(place, tmp_path, layout):
    """It starts at the reference, log 2 to the digit, ends above chance on held-out pairs, and opens as any policy."""
    from rlhf.lm.pretrained import open_pretrained

    more = ["--branch_layers=1"] if layout == "branch" else []
    rows = train(place, tmp_path / "out", f"--layout={layout}", "--lr=3e-3", "--epochs=3", *more)
    assert rows[0]["loss/policy"] == pytest.approx(np.log(2), abs=1e-6)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["validation/accuracy"] > 0.6 and report["validation/margin"] > 0
    assert open_pretrained(tmp_path / "out").model.config.layers == 2


@pytest.mark.slow
def test_ranks_shards_and_micro_batches_change_nothing(place, tmp_path):
    runs = [
        train(place, tmp_path / "one", "--epochs=0.5", "--loss=ipo"),
        train(place, tmp_path / "micro", "--epochs=0.5", "--loss=ipo", "--micro_batch=2"),
        train(place, tmp_path / "two", "--epochs=0.5", "--loss=ipo", ranks=2),
        train(
            place, tmp_path / "shards", "--epochs=0.5", "--loss=ipo", "--micro_batch_tokens=70", "--shard=true", ranks=2
        ),
    ]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert {k: v for k, v in a.items() if k != "step"} == pytest.approx(
                {k: b[k] for k in a if k != "step"}, abs=1e-4
            )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_reference_that_sleeps_changes_nothing(place, tmp_path, ranks):
    options = ["--epochs=0.3", "--micro_batch=2", "--eval_every=2", "--checkpoint_every=2"]
    options += ["--shard=true"] if ranks else []
    ways = {"awake": [], "asleep": ["--offload=reference"]}
    runs = [train(place, tmp_path / name, *options, *more, ranks=ranks) for name, more in ways.items()]
    assert runs[0] == runs[1]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ways]
    assert reports[0] | {"seconds": 0} == reports[1] | {"seconds": 0}


def test_what_cannot_be_trained_on_is_one_line(place, tmp_path):
    def refused(*options):
        words = [f"--init={place / 'hf'}", f"--data={place / 'data'}", f"--out={tmp_path}", *options]
        done = World(place).start(["train_dpo.py", *words]).wait()
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        return done.err

    assert "reference_free" in refused("--reference_free=true")
    assert "--micro_batch_tokens=9: 2 rows" in refused("--micro_batch_tokens=9")
    assert "give one" in refused("--micro_batch_tokens=90", "--micro_batch=2")
    assert "at most 64" in refused("--context=65") and "at most 160" in refused("--batch=500")
