"""Act and judge: what a row is told does not depend on its company, its padding or the micro-batch it came in."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rollout import EOS, PAD, RESPONSE, TEMPERATURE, WIDTH, act, actor_critic, moved, reference, reward_model

from model.generate import Generated
from rlhf.infra import distributed, optim
from rlhf.ppo import update as ppo
from rlhf.ppo.rollout import Experience, Rollout, concatenate, gather, judge, minibatches, share

pytestmark = pytest.mark.bits

ROWS = 16


def rollout_of(samples, policy, micro_batch=4, width=WIDTH, family="gpt2", dtype=torch.float32) -> Rollout:
    return judge(samples, policy, reference(family, dtype), reward_model(dtype).score, micro_batch, width)


@pytest.fixture(scope="module")
def judged() -> Rollout:
    policy = actor_critic("shared", "gpt2", torch.float32)
    return rollout_of(act(policy, torch.arange(ROWS)), policy)


def some(rows=3, width=5, **changes) -> Rollout:
    """Made-up facts whose every number says which row and column it is."""
    grid = torch.arange(rows)[:, None] * 100.0 + torch.arange(width)
    facts = {f.name: grid.clone() for f in fields(Rollout)}
    facts |= {"tokens": grid.long(), "lengths": torch.tensor([4, 2, 3, 5, 1, 4][:rows]), "scores": grid[:, 0]}
    facts |= {"finished": torch.arange(rows) % 2 == 0, "mask": torch.arange(width) < facts["lengths"][:, None]}
    facts["parts"] = grid[:, :2]
    facts["features"] = grid[..., None] + torch.arange(2) / 10
    return Rollout(**(facts | changes))


def same(ours: Rollout, theirs: Rollout) -> bool:
    return type(ours) is type(theirs) and all(
        torch.equal(getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(theirs)
    )


def real_tokens(rows) -> torch.Tensor:
    """Ids with -1 for padding: which id stands there is nobody's business."""
    return torch.where(torch.arange(rows.tokens.shape[1]) < rows.lengths[:, None], rows.tokens, -1)


# ---- the types


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(4), torch.zeros(3, 5, 1), torch.zeros(())]
)
def test_shapes_are_checked_when_it_is_made(wrong):
    with pytest.raises(ValueError, match=r"Rollout.values has shape .* tokens have \(3, 5\)"):
        some(values=wrong)


def test_experience_is_a_rollout_with_credit():
    facts, credit = some(), [torch.full((3, 5), float(i)) for i in range(3)]
    experience = Experience.of(facts, *credit)
    assert [f.name for f in fields(Experience)][-3:] == ["rewards", "advantages", "returns"]
    assert experience.rewards is credit[0] and experience.advantages is credit[1] and experience.returns is credit[2]
    assert all(getattr(experience, f.name) is getattr(facts, f.name) for f in fields(Rollout))
    with pytest.raises(ValueError, match=r"Experience.returns has shape \(3, 4\)"):
        Experience.of(facts, *credit[:2], torch.zeros(3, 4))


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True])], ids=str)
def test_indexing_acts_on_every_field(rows):
    facts = some()
    for chosen in (facts[rows], Experience.of(facts, facts.values, facts.values, facts.values)[rows]):
        for field in fields(chosen):
            whole = facts.values if field.name in ("rewards", "advantages", "returns") else getattr(facts, field.name)
            assert torch.equal(getattr(chosen, field.name), whole[rows]), field.name
    assert len(facts[rows]) == 2 and isinstance(chosen, Experience)


def test_trim_and_split_drop_padding_columns_alone():
    facts = some(6, 7)
    assert facts.trim().tokens.shape == (6, 5) and facts.trim().scores.shape == (6,)
    parts = list(facts.split(4))
    assert [tuple(part.tokens.shape) for part in parts] == [(4, 5), (2, 4)]
    assert torch.equal(torch.cat([part.lengths for part in parts]), facts.lengths)
    for i, part in enumerate(parts):
        assert same(
            part, facts[4 * i : 4 * i + 4].map(lambda x, w=part.tokens.shape[1]: x[:, :w] if x.dim() > 1 else x)
        )
    assert sum(int(part.mask.sum()) for part in parts) == int(facts.mask.sum())  # no token is lost


def test_concatenate_undoes_the_cutting():
    facts = some(6)
    assert same(concatenate([facts[:1], facts[1:4], facts[4:]]), facts)


def test_padding_stands_behind_the_tokens():
    """The last axis of the features is no sequence."""
    facts = some(3, 5)
    padded = facts.pad(8)
    assert padded.tokens.shape == (3, 8) and padded.features.shape == (3, 8, 2) and padded.scores.shape == (3,)
    assert same(padded.map(lambda x: x[:, :5] if x.dim() > 1 else x), facts) and same(facts.pad(5), facts)
    assert not padded.features[:, 5:].any() and not padded.tokens[:, 5:].any()


