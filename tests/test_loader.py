"""Loaders of prepared data: every row comes when it should, whole or cut as promised, for any shards, ranks and resumes."""

import hashlib
import random
from collections import Counter
from functools import partial
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import small_model
from test_examples import Words, encode, one_line, write

from data.baselines import baselines, pair_clusters
from data.examples import Examples
from data.loader import (
    GroupLoader,
    MixedOrder,
    Order,
    PairLoader,
    Permutation,
    PromptLoader,
    ScoredLoader,
    TextLoader,
    cut,
    in_order,
    micro_batches,
    open_data,
    pack,
    pad,
    shard,
    total_steps,
)
from data.pairs import SomeAnswers, made_pairs, make_pairs, spread
from data.records import Pair, Record
from data.text import prompt_lines
from model.packed import attend_apart
from model.transformer import Span

# --- which rows make up a step ---


def slow_permutation(n: int, key: tuple) -> list[int]:
    """The same in Python's integers, one place at a time."""
    digest = hashlib.sha512(",".join(map(str, key)).encode()).digest()
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]
    half = max(1, -(-(n - 1).bit_length() // 2))

    def mixed(x):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ x >> shift) * factor % 2**64
        return x ^ x >> 31

    found = []
    for x in range(n):
        while True:
            left, right = divmod(x, 2**half)
            for k in keys:
                left, right = right, left ^ mixed(right ^ k) >> (64 - half)
            x = left * 2**half + right
            if x < n:
                break
        found.append(x)
    return found


@given(n=st.integers(1, 300), key=st.tuples(st.integers(0, 2**70), st.integers(0, 9)))
def test_a_permutation_is_one_and_the_textbooks(n, key):
    got = Permutation(n, key)(np.arange(n)).tolist()
    assert sorted(got) == list(range(n)) and got == slow_permutation(n, key)


@given(n=st.integers(2**20, 2**60), places=st.lists(st.integers(0, 2**60), min_size=2, max_size=50, unique=True))
def test_a_permutation_of_very_many(n, places):
    places = np.unique(np.array(places) % n)
    got = Permutation(n, (1, 2))(places)
    assert len(np.unique(got)) == len(places) and got.min() >= 0 and got.max() < n


def test_permutations_are_the_same_on_every_machine():
    assert Permutation(12, (0, 0))(np.arange(12)).tolist() == [11, 6, 9, 0, 10, 1, 3, 5, 8, 7, 2, 4]
    assert Permutation(10**12, (7, 3))(np.array([0, 1, 10**12 - 1])).tolist() == [
        588260148845,
        955911700778,
        273493762142,
    ]


@pytest.mark.parametrize("n", [2, 3, 7, 16, 33])
def test_every_row_stands_at_every_place_alike_often(n):
    draws = 1500
    places = np.stack([Permutation(n, (seed, 0))(np.arange(n)) for seed in range(draws)])
    counts = np.stack([np.bincount(places[:, i], minlength=n) for i in range(n)])  # (n, n), draws / n each
    assert np.abs(counts - draws / n).max() < 5 * np.sqrt(draws / n)
    neighbours = np.mean(np.diff(places, axis=1) % n == 1)  # who follows whom is left to chance, too
    assert n < 4 or abs(neighbours - 1 / n) < 5 * np.sqrt(1 / n / draws / (n - 1)) + 0.02


orders = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.integers(1, n),
        st.integers(0, 5),
        st.none() | st.lists(st.integers(1, 9), min_size=n, max_size=n).map(np.array),
        st.integers(1, 5),
    )
)


def order_of(drawn) -> Order:
    n, batch, seed, lengths, window = drawn
    return Order(n, batch, seed, None if lengths is None else lengths.__getitem__, window)


@given(drawn=orders, epoch=st.integers(0, 3))
def test_every_row_comes_once_an_epoch_and_the_rest_is_dropped(drawn, epoch):
    order = order_of(drawn)
    steps = order.steps_per_epoch
    seen = np.concatenate([order.rows(epoch * steps + s) for s in range(steps)])
    assert steps == order.n // order.batch and len(seen) == steps * order.batch
    assert len(set(seen.tolist())) == len(seen) and set(seen.tolist()) <= set(range(order.n))


