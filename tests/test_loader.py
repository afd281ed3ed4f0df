"""Token files refuse what is broken; batches are pure functions of the step and add up over epochs, ranks and resumes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import (
    Order,
    PairLoader,
    PromptLoader,
    RatingLoader,
    SentenceLoader,
    TokenFile,
    batch_rows,
    in_order,
    pad,
    prompts_from_rows,
    prompts_from_text,
    shard,
    shorten,
)
from data.pairs import make_pairs
from data.tokenizer import MODEL_FILE, train_sentencepiece
from data.tokens import write_token_file

WORDS = "the film was a warm and funny story of two people who never meet again plot good bad very not".split()
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=1 + i * 37 % 30)) for i in range(120)]


def write(directory: Path, tokenizer) -> Path:
    rng = np.random.default_rng(0)
    columns = {"domain": np.arange(120).astype(np.uint8) % 2, "rating": rng.normal(size=120).astype(np.float32)}
    pairs = make_pairs(columns["rating"], columns["domain"], 200, seed=0)
    made = {"by": "python -m data.prepare fake"}
    write_token_file(directory, TEXTS, tokenizer, ["film", "news"], columns, [str(i) for i in range(120)], made, pairs)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / MODEL_FILE, vocab_size=320)


@pytest.fixture(scope="module")
def file(tokenizer, tmp_path_factory):
    return TokenFile(write(tmp_path_factory.mktemp("data") / "train", tokenizer))


@pytest.fixture
def broken(tokenizer, tmp_path):
    """A token file of its own, to be broken."""
    return write(tmp_path / "data" / "train", tokenizer)


# --- token files ---


def test_a_token_file_gives_back_what_was_written(file, tokenizer):
    assert len(file) == 120 and file.texts == TEXTS and (file.pad, file.bos, file.eos) == (0, 1, 2)
    assert file[7].tolist() == [1, *tokenizer.encode(TEXTS[7]), 2] and file[np.int64(7)].tolist() == file[7].tolist()
    assert file.lengths().tolist() == [len(file[i]) for i in range(120)]
    assert file.domain_ids(["news"]) == [1] and isinstance(file.tokens, np.memmap)
    assert not file.tokens.flags.writeable
    for i in (-1, 120):
        with pytest.raises(IndexError):
            file[i]


def one_line(e) -> str:
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_missing_token_file(tmp_path, broken):
    with pytest.raises(FileNotFoundError, match="no token file at .*run `python -m data.prepare`"):
        TokenFile(tmp_path / "nowhere")
    (broken / "rating.bin").unlink()
    with pytest.raises(ValueError, match=r"rating.bin is missing \(480 bytes expected\).*data.prepare fake` again"):
        TokenFile(broken)


@pytest.mark.parametrize("name", ["tokens", "offsets", "domain", "pair_gap"])
@pytest.mark.parametrize("change", [-1, 1, -10])
def test_a_truncated_or_longer_file_is_refused_with_both_sizes(broken, name, change):
    path = broken / f"{name}.bin"
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + b"\0")[: size + change])
    with pytest.raises(ValueError, match="remove .*data and run") as e:
        TokenFile(broken)
    assert f"{name}.bin has {size + change} bytes, the manifest says {size}" in one_line(e)


def test_corruption_without_a_change_of_size(broken):
    path = broken / "tokens.bin"
    blob = bytearray(path.read_bytes())
    blob[10] ^= 1
    path.write_bytes(blob)
    TokenFile(broken)  # sizes agree: seen on request only
    with pytest.raises(ValueError, match="tokens.bin has sha256 .*, the manifest says"):
        TokenFile(broken, verify=True)
    offsets = np.fromfile(broken / "offsets.bin", np.int64)
    for bad, why in ((offsets[::-1], "upwards from 0"), (np.append(offsets[:-1], offsets[-1] + 5), "tokens")):
        bad.tofile(broken / "offsets.bin")
        with pytest.raises(ValueError, match=f"offsets.bin .*{why}"):
            TokenFile(broken)


def test_a_manifest_that_says_something_else(broken):
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is no JSON"):
        TokenFile(broken)
    (broken / "manifest.json").write_text(json.dumps(manifest | {"format": "other 9"}))
    with pytest.raises(ValueError, match="does not describe a token file"):
        TokenFile(broken)
    (broken / "manifest.json").write_text(json.dumps({"format": manifest["format"], "splits": {}}))
    with pytest.raises(ValueError, match="directory of all splits: add /train"):
        TokenFile(broken)


def test_unknown_columns_and_domains(file):
    with pytest.raises(ValueError, match="no column 'stars'; it has domain, offsets, pair_chosen"):
        file.column("stars")
    with pytest.raises(ValueError, match="no domain 'films'; it has film, news"):
        file.domain_ids(["film", "films"])


def test_a_large_vocabulary_is_stored_in_uint32(tokenizer, tmp_path):
    class Large:
        vocab_size, fingerprint, pad, start, eos = 70_000, "f", 0, 1, 2

        def encode_many(self, texts):
            return [[69_999] for _ in texts]

    write_token_file(tmp_path / "x", ["a"], Large(), ["d"], {"domain": np.zeros(1, np.uint8)}, ["0"], {"by": "test"})
    assert TokenFile(tmp_path / "x")[0].tolist() == [1, 69_999, 2]


def test_an_empty_split(tokenizer, tmp_path):
    write_token_file(tmp_path / "x", [], tokenizer, ["d"], {"domain": np.zeros(0, np.uint8)}, [], {"by": "test"})
    assert len(TokenFile(tmp_path / "x", verify=True)) == 0
    with pytest.raises(ValueError, match="batch size 4 with 0 rows"):
        SentenceLoader(TokenFile(tmp_path / "x"), 4, 0).batch(0)


# --- which rows make up a step ---

orders = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.integers(1, n),
        st.integers(0, 5),
        st.none() | st.lists(st.integers(1, 9), min_size=n, max_size=n).map(np.array),
    )
)


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


@settings(max_examples=25)
@given(context=st.integers(2, 40), bucket=st.booleans(), world=st.sampled_from([1, 2, 4]))
def test_sentence_loader_predicts_every_token_once(file, context, bucket, world):
    n = len(SentenceLoader(file, 1, 0, context=context))
    batch = max(b for b in (1, 2, 4, 8, 16, 24, 32) if n % b == 0 and b % world == 0 or b == world)
    loaders = [SentenceLoader(file, batch, 3, rank, world, context, bucket) for rank in range(world)]
    predicted = 0
    for step in range(n // batch):
        for loader in loaders:
            tokens, lengths, mask = loader.batch(step)
            t = torch.arange(tokens.shape[1])
            assert tokens.shape[0] == batch // world and tokens.shape[1] <= context
            assert torch.equal(mask, (t > 0) & (t < lengths[:, None]))  # from lengths: never from ids == pad
            assert (tokens[t >= lengths[:, None]] == file.pad).all()
            predicted += int(mask.sum())
    if n % batch == 0:
        assert predicted == len(file.tokens) - len(file)  # all but the first of each row


def test_windows_of_a_long_row_overlap_by_one_and_stay_inside_it(file):
    loader = SentenceLoader(file, 1, 0, context=8)
    long = int(file.lengths().argmax())
    start, end = file.offsets[long], file.offsets[long + 1]
    mine = [w for w in loader.windows.tolist() if start <= w[0] < end]
    assert mine[0][0] == start and mine[-1][1] == end and len(mine) > 2
    assert all(b[0] == a[1] - 1 and a[1] - a[0] == 8 for a, b in zip(mine, mine[1:]))
    with pytest.raises(ValueError, match="context 1 is too short"):
        SentenceLoader(file, 1, 0, context=1).batch(0)


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


def test_rows_longer_than_the_context_keep_their_eos(file):
    assert shorten(np.array([1, 5, 6, 7, 2]), 3).tolist() == [1, 5, 2]
    assert shorten(np.array([1, 5, 2]), 3).tolist() == [1, 5, 2]
    for batch in (RatingLoader(file, 30, 0, context=9).batch(0), PairLoader(file, 30, 0, context=9).batch(0)):
        tokens, lengths = batch[0], batch[1]
        assert lengths.max() == tokens.shape[1] == 9 and (tokens[torch.arange(30), lengths - 1] == file.eos).all()


def test_prompts_are_beginnings_of_longer_texts_of_their_domain(file):
    prompts = prompts_from_rows(file, 4, ["news"])
    long = [i for i in range(120) if i % 2 == 1 and len(file[i]) - 2 > 4]
    assert [p.tolist() for p in prompts] == [file[i][:5].tolist() for i in long] and all(
        p[0] == file.bos for p in prompts
    )
    assert len(prompts_from_rows(file, 4)) > len(prompts)
    with pytest.raises(ValueError, match=r"no text of .*train \(film\) is longer than 500 tokens"):
        prompts_from_rows(file, 500, ["film"])
    with pytest.raises(ValueError, match="no domain 'tweets'"):
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
    with pytest.raises(ValueError, match="prompt file .*prompts.txt is empty: 0 prompts") as e:
        prompts_from_text(path, tokenizer)
    one_line(e)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8"):
        prompts_from_text(path, tokenizer)
    with pytest.raises(FileNotFoundError):
        prompts_from_text(tmp_path / "nowhere.txt", tokenizer)