class Ranks:
    """Two ranks in one process: `all_gather_rows` knows what the other one holds."""

    world = 2

    def __init__(self, parts: list[Rollout]):
        self.columns = [[getattr(part, f.name) for part in parts] for f in fields(Rollout)]

    def all_gather_rows(self, x):
        return torch.cat(self.columns.pop(0))


def test_gather_restores_the_global_order():
    """Rank r holds rows r, r + 2, ...: the gathered rollout is what one process would hold, but for the features."""
    facts = some(6)
    bare = replace(facts, features=facts.features[..., :0])  # nobody is asked to send nothing
    parts = [facts[rank::2] for rank in (0, 1)]
    for part in parts:
        columns = Ranks(parts)
        columns.columns.pop()  # of the features
        assert same(gather(part, columns), bare)

    class Silent(Ranks):
        def all_gather_rows(self, x):
            assert x.numel()
            return super().all_gather_rows(x)

    parts = [bare[rank::2] for rank in (0, 1)]
    assert same(gather(parts[0], Silent(parts)), bare)
    assert gather(facts, distributed.Dist()) is facts


class Post:
    """Ranks in one process, asked one after the other: first what they send, then again, with what they get."""

    def __init__(self, world: int):
        self.world, self.rank, self.device, self.sent, self.asked = world, 0, torch.device("cpu"), {}, 0

    def exchange_rows(self, parts, counts):
        self.asked += 1
        self.sent[self.rank] = parts
        theirs = [self.sent[rank][self.rank] if rank in self.sent else parts[0] for rank in range(self.world)]
        assert len(self.sent) < self.world or [len(x) for x in theirs] == counts
        return torch.cat(theirs) if len(self.sent) == self.world else torch.cat(parts)[:1].repeat(sum(counts), 1, 1)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_features_go_to_whoever_learns_from_their_rows(world):
    """In every minibatch of three epochs each rank has what one process would have; in the first nobody sends anything."""
    lengths = torch.tensor([4, 2, 3, 5, 1, 4] * 4)
    facts = some(24, lengths=lengths, mask=torch.arange(5) < lengths[:, None])
    bare = facts if world == 1 else replace(facts, features=facts.features[..., :0])
    for number, rows in enumerate(minibatches(24, 2, 3, 1, 0)):
        post = Post(world)
        for post.rank in [*range(world), *range(world)]:
            part = share(bare, facts.features[post.rank :: world], rows, post)
            if post.asked > world or not post.asked:
                assert same(part, facts[rows[post.rank :: world]])
        assert post.asked == (0 if world == 1 or number < 2 else 2 * world)


# ---- minibatches


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99), st.integers(0, 99))
def test_every_row_once_per_epoch(count, size, epochs, seed, iteration):
    batches = list(minibatches(count * size, count, epochs, seed, iteration))
    assert [len(rows) for rows in batches] == [size] * (count * epochs)
    for epoch in range(epochs):
        rows = torch.cat(batches[epoch * count : (epoch + 1) * count])
        assert rows.sort().values.tolist() == list(range(count * size))
        if epoch == 0:
            assert rows.tolist() == list(range(count * size))
    again = minibatches(count * size, count, epochs, seed, iteration)
    assert all(torch.equal(a, b) for a, b in zip(batches, again))


def test_later_epochs_shuffle_anew():
    orders = {
        tuple(torch.cat(list(minibatches(64, 4, 3, seed, iteration))[4 * epoch : 4 * epoch + 4]).tolist())
        for seed in (0, 1) for iteration in (0, 1) for epoch in (1, 2)
    }  # fmt: skip
    assert len(orders) == 8


def test_minibatches_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    list(minibatches(8, 2, 3, 1, 1))
    assert torch.equal(torch.get_rng_state(), state)


# ---- judge


def test_what_judge_reports(judged):
    """Facts of the samples unchanged, zero outside the mask, and the rows' kinds that the other tests rely on."""
    policy = actor_critic("shared", "gpt2", torch.float32)
    samples = act(policy, torch.arange(ROWS))
    T = samples.tokens.shape[1]
    assert judged.tokens.shape == (ROWS, WIDTH) and torch.equal(real_tokens(judged)[:, :T], real_tokens(samples))
    assert torch.equal(judged.mask[:, :T], samples.mask) and not judged.mask[:, T:].any()
    assert torch.equal(judged.lengths, samples.lengths) and torch.equal(judged.finished, samples.finished)
    assert torch.equal(judged.sampler_logprobs[:, :T], samples.logprobs)
    for name in ("logprobs", "ref_logprobs", "values", "entropy", "sampler_logprobs"):
        x = getattr(judged, name)
        assert (x[~judged.mask] == 0).all() and (x[judged.mask] != 0).all() and not x.requires_grad, name
    assert 0 < judged.finished.sum() < ROWS and len(set(judged.lengths.tolist())) > 4
    assert (judged.tokens[judged.mask] == PAD).any() and len(set(judged.scores.tolist())) > ROWS // 2