@given(drawn=orders, steps=st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_a_step_is_the_same_in_any_order_of_asking(drawn, steps):
    remembers = order_of(drawn)
    for step in steps:  # as after any resume
        assert np.array_equal(remembers.rows(step), order_of(drawn).rows(step))


def test_epochs_and_seeds_differ_and_shuffle():
    def epochs(seed: int) -> list[list[int]]:
        order, mixture = Order(100, 10, seed), MixedOrder((50, 50), (1, 1), 10, seed)
        rows = [np.concatenate([o.rows(e * 10 + s) for s in range(10)]) for o in (order, mixture) for e in (0, 1)]
        return [*map(list, rows), list(range(100))]

    assert len({tuple(rows) for rows in [*epochs(0), *epochs(1)[:4]]}) == 9


def test_buckets_save_padding_without_ordering_the_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, size=6400)
    order = Order(6400, 20, 0, lengths.__getitem__)
    longest = np.array([lengths[order.rows(s)].max() for s in range(320)])
    real = sum(lengths[order.rows(s)].sum() for s in range(320)) / (longest * 20).sum()
    assert real > 0.9 > 0.65 > lengths.mean() / 60
    assert abs(np.corrcoef(longest, np.arange(320))[0, 1]) < 0.3  # short batches are not all at the start
    assert abs(np.corrcoef(longest[:32], np.arange(32))[0, 1]) < 0.5


def test_a_batch_size_that_does_not_fit():
    for batch in (0, -2, 11):
        with pytest.raises(ValueError, match=f"batch size {batch} with 10 rows; it must be between 1 and 10"):
            Order(10, batch, 0)
    with pytest.raises(ValueError, match="a batch of 100 takes 70 rows of part 2, which has 60") as e:
        MixedOrder((500, 60), (0.3, 0.7), 100, 0)
    one_line(e)
    with pytest.raises(ValueError, match="the weight of part 1 is 0.0001 of the mixture: less than 1 in 1000"):
        MixedOrder((500, 60), (0.0001, 0.9999), 10, 0)


mixtures = st.integers(1, 4).flatmap(
    lambda k: st.tuples(
        st.lists(st.integers(40, 90), min_size=k, max_size=k),
        st.lists(st.sampled_from([0.05, 0.3, 1.0, 2.5]), min_size=k, max_size=k),
        st.integers(1, 20),
        st.integers(0, 5),
        st.booleans(),
        st.integers(1, 5),
    )
)


def mixture_of(drawn) -> MixedOrder:
    sizes, weights, batch, seed, bucket, window = drawn
    return MixedOrder(
        tuple(sizes), tuple(weights), batch, seed, (lambda rows: rows * 7 % 13) if bucket else None, window
    )


@settings(max_examples=50, deadline=None)
@given(drawn=mixtures, steps=st.lists(st.integers(0, 80), min_size=1, max_size=4))
def test_a_mixture_has_its_weights_and_every_part_its_epochs(drawn, steps):
    order = mixture_of(drawn)
    for step in steps:
        assert np.array_equal(order.rows(step), mixture_of(drawn).rows(step))
    share = np.array(order.weights) / sum(order.weights)
    ends = np.cumsum(order.sizes)
    count, seen = np.zeros(len(share)), Counter()
    for step in range(12 * order.window):
        rows = order.rows(step)
        part = np.searchsorted(ends, rows, side="right")
        here = np.bincount(part, minlength=len(share))
        assert np.abs(here - share * order.batch).max() <= 2  # every batch
        count += here
        seen.update(rows.tolist())
    assert (
        np.abs(count - share * count.sum()).max() <= 2 + count.sum() / 1000
    )  # and all of them: weights in thousandths
    for first, end in zip(np.append(0, ends[:-1]), ends):  # no row twice before every row once
        times = [seen[row] for row in range(first, end)]
        assert max(times) - min(times) <= 1


