"""Token files refuse what is broken; batches are pure functions of the step and add up over epochs, ranks and resumes."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.examples import Encoded, write_shard, write_split
from data.loader import (
    Order,
    PairLoader,
    PromptLoader,
    RatingLoader,
    TokenFile,
    in_order,
    pad,
    prompts_from_rows,
    prompts_from_text,
    shard,
)
from data.records import Record
from data.tokenizer import MODEL_FILE, train_sentencepiece

WORDS = "the film was a warm and funny story of two people who never meet again plot good bad very not".split()
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=1 + i * 37 % 30)) for i in range(120)]


def write(directory: Path, tokenizer) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for i, (text, rating) in enumerate(zip(TEXTS, rng.normal(size=120).astype(np.float32).tolist())):
        record = Record("", (text,), (rating,), source=("film", "news")[i % 2])
        rows.append(Encoded([tokenizer.start], [[*tokenizer.encode(text), tokenizer.eos]], None, record))
    write_shard(directory / "00000", rows, tokenizer)
    write_split(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / MODEL_FILE, vocab_size=320)


@pytest.fixture(scope="module")
def file(tokenizer, tmp_path_factory):
    return TokenFile(write(tmp_path_factory.mktemp("data") / "train", tokenizer))


# --- which rows make up a step ---

orders = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.integers(1, n),
        st.integers(0, 5),
        st.none() | st.lists(st.integers(1, 9), min_size=n, max_size=n).map(np.array),
    )
)


def batch_rows(step, n, batch, seed, lengths=None):
    """The rows of a step by an order that has seen no other."""
    return Order(n, batch, seed, lengths).rows(step)


@given(order=orders, epoch=st.integers(0, 3))
def test_every_row_comes_once_an_epoch_and_the_rest_is_dropped(order, epoch):
    n, batch, seed, lengths = order
    steps = n // batch
    seen = np.concatenate([batch_rows(epoch * steps + s, n, batch, seed, lengths) for s in range(steps)])
    assert (
        len(seen) == steps * batch > n - batch and len(set(seen.tolist())) == len(seen) and set(seen) <= set(range(n))
    )


@given(order=orders, steps=st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_a_step_is_the_same_in_any_order_of_asking(order, steps):
    n, batch, seed, lengths = order
    remembers = Order(n, batch, seed, lengths)
    for step in steps:  # as after any resume
        rows = remembers.rows(step)
        assert rows.shape == (batch,) and np.array_equal(rows, batch_rows(step, n, batch, seed, lengths))


@given(order=orders, world=st.sampled_from([1, 2, 4]), step=st.integers(0, 20))
def test_the_ranks_share_the_global_batch(order, world, step):
    n, batch, seed, lengths = order
    rows = batch_rows(step, n, batch, seed, lengths)
    if batch % world:
        with pytest.raises(ValueError, match=f"batch size {batch} is not a multiple of {world} processes; try"):
            shard(rows, 0, world)
        return
    parts = [shard(rows, rank, world) for rank in range(world)]
    assert all(len(p) == batch // world for p in parts)
    assert np.array_equal(np.stack(parts, axis=1).ravel(), rows)  # interleaved: together the global batch, in its order


def test_a_batch_that_does_not_divide_suggests_ones_that_do():
    with pytest.raises(ValueError, match="batch size 30 is not a multiple of 4 processes; try 28 or 32"):
        shard(np.arange(30), 0, 4)
    with pytest.raises(ValueError, match="batch size 3 is not a multiple of 4 processes; try 4$"):
        shard(np.arange(3), 0, 4)
    for batch in (0, -2, 11):
        with pytest.raises(ValueError, match=f"batch size {batch} with 10 rows; it must be between 1 and 10"):
            Order(10, batch, 0)


def test_epochs_and_seeds_differ_and_shuffle():
    first, second = (np.concatenate([batch_rows(e * 10 + s, 100, 10, 0) for s in range(10)]) for e in (0, 1))
    assert not np.array_equal(first, second) and not np.array_equal(first, np.arange(100))
    assert not np.array_equal(batch_rows(0, 100, 10, 0), batch_rows(0, 100, 10, 1))


def test_buckets_save_padding_without_ordering_the_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, size=2000)
    order = Order(2000, 20, 0, lengths)
    longest = np.array([lengths[order.rows(s)].max() for s in range(100)])
    real = sum(lengths[order.rows(s)].sum() for s in range(100)) / (longest * 20).sum()
    assert real > 0.9 > 0.65 > lengths.mean() / 60
    assert abs(np.corrcoef(longest, np.arange(100))[0, 1]) < 0.3  # short batches are not all at the start


def test_in_order_visits_everything_once():
    assert [r.tolist() for r in in_order(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_order(0, 3)) == []


# --- batches ---


@given(rows=st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=9), min_size=1, max_size=5))
def test_pad(rows):
    tokens, lengths = pad([np.array(r, np.uint16) for r in rows], pad_id=0)
    assert tokens.dtype == lengths.dtype == torch.int64 and tokens.shape == (len(rows), max(map(len, rows)))
    assert [t[:n].tolist() for t, n in zip(tokens, lengths)] == rows and lengths.tolist() == [len(r) for r in rows]
    assert all((t[n:] == 0).all() for t, n in zip(tokens, lengths))


def test_rating_loader(file):
    loader = RatingLoader(file, 8, seed=1)
    rows = loader.order.rows(5)
    tokens, lengths, ratings = loader.batch(5)
    assert ratings.dtype == torch.float32 and ratings.tolist() == file.column("rating")[rows].tolist()
    assert [t[:n].tolist() for t, n in zip(tokens, lengths)] == [file[i].tolist() for i in rows]
    assert all(t[n - 1] == file.eos for t, n in zip(tokens, lengths))
    everything = torch.cat([loader.take(rows).ratings for rows in in_order(len(loader), 50)])
    assert everything.tolist() == file.column("rating").tolist()


def test_pair_loader(file):
    loaders = [PairLoader(file, 8, seed=1, rank=rank, world=2) for rank in range(2)]
    rows = loaders[0].order.rows(3)
    for rank, loader in enumerate(loaders):
        batch = loader.batch(3)
        for k, pair in enumerate(shard(rows, rank, 2)):
            better, worse = file.column("pair_chosen")[pair], file.column("pair_rejected")[pair]
            assert batch.chosen[k, : batch.chosen_lengths[k]].tolist() == file[better].tolist()
            assert batch.rejected[k, : batch.rejected_lengths[k]].tolist() == file[worse].tolist()
            assert batch.gap[k] == pytest.approx(file.column("rating")[better] - file.column("rating")[worse])


def test_of_long_rows_the_prompt_is_cut(tokenizer, tmp_path):
    """From the left, behind the start token; an answer that does not fit is refused, never cut."""
    record = Record("p", ("a", "b"), (1.0, 0.0))
    prompt, answers = [tokenizer.start, *range(10, 30)], [[40, 41, tokenizer.eos], [50, 51, 52, tokenizer.eos]]
    write_shard(tmp_path / "train" / "00000", [Encoded(prompt, answers, None, record)], tokenizer)
    write_split(tmp_path / "train")
    file = TokenFile(tmp_path / "train")
    assert file.row(0, 8).tolist() == [tokenizer.start, 26, 27, 28, 29, 40, 41, tokenizer.eos]
    assert file.row(0, 100).tolist() == file[0].tolist() == prompt + answers[0]
    with pytest.raises(ValueError, match="an answer of 4 tokens does not fit a context of 4"):
        file.row(1, 4)


def test_prompts_are_beginnings_of_longer_texts_of_their_domain(file):
    prompts = prompts_from_rows(file, 4, ["news"])
    long = [i for i in range(120) if i % 2 == 1 and len(file[i]) - 2 > 4]
    assert [p.tolist() for p in prompts] == [file[i][:5].tolist() for i in long] and all(
        p[0] == file.bos for p in prompts
    )
    assert len(prompts_from_rows(file, 4)) > len(prompts)
    with pytest.raises(ValueError, match=r"no text of .*train \(film\) is longer than 500 tokens"):
        prompts_from_rows(file, 500, ["film"])
    with pytest.raises(ValueError, match="no source 'tweets'"):
        prompts_from_rows(file, 4, ["tweets"])
    loaders = [PromptLoader(prompts, file.pad, 8, 0, rank, 2) for rank in range(2)]
    batches = [loader.batch(2) for loader in loaders]
    assert torch.equal(torch.stack([b.rows for b in batches], 1).ravel(), torch.tensor(loaders[0].order.rows(2)))
    for batch in batches:
        assert batch.prompts.shape == (4, 5) and batch.prompt_lengths.tolist() == [5] * 4
        assert [p.tolist() for p in batch.prompts] == [prompts[i].tolist() for i in batch.rows]


def test_prompts_from_a_text_file(file, tokenizer, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffthe film\r\n\n  \nwas <s> very\n", encoding="utf-8")
    prompts = prompts_from_text(path, tokenizer)
    assert [tokenizer.decode(p) for p in prompts] == ["the film", "was <s> very"]
    assert all(p[0] == tokenizer.bos and tokenizer.bos not in p[1:] for p in prompts)
    batch = PromptLoader(prompts, file.pad, 2, 0).take(np.array([0, 1]))
    assert batch.prompt_lengths.tolist() == [len(p) for p in prompts]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="prompt file .*prompts.txt is empty: 0 prompts"):
        prompts_from_text(path, tokenizer)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8"):
        prompts_from_text(path, tokenizer)
    with pytest.raises(FileNotFoundError):
        prompts_from_text(tmp_path / "nowhere.txt", tokenizer)