def test_the_sampler_and_the_training_forward_agree(judged):
    """The cache, row by row, against the full forward: the same distribution at the same temperature."""
    torch.testing.assert_close(judged.logprobs, judged.sampler_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("micro_batch, count", [(1, 1), (4, 2), (16, 1)])
def test_the_first_ratio_is_exactly_one(family, critic, micro_batch, count):
    """Bit for bit: the first epoch puts the same rows with the same padding through the same kernels as judge did."""
    policy = actor_critic(critic, family, torch.float32)
    samples = act(policy, torch.arange(ROWS))
    rollout = rollout_of(samples, policy, micro_batch, family=family)
    for rows in minibatches(ROWS, count, 1, seed=1, iteration=0):
        for batch in rollout[rows].split(micro_batch):
            out = policy(batch.tokens, batch.mask)  # with a graph, which judge had not
            assert out.logprobs.requires_grad
            assert ((out.logprobs - batch.logprobs).exp() == 1).all()
            assert torch.equal(out.values, batch.values)


def test_the_ratio_stays_near_one_for_other_rows_and_paddings(judged):
    """Later epochs shuffle: other company, other kernels, and only rounding may differ. A moved policy is noticed."""
    policy = actor_critic("shared", "gpt2", torch.float32)
    ratios = []
    for rows in list(minibatches(ROWS, 2, 3, seed=1, iteration=0))[2:]:
        for batch in judged[rows].split(2):
            ratios.append((policy(batch.tokens, batch.mask).logprobs - batch.logprobs).exp()[batch.mask])
    assert 0 <= (torch.cat(ratios) - 1).abs().max() < 1e-5
    batch = judged.trim()
    assert ((moved(policy, 0.01)(batch.tokens, batch.mask).logprobs - batch.logprobs).abs() > 1e-4).any()


def test_the_loop_logs_a_first_ratio_of_one(judged):
    """As it is logged: the mean over the tokens of the first update."""
    policy = actor_critic("shared", "gpt2", torch.float32)
    experience = Experience.of(judged, judged.values, judged.values, judged.values)
    precision = optim.amp(torch.device("cpu"))
    update = ppo.accumulate_gradient(policy, experience, ppo.Objective(clip=0.2), 4, distributed.Dist(), precision)
    assert update["policy/ratio"] == 1 and update["policy/approxkl"] == update["policy/clipfrac"] == 0


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 16])
def test_micro_batches_change_nothing(judged, micro_batch):
    policy = actor_critic("shared", "gpt2", torch.float32)
    other = rollout_of(act(policy, torch.arange(ROWS)), policy, micro_batch)
    assert torch.equal(real_tokens(other), real_tokens(judged))
    for name in (f.name for f in fields(Rollout) if f.name != "tokens"):
        torch.testing.assert_close(getattr(other, name), getattr(judged, name), rtol=1e-5, atol=1e-5, msg=name)


@settings(max_examples=25)
@given(
    rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6),
    extra=st.integers(0, 5),
    junk=st.integers(0, 12),
    micro_batch=st.integers(1, 6),
)
def test_company_and_padding_change_nothing(judged, rows, extra, junk, micro_batch):
    """Any rows, also twice, in any order, with more columns of any id behind them: 1e-5 in float32."""
    policy = actor_critic("shared", "gpt2", torch.float32)
    part = judged[torch.tensor(rows)].trim()
    tokens = torch.cat([part.tokens, torch.full((len(rows), extra), junk)], 1)
    tokens = torch.where(torch.arange(tokens.shape[1]) < part.lengths[:, None], tokens, junk)
    wide = [torch.cat([x, torch.zeros(len(rows), extra, dtype=x.dtype)], 1) for x in (part.mask, part.sampler_logprobs)]
    prompt_lengths = part.mask.int().argmax(1)
    samples = Generated(tokens, part.lengths, prompt_lengths, wide[0], wide[1], part.finished)
    again = rollout_of(samples, policy, micro_batch, width=WIDTH + extra)
    for name in ("logprobs", "entropy", "values", "ref_logprobs", "scores"):
        ours, theirs = getattr(again, name), getattr(judged, name)[torch.tensor(rows)]
        ours = ours[:, :WIDTH] if ours.dim() == 2 else ours
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)


def test_rows_ending_everywhere():
    """One token each, with and without EOS: the shortest responses there are."""
    policy = actor_critic("shared", "gpt2", torch.float32)
    tokens, lengths = torch.tensor([[3, EOS], [3, 4]]), torch.tensor([2, 2])
    mask = torch.tensor([[False, True]] * 2)
    samples = Generated(tokens, lengths, lengths - 1, mask, torch.zeros(2, 2), torch.tensor([True, False]))
    rollout = rollout_of(samples, policy, 2, width=1 + RESPONSE)
    p = (policy.model(torch.tensor([[3]]))[0, -1] / TEMPERATURE).softmax(-1).log()
    torch.testing.assert_close(rollout.logprobs[:, 1], p[[EOS, 4]].detach())
    assert rollout.mask.sum() == 2