@given(
    lengths=st.lists(st.integers(1, 40), max_size=40),
    tokens=st.integers(40, 90),
    world=st.sampled_from([1, 2, 4]),
    packed=st.booleans(),
    high=st.integers(1, 3),
)
def test_micro_batches_fit_and_are_the_same_on_all_ranks(lengths, tokens, world, packed, high):
    lengths = np.array(lengths[: len(lengths) // world * world], np.int64)
    rows = 1 + np.arange(len(lengths)) * 7 % high  # of every unit
    tokens *= high
    parts = micro_batches(lengths, tokens, world, packed, rows)
    assert sorted(np.concatenate([np.zeros(0, int), *parts]).tolist()) == list(range(len(lengths) // world))

    def size(lengths, rows):
        return (lengths * rows).sum() if packed else lengths.max() * rows.sum()

    for rank in range(world):
        mine, high = (shard(x, rank, world) if len(x) else x for x in (lengths, rows))
        for part in parts:
            assert len(part) and size(mine[part], high[part]) <= tokens
    if world == 1:  # no two neighbours could have been one
        for a, b in zip(parts, parts[1:]):
            first = np.append(a, b[:1])
            assert size(lengths[first], rows[first]) > tokens


def test_a_row_that_is_longer_than_a_micro_batch():
    with pytest.raises(ValueError, match="a row has 9 tokens, a micro-batch may have 8"):
        micro_batches([3, 9], 8)


# --- data ---

rng = random.Random(0)
LETTERS = "abcdefghijklmnop"


def word(longest: int = 12) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(1, longest)))


def some_records() -> list[Record]:
    """Of every kind, with sources, and long ones among them."""
    records = []
    for i in range(24):
        a, b, c = word(9) + "x", word(9) + "y", word(9) + "z"
        kind, source = i % 6, "news" if i % 4 else "film"
        if kind == 0:
            records.append(Record("", (word(40),), source=source))  # a plain text
        elif kind == 1:
            records.append(Record(word(30), (a, b), None, (Pair(0, 1, 0.8, 2.0, 0.5),), source=source))
        elif kind == 2:
            pairs = (Pair(2, 0, 1.0, 2.0), Pair(2, 1, 0.5, 0.0))
            records.append(Record(word(30), (a, b, c), (1.0, 3.0, 3.0), pairs, {"x": [1, 2, 3]}, source=source))
        elif kind == 3:
            records.append(Record(word(30), (a,), (float(i % 2),), source=source))
        elif kind == 4:
            records.append(Record(word(30), (), extra={"answer": str(i)}, source=source))
        else:
            records.append(Record(word(9), (a,), source=source))  # history, and what was trained of it
    return records


RECORDS = some_records()
ENCODED = [encode(record, history=i % 6 == 5) for i, record in enumerate(RECORDS)]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Examples:
    return write(tmp_path_factory.mktemp("one") / "train", [ENCODED], columns=["x"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Examples:
    shards = [ENCODED[:5], [], ENCODED[5:6], ENCODED[6:19], ENCODED[19:]]
    return write(tmp_path_factory.mktemp("many") / "train", shards, columns=["x"])


def all_rows(loader) -> list:
    """The batches of all units in order, four at a time."""
    return [loader.take(units) for units in in_order(len(loader), 4)]


def same(a, b) -> bool:
    return all(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True))


LOADERS = {
    "text": lambda data, **o: TextLoader(data, 4, 1, **o),
    "all": lambda data, **o: TextLoader(data, 4, 1, loss="all", long_rows="drop", **o),
    "scored": lambda data, **o: ScoredLoader(data, 4, 1, **o),
    "column": lambda data, **o: ScoredLoader(data, 4, 1, column="x", **o),
    "pairs": lambda data, **o: PairLoader(data, 4, 1, **o),
    "groups": lambda data, **o: GroupLoader(data, 4, 1, **o),
    "prompts": lambda data, **o: PromptLoader(data, 4, 1, response_tokens=3, **o),
    "cut prompts": lambda data, **o: PromptLoader(data, 4, 1, max_prompt=7, long_prompts="left", **o),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("context", [13, 30, 1 << 20])
def test_shards_ranks_and_resumes_change_nothing(file, sharded, name, context):
    make = LOADERS[name]
    one, many = make(file, context=context), make(sharded, context=context)
    assert len(one) == len(many) and one.summary == many.summary
    assert all(map(same, all_rows(one), all_rows(many)))
    sent = ForkingPickler.loads(ForkingPickler.dumps(many))
    ranks = [make(sharded, context=context, rank=rank, world=2) for rank in range(2)]
    for step in (5, 0, 2, 5):
        batch = one.batch(step)
        assert same(batch, many.batch(step)) and same(batch, sent.batch(step))
        if name != "groups":  # whose rows are not the units
            rows = torch.stack([loader.batch(step).rows for loader in ranks], 1).ravel()
            assert torch.equal(rows, batch.rows)
    # each batch has exactly the rows of its units, behind one another, whatever they are beside
    for units in (one.order.rows(3), one.order.rows(0)):
        together, alone = one.take(units), [one.take(units[i : i + 1]) for i in range(len(units))]
        width = together[0].shape[1]
        rows = torch.cat([torch.nn.functional.pad(b[0], (0, width - b[0].shape[1]), value=file.pad) for b in alone])
        assert torch.equal(together[0], rows) and torch.equal(together[1], torch.cat([b[1] for b in alone]))
        assert one.lengths(units).tolist() == [int(b[1].max()) for b in alone]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", [name for name in LOADERS if "prompts" not in name])
def test_what_shares_a_forward_fits(file, name, packed):
    """Every unit of a step once, in batches of at most so many tokens as they are read; one that cannot fit is told first."""
    loader = LOADERS[name](file)
    units = np.arange(len(loader))
    most = int((loader.heights(units) * loader.lengths(units)).max())
    loader.with_room(most)
    with pytest.raises(ValueError, match=f"--micro_batch_tokens={most - 1}: .* {most} tokens .* allow as many"):
        loader.with_room(most - 1)
    for step, world in ((0, 1), (1, 2)):
        parts = loader.forwards(step, world, None, most, packed)
        assert torch.cat(parts).sort().values.tolist() == list(range(4 // world))
        for rank in range(world):
            mine = shard(loader.order.rows(step), rank, world)
            for part in parts:
                lengths = loader.take(mine[part.numpy()]).lengths
                assert (lengths.sum() if packed else lengths.max() * len(lengths)) <= most
    assert [part.tolist() for part in loader.forwards(0, 1, 3, None)] == [[0, 1, 2], [3]]
    assert [part.tolist() for part in loader.forwards(0, 2, None, None)] == [[0, 1]]


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_left_out_is_counted_and_sources_are_kept_apart(file, name):
    make = LOADERS[name]
    everything = make(file)
    for context in (7, 13, 30):
        loader = make(file, context=context)
        units = loader.units
        rows = len(np.unique(units.locate(np.arange(len(units)))[0]))
        assert rows + sum(units.left_out.values()) == loader.total == everything.total
        assert f"{rows:,} of {loader.total:,} {loader.what}" in one_line_of(loader.summary)
    parts = [make(file, sources=[source]) for source in file.sources]
    assert sum(map(len, parts)) == len(everything)
    for source, loader in zip(file.sources, parts):
        for batch in all_rows(loader):
            rows = batch.rows.numpy()
            if loader.what == "pairs":
                rows = file.pair(rows).winner
            prompts = rows if name.endswith("prompts") else file.prompt_of(rows)
            assert {file.sources[i] for i in file.source(prompts)} == {source}
    with pytest.raises(ValueError, match="has no source 'films'; it has 'film', 'news'"):
        make(file, sources=["films"])
    with pytest.raises(ValueError, match="context 1 is too short"):
        make(file, context=1)


def one_line_of(text: str) -> str:
    assert "\n" not in text
    return text


# --- texts ---


@settings(max_examples=30, deadline=None)
@given(
    context=st.integers(3, 50), loss=st.sampled_from(["answers", "all"]), long_rows=st.sampled_from(["left", "drop"])
)
def test_texts_predict_what_they_should_once(sharded, context, loss, long_rows):
    loader = TextLoader(sharded, 4, 0, context=context, loss=loss, long_rows=long_rows)
    got = {}
    for tokens, lengths, mask, rows in all_rows(loader):
        assert not mask[:, 0].any() and not (mask & (torch.arange(tokens.shape[1]) >= lengths[:, None])).any()
        assert lengths.max() <= context and (tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] == 0).all()
        for row, length, marked, answer in zip(tokens, lengths, mask, rows):
            got.setdefault(int(answer), []).append((row[:length].tolist(), marked[:length].tolist()))
    expected, answer = {}, 0
    for i, one in enumerate(ENCODED):
        for k, ids in enumerate(one.answers):
            kind = i % 6
            row = [*one.prompt, *ids]
            history = one.prompt_loss if one.prompt_loss and loss == "answers" else [loss == "all"] * len(one.prompt)
            mask = [False, *history[1:], *[True] * len(ids)]
            refused = (
                kind == 1 and k == 1 or kind == 2 and k == 0
            )  # loses at p 0.8; has 1 where others have 3; not a tie
            if kind == 0:  # windows that overlap by one
                starts = [s for s in range(0, len(row), context - 1) if s == 0 or s + 1 < len(row)]
                expected[answer] = [(row[s : s + context], [False] + mask[s : s + context][1:]) for s in starts]
            elif not refused and (len(row) <= context or long_rows == "left" and len(ids) < context):
                kept = list(range(max(0, len(row) - context), len(row)))
                if len(row) > context and len(ids) + 1 < context:
                    kept[0] = 0  # the start token stays
                expected[answer] = [([row[j] for j in kept], [mask[j] and place > 0 for place, j in enumerate(kept)])]
            answer += 1
    assert got == expected


def test_a_thumb_down_is_no_example(tmp_path):
    records = [Record(f"a{i}", (f"b{i}",), (float(i % 3 > 0),)) for i in range(9)]
    thumbs = write(tmp_path / "thumbs", [[encode(r) for r in records[:4]], [encode(r) for r in records[4:]]])
    loader = TextLoader(thumbs, 2, 0)
    assert len(loader) == 6 and loader.units.left_out["labelled 0"] == 3
    ratings = write(tmp_path / "ratings", [[encode(r) for r in records + [Record("c", ("d",), (0.5,))]]])
    assert len(TextLoader(ratings, 2, 0)) == 10  # who is rated 0 of 0 ... 4 was not refused
    both = Examples(tmp_path / "thumbs", tmp_path / "ratings")
    assert len(TextLoader(both, 2, 0)) == 16


def test_of_scored_answers_the_best_is_the_example(tmp_path):
    records = [
        Record("q", ("aa", "bb", "cc"), (2.0, 5.0, 5.0)),
        Record("q", ("dd",), (1.0,)),
        Record("q", ("ee", "ff")),
    ]
    loader = TextLoader(write(tmp_path / "train", [[encode(record) for record in records]]), 1, 0)
    assert [int(row) for batch in all_rows(loader) for row in batch.rows] == [1, 2, 3, 4, 5]
    assert loader.units.left_out["below the best score of their prompt"] == 1


def test_packed_rows_are_the_rows(file):
    loader = TextLoader(file, 6, 0, context=20, bucket=False)
    batch, packed = loader.batch(3), loader.packed(3)
    assert packed.tokens.shape == packed.positions.shape == packed.mask.shape == (1, sum(packed.sizes))
    rows = zip(batch.tokens, batch.lengths, batch.mask)
    parts = (x[0].split(packed.sizes) for x in (packed.tokens, packed.positions, packed.mask))
    for (row, length, mask), tokens, positions, marked in zip(rows, *parts, strict=True):
        assert torch.equal(tokens, row[:length]) and torch.equal(marked, mask[:length])
        assert positions.tolist() == list(range(length))
    assert same(pack(batch)[:3], packed[:3])


# --- scores, pairs, groups ---


@given(prompt=st.lists(st.integers(1, 3), min_size=1, max_size=9), room=st.integers(1, 12))
def test_cut_keeps_the_end_behind_the_start(prompt, room):
    kept = [prompt[i] for i in cut(np.array(prompt), room, 1)]
    assert len(kept) == min(room, len(prompt))
    if len(prompt) <= room:
        assert kept == prompt
    elif prompt[0] == 1 and room > 1:
        assert kept == [1, *prompt[len(prompt) - room + 1 :]]
    else:
        assert kept == prompt[len(prompt) - room :]


def expected_row(one, k: int, context: int, group: list[int]) -> tuple[list[int], int]:
    """Prompt and answer k, the prompt cut so that the longest answer of the group fits behind it; and the prompt's length."""
    room = context - max(len(one.answers[j]) for j in group)
    prompt = [one.prompt[i] for i in cut(np.array(one.prompt), room, 1)]
    return [*prompt, *one.answers[k]], len(prompt)


@settings(max_examples=20, deadline=None)
@given(context=st.integers(3, 50))
def test_scores_pairs_and_groups_in_any_context(sharded, context):
    scored, pairs, groups, answer = {}, [], {}, 0
    for i, one in enumerate(ENCODED):
        n, record = len(one.answers), one.record
        for k in range(n):
            if record.scores and len(one.answers[k]) < context:
                scored[answer + k] = (*expected_row(one, k, context, [k]), record.scores[k])
        for pair in record.pairs:
            both = [pair.winner, pair.loser]
            if max(len(one.answers[k]) for k in both) < context:
                pairs.append(([expected_row(one, k, context, both) for k in both], pair))
        if (record.scores or record.pairs) and max(map(len, one.answers)) < context:
            groups[i] = [expected_row(one, k, context, list(range(n))) for k in range(n)]
        answer += n

    got = {}
    for tokens, lengths, prompt_lengths, scores, rows in all_rows(ScoredLoader(sharded, 4, 0, context=context)):
        for row, n, p, score, answer in zip(tokens, lengths, prompt_lengths, scores, rows):
            got[int(answer)] = (row[:n].tolist(), int(p), float(score))
    assert got == scored

    got = []
    for batch in all_rows(PairLoader(sharded, 4, 0, context=context)):
        sides = list(zip(batch.tokens, batch.lengths, batch.prompt_lengths))
        rows = [(row[:n].tolist(), int(p)) for row, n, p in sides]
        for k, (p, gap, weight) in enumerate(zip(batch.p.tolist(), batch.gap.tolist(), batch.weight.tolist())):
            winner, loser = rows[2 * k : 2 * k + 2]
            assert winner[0] != loser[0] and winner[0][: winner[1]] == loser[0][: loser[1]]
            got.append(([winner, loser], (pytest.approx(p), gap, weight)))
    assert got == [(rows, (pair.p, pair.gap, pair.weight)) for rows, pair in pairs]

    got, judged = {}, []
    for batch in all_rows(GroupLoader(sharded, 4, 0, context=context)):
        rows = [(row[:n].tolist(), int(p)) for row, n, p in zip(batch.tokens, batch.lengths, batch.prompt_lengths)]
        prompts = sharded.prompt_of(batch.rows.numpy())
        assert (np.diff(batch.group) == (np.diff(prompts) > 0)).all()
        for prompt, row in zip(prompts.tolist(), rows):
            got.setdefault(prompt, []).append(row)
        for w, x, p, gap, weight in zip(batch.winner, batch.loser, batch.p, batch.gap, batch.weight):
            assert batch.group[w] == batch.group[x]
            judged.append((rows[w][0][rows[w][1] :], rows[x][0][rows[x][1] :], pytest.approx(float(p)), gap, weight))
    assert got == groups
    whole = [(ENCODED[i], pair) for i in groups for pair in RECORDS[i].pairs]
    assert judged == [(one.answers[q.winner], one.answers[q.loser], q.p, q.gap, q.weight) for one, q in whole]


def test_sides_that_only_differ_in_what_is_cut_are_no_pair(tmp_path):
    records = [Record(prompt + "same end", ("answer",), (score,)) for prompt, score in (("one", 1.0), ("two", 2.0))]
    data = write(tmp_path / "train", [[encode(record) for record in records]])
    made = made_pairs(data, 1)
    assert len(PairLoader(data, 1, 0, made=made)) == 1
    loader = PairLoader(data, 1, 0, made=made, context=12)
    assert len(loader) == 0 and loader.units.left_out["alike in what fits the context"] == 1
    with pytest.raises(ValueError, match="leaves nothing to visit: 0 of 1 pairs; left out: 1 alike in what") as e:
        loader.batch(0)
    one_line(e)


# --- prompts ---


@settings(max_examples=20, deadline=None)
@given(
    context=st.integers(8, 50),
    response=st.integers(0, 7),
    long=st.sampled_from(["drop", "left"]),
    step=st.integers(0, 30),
)
def test_prompts_of_any_length_and_the_width_of_a_step(sharded, context, response, long, step):
    options = dict(context=context, response_tokens=response, long_prompts=long)
    loaders = [PromptLoader(sharded, 2, 3, rank, 2, **options) for rank in range(2)]
    if not len(loaders[0]):
        return
    assert sum(len(b.rows) for b in all_rows(loaders[0])) == len(loaders[0])
    batches = [loader.batch(step) for loader in loaders]
    longest = max(int(batch.prompt_lengths.max()) for batch in batches)
    assert [loader.width(step) for loader in loaders] == [longest + response] * 2 and longest + response <= context
    for loader, batch in zip(loaders, batches):
        for row, n, prompt in zip(batch.prompts, batch.prompt_lengths, batch.rows.tolist()):
            tokens = ENCODED[prompt].prompt
            assert row[:n].tolist() == [tokens[i] for i in cut(np.array(tokens), context - response, 1)]
            assert long == "left" or n == len(tokens)
        assert [record.extra for record in loader.records(batch.rows)] == [RECORDS[i].extra for i in batch.rows]


def test_prompts_that_cannot_fit_are_refused_before_the_first_step(file):
    for options, message in (
        (dict(response_tokens=20), "20 tokens leaves no room for a prompt in a context of 20; use at most 19"),
        (
            dict(response_tokens=8, max_prompt=13),
            "a prompt of 13 tokens and a response of 8 .* of 20: use prompts of 1 to 12",
        ),
        (dict(max_prompt=0), "use prompts of 1 to 20 tokens"),
    ):
        with pytest.raises(ValueError, match=message) as e:
            PromptLoader(file, 2, 0, context=20, **options)
        one_line(e)
    loader = PromptLoader(file, 2, 0, max_prompt=9)
    longer = sum(len(one.prompt) > 9 for one in ENCODED)
    empty = sum(len(one.prompt) < 2 for one in ENCODED)
    kept = 24 - empty - longer
    assert loader.summary == f"{kept} of 24 prompts; left out: {empty} empty, {longer} longer than 9 tokens"
    left = PromptLoader(file, 2, 0, max_prompt=9, long_prompts="left")
    assert left.summary == (
        f"{24 - empty} of 24 prompts; left out: {empty} empty; {longer} prompts cut from the left to fit"
    )


# --- mixtures ---


def test_mixtures_by_weight(tmp_path):
    for name, count in (("a", 30), ("b", 50)):
        records = [Record(f"{name}{i}", (f"{word()}x", f"{word()}y"), (1.0, 2.0), (Pair(1, 0),)) for i in range(count)]
        write(tmp_path / name / "train", [[encode(r) for r in records[:9]], [encode(r) for r in records[9:]]])
    spec = f"{tmp_path}/a:0.75, {tmp_path}/b:0.25"
    data = open_data(spec, "train", verify=True)
    assert data.weights == (0.75, 0.25) and data.prompts == 80
    made = made_pairs(data, 200)
    assert (
        np.bincount(made.winner < 60).tolist() == np.bincount(made.loser < 60).tolist() == [125, 75]
    )  # as answers are
    makers = [*LOADERS.values(), lambda data: PairLoader(data, 4, 1, made=made)]
    for make in (m for name, m in zip([*LOADERS, "made"], makers) if name != "column"):
        loader, again = make(data), make(open_data(spec, "train"))
        of_a = []
        for step in range(60):
            batch = loader.batch(step)
            assert same(batch, again.batch(step))
            rows = loader.units.locate(loader.order.rows(step))[0]
            if loader.what == "pairs":
                rows = loader._pairs(rows).winner
            of_a.append(int((rows < (30 if loader.what == "prompts" else 60)).sum()))
        assert sum(of_a) == 180 and set(of_a) <= {2, 3, 4}
    assert open_data(tmp_path / "a", "train").prompts == 30


@pytest.mark.parametrize(
    "spec, message",
    [
        ("a,b:0.3", "'a' of the data 'a,b:0.3' is no directory:weight; write a:0.7,b:0.3"),
        ("a:x,b:0.3", "'a:x' of the data"),
        ("a:0,b:1", "'a:0' of the data"),
        ("a:nan", "'a:nan' of the data"),
        (":1,b:1", "':1' of the data"),
        ("a:1,a:2", "name a directory twice"),
    ],
)
def test_mixtures_that_are_none(spec, message):
    with pytest.raises(ValueError, match=message) as e:
        open_data(spec, "train")
    one_line(e)
    with pytest.raises(FileNotFoundError, match="no prepared data at nowhere/train"):
        open_data("nowhere", "train")


# --- what the baselines and the report card read ---


def test_answers_with_scores_alone_are_paired_by_them(tmp_path):
    rows = np.random.default_rng(0)
    scores = rows.normal(size=60).round(1)
    words = ["good", "bad", "film", "news", "plot"]
    texts = [" ".join(rows.choice(words, 6)) + f" {i}" for i in range(60)]
    records = [
        Record("", (text,), (score,), (), {"std": 1.0, "half": -score}, source="ab"[i % 2])
        for i, (text, score) in enumerate(zip(texts, scores))
    ]
    encoded = [encode(r, vocab_size=200) for r in records]
    data = write(tmp_path / "train", [encoded[:20], encoded[20:]], Words(vocab_size=200), columns=["std", "half"])
    some = SomeAnswers(data, most_pairs=100)
    pairs = make_pairs(scores.astype(np.float32), np.arange(60) % 2, 100, seed=0)
    for name, values in pairs.items():
        assert np.array_equal(some.column(name), values)
    assert some.texts == texts and some.has("rating", "half") and not some.has("rest")
    assert some.lengths().tolist() == [len(data.row(i)) for i in range(60)]
    made = made_pairs(data, 100, deviation="std")
    assert np.array_equal(made.winner, pairs["pair_chosen"]) and np.array_equal(made.loser, pairs["pair_rejected"])
    z = (scores[made.winner] - scores[made.loser]) / np.sqrt(2)
    np.testing.assert_allclose(made.p, torch.special.ndtr(torch.tensor(z)).numpy(), atol=1e-6)
    batch = PairLoader(data, 5, 0, made=made).take(np.arange(5))
    assert [row[:n].tolist() for row, n in zip(batch.tokens[::2], batch.lengths[::2])] == [
        data.row(i).tolist() for i in made.winner[:5]
    ]
    assert torch.allclose(batch.scores[:, 0] - batch.scores[:, 1], batch.gap)
    turned = SomeAnswers(data, most_pairs=100, column="half")
    assert np.array_equal(turned.column("pair_chosen"), some.column("pair_rejected"))
    chosen = spread(data.source(), 10, seed=1)
    few = SomeAnswers(data, chosen)
    assert few.texts == [texts[i] for i in chosen] and few.column("domain").tolist() == [i % 2 for i in chosen]
    assert set(baselines(some, few, None)) == {"bow", "length"}


def test_preferences_keep_their_pairs(file, sharded):
    some, many = SomeAnswers(file), SomeAnswers(sharded)
    pairs = file.pair()
    assert np.array_equal(some.column("pair_chosen"), pairs.winner) and np.array_equal(
        some.column("pair_gap"), pairs.gap
    )
    assert some.texts == many.texts == [answer for record in RECORDS for answer in record.answers]
    assert np.array_equal(np.nan_to_num(some.column("rating")), np.nan_to_num(file.column("score").astype(np.float32)))
    prompts = np.array([13, 1])
    two = SomeAnswers(sharded, prompts)
    assert two.texts == [*RECORDS[13].answers, *RECORDS[1].answers]
    assert two.column("pair_chosen").tolist() == [0, 2] and two.column("pair_rejected").tolist() == [1, 3]


def test_preferences_without_scores_are_rated_by_their_gaps(tmp_path):
    records = [Record(f"q{i}", ("aa", "bb", "cc"), None, (Pair(0, 1, gap=2.0), Pair(0, 2, gap=4.0))) for i in range(3)]
    some = SomeAnswers(write(tmp_path / "train", [[encode(record) for record in records]]))
    assert some.column("rating").tolist() == [1.5, -1.0, -2.0] * 3
    clusters = pair_clusters(some)[:, 0]
    assert (clusters[::2] == clusters[1::2]).all() and len(set(clusters)) == 3


def test_a_packed_row_is_read_as_its_texts_are(file):
    """In model/packed.py's conventions: positions begin anew, and no text sees another."""
    model = small_model("llama", context=64, vocab_size=50)
    batch = TextLoader(file, 6, 0, context=20, bucket=False).batch(3)
    packed = pack(batch)
    apart = partial(attend_apart, sizes=packed.sizes, shared=[0] * len(packed.sizes))
    span = Span(packed.positions, model.rotations(packed.positions), attend=apart)
    hidden = model.norm(model.blocks(model.embed(packed.tokens, span), span))[0].split(packed.sizes)
    for states, row, n in zip(hidden, batch.tokens, batch.lengths):
        torch.testing.assert_close(states, model.trunk(row[None, :n])[0])


# --- small things ---


@given(order=orders, world=st.sampled_from([1, 2, 4]), step=st.integers(0, 20))
def test_the_ranks_share_the_global_batch(order, world, step):
    rows = order_of(order).rows(step)
    if len(rows) % world:
        with pytest.raises(ValueError, match=f"batch size {len(rows)} is not a multiple of {world} processes; try"):
            shard(rows, 0, world)
        return
    parts = [shard(rows, rank, world) for rank in range(world)]
    assert all(len(p) == len(rows) // world for p in parts)
    assert np.array_equal(np.stack(parts, axis=1).ravel(), rows)  # interleaved: together the global batch, in its order


def test_in_order_visits_everything_once():
    assert [r.tolist() for r in in_order(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_order(0, 3)) == []


@given(rows=st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=9), min_size=1, max_size=5))
def test_pad(rows):
    tokens, lengths = pad([np.array(r, np.uint16) for r in rows], pad_id=0)
    assert tokens.dtype == lengths.dtype == torch.int64 and tokens.shape == (len(rows), max(map(len, rows)))
    assert [t[:n].tolist() for t, n in zip(tokens, lengths)] == rows and lengths.tolist() == [len(r) for r in rows]
    assert all((t[n:] == 0).all() for t, n in zip(tokens, lengths))


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffthe film\r\n\n  \nwas <s> very\n", encoding="utf-8")
    assert prompt_lines(path) == ["the film", "was <s> very"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompt file .*prompts.txt is empty: 0 prompts"):
        prompt_lines(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8"):
        prompt_lines(path)
    with pytest.raises(FileNotFoundError):
        prompt_lines(tmp_path / "nowhere.txt")


def test_epochs_are_whole_steps_and_at_least_one():
    assert (total_steps(1, 7), total_steps(0.5, 7), total_steps(2.25, 4)) == (7, 3, 9)
    with pytest.raises(ValueError, match="epochs 0.1 of 7 steps each is less than one step: raise it or lower --batch"):
        total_steps(0.1, 7)
