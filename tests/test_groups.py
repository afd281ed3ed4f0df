"""Groups without contrast: counted, and sampled again the same way for any number of ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import lines

import train_ppo
from model.generate import Generated
from rlhf.infra import optim
from rlhf.ppo.acting import Acting, Resampling, flat_groups, group_metrics
from rlhf.ppo.update import CLIPPED, POLICY_LOSSES

CPU = optim.amp(torch.device("cpu"))
RESPONSE = 3


class Batch(NamedTuple):
    prompts: torch.Tensor
    prompt_lengths: torch.Tensor
    rows: torch.Tensor


class Prompts:
    """Prompts of 1 to 4 tokens: number i is i + 1, as often as it is long."""

    def __init__(self, groups: int, seed: int):
        self.groups, self.seed = groups, seed

    def batch(self, step: int) -> Batch:
        rows = (torch.arange(self.groups) * 7 + step * 11 + self.seed * 5) % 40
        lengths = rows % 4 + 1
        tokens = torch.where(torch.arange(int(lengths.max())) < lengths[:, None], rows[:, None] + 1, 0)
        return Batch(tokens, lengths, rows)

    def width(self, step: int) -> int:
        return self.batch(step).prompts.shape[1] + RESPONSE


def respond(prompts, lengths, ids, iteration) -> Generated:
    """What a row says depends on its id and the iteration alone, as with `act`."""
    rows, width = len(prompts), prompts.shape[1] + RESPONSE
    said = (ids * 31 + iteration * 17) % 90 + 100
    ends = lengths + 1 + said % RESPONSE
    columns = torch.arange(width)
    mask = (columns >= lengths[:, None]) & (columns < ends[:, None])
    tokens = torch.where(mask, said[:, None] + columns, torch.nn.functional.pad(prompts, (0, RESPONSE)))
    return Generated(
        tokens, ends, lengths, mask, torch.where(mask, -said[:, None] / 7, 0), said % 2 == torch.zeros(rows)
    )


respond.refresh = lambda: None  # a sampler whose weights never change


class Ranks:
    """Ranks that are threads: each waits until all have handed in their rows."""

    def __init__(self, world: int):
        self.world, self.barrier, self.parts = world, threading.Barrier(world), [None] * world

    def rank(self, rank: int):
        def all_gather_rows(x):
            self.parts[rank] = x
            self.barrier.wait(60)
            whole = torch.cat(self.parts)
            self.barrier.wait(60)
            return whole

        return type("Rank", (), {"rank": rank, "world": self.world, "all_gather_rows": staticmethod(all_gather_rows)})()


def resampled(world: int, groups: int, n: int, tries: int, levels: int, iteration: int, penalty: float):
    """What all ranks have in the end, in global order; and what the first sampling was."""

    def score(tokens, lengths, mask, rows):
        last = tokens[torch.arange(len(tokens)), lengths - 1]
        return torch.stack([(last * 13 % levels).float(), rows.float()], 1)

    ranks, first = Ranks(world), Prompts(groups, 1)

    def one(rank: int):
        further = Prompts(groups, 2)
        return Resampling(respond, first, n, ranks.rank(rank), further, score, tries, penalty, 2, CPU)(iteration)

    with ThreadPoolExecutor(world) as pool:
        acted = list(pool.map(one, range(world)))
    width = acted[0].width
    assert all(
        a.width == width and torch.equal(a.prompts, acted[0].prompts) and a.counts == acted[0].counts for a in acted
    )
    whole = {}
    for name in ("tokens", "lengths", "mask", "logprobs", "finished"):
        parts = [getattr(a.samples, name) for a in acted]
        whole[name] = torch.stack(parts, 1).flatten(0, 1)
    whole |= {name: torch.stack([getattr(a, name) for a in acted], 1).flatten(0, 1) for name in ("said", "rows")}
    return whole, acted[0], Acting(respond, first, n, Ranks(1).rank(0))(iteration), score


@settings(max_examples=40)
@given(st.data(), st.sampled_from([2, 4]), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_any_number_of_ranks_ends_with_the_same_responses(data, n, tries, levels, iteration):
    groups = data.draw(st.sampled_from([4, 8]))
    penalty = data.draw(st.sampled_from([0.0, 0.5]))
    alone, acted, first, score = resampled(1, groups, n, tries, levels, iteration, penalty)
    for world in (2, 4):
        found = resampled(world, groups, n, tries, levels, iteration, penalty)[0]
        assert all(torch.equal(found[name], alone[name]) for name in alone)
    # by hand: what had contrast stays; what had none comes of the further prompts, in order, until the tries are used up
    samples, rows = first.samples, first.rows

    def flat(finished, said) -> list[bool]:
        paid = torch.where(finished, said, said - penalty).view(groups, n).tolist()
        return [len(set(group)) == 1 for group in paid]

    begin = flat(samples.finished, score(samples.tokens, samples.lengths, samples.mask, rows)[:, 0])
    for g in range(groups):
        mine = slice(g * n, g * n + n)
        if not begin[g]:
            width = samples.tokens.shape[1]
            assert (
                torch.equal(alone["tokens"][mine, :width], samples.tokens[mine])
                and not alone["tokens"][mine, width:].any()
            )
            assert torch.equal(alone["rows"][mine], rows[mine])
    prompts, again, now = first.prompts.clone(), 0, begin
    for t in range(tries):
        count = sum(now)
        if not count:
            break
        batch = Prompts(groups, 2).batch(iteration * tries + t)
        ids = (t + 1) * groups * n + torch.arange(count * n)
        of = torch.arange(count * n) // n
        new = respond(batch.prompts[of], batch.prompt_lengths[of], ids, iteration)
        still = flat_of(new, score(new.tokens, new.lengths, new.mask, batch.rows[of])[:, 0], n, penalty)
        places = [g for g in range(groups) if now[g]]
        for g, row, bad in zip(places, batch.rows[:count], still):
            prompts[g], now = row, [bad if k == g else x for k, x in enumerate(now)]
        again += count
    assert torch.equal(acted.prompts, prompts) and acted.counts == {"group/resampled": again}
    assert flat(alone["finished"], alone["said"][:, 0]) == now


def flat_of(samples, said, n: int, penalty: float) -> list[bool]:
    paid = torch.where(samples.finished, said, said - penalty).view(-1, n).tolist()
    return [len(set(group)) == 1 for group in paid]


@given(st.lists(st.integers(0, 2), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4]))
def test_the_share_of_groups_without_contrast(scores, n):
    slow = [len(set(scores[i : i + n])) == 1 for i in range(0, 12, n)]
    assert flat_groups(torch.tensor(scores), n).tolist() == slow
    found = group_metrics(torch.tensor(scores), n)
    assert found == ({} if n == 1 else {"group/flat": pytest.approx(sum(slow) / len(slow))})


def test_every_policy_loss_is_an_option():
    choices = train_ppo.Config.__annotations__["policy_loss"].__args__
    assert set(choices) == POLICY_LOSSES.keys() == CLIPPED.keys()


SCORED = """
def length(prompts, responses):
    return [float(len(response) > 9) for response in responses]

def flat(prompts, responses):
    return {"same": [0.5] * len(responses)}
"""
GROUPS = {"samples_per_prompt": 2, "estimator": "grpo", "sources": "", "prompt_tokens": 4}


def test_flat_groups_are_sampled_again(world, tmp_path):
    """Fewer are left than without; a run whose groups are all flat ends all the same, and says so in every line."""
    (tmp_path / "r.py").write_text(SCORED)
    rows = {}
    for again in ("false", "true"):
        out = tmp_path / again
        world.ok(
            "train_ppo.py", out=out, reward=f"{tmp_path / 'r.py'}:length", resample_flat=again, iterations=3, **GROUPS
        )
        rows[again] = lines(out / "metrics.jsonl")
    assert rows["false"][0]["group/flat"] > rows["true"][0]["group/flat"]  # the same first sampling
    assert "group/resampled" not in rows["false"][0]
    assert all(row["group/resampled"] >= 8 * row["group/flat"] for row in rows["true"])
    assert all(row["policy/ratio_first"] == 1 for row in rows["true"])
    world.ok("train_ppo.py", out=tmp_path / "flat", reward=f"{tmp_path / 'r.py'}:flat", resample_flat="true", **GROUPS)
    for row in lines(tmp_path / "flat" / "metrics.jsonl"):
        assert (row["group/flat"], row["group/resampled"], row["reward/same"]) == (1, 24, 0.5)
    done = world.run("train_ppo.py", out=tmp_path / "no", resample_flat="true")
    assert done.code == 2 and "set --samples_per_prompt to 2 or more" in done.err


@pytest.mark.parametrize("loss, clip", [("gspo", 3e-4), ("cispo", 0.2)])
def test_the_other_policy_losses_train(world, tmp_path, loss, clip):
    (tmp_path / "r.py").write_text(SCORED)
    options = {"policy_loss": loss, "clip": clip, "reward": f"{tmp_path / 'r.py'}:length", "iterations": 2} | GROUPS
    world.ok("train_ppo.py", out=tmp_path / "ppo", **options)
    row = lines(tmp_path / "ppo" / "metrics.jsonl")[-1]
    assert row["policy/ratio_first"] == pytest.approx(1, abs=1e-6) and row["policy/grad_norm"] > 0
    assert 0 < row["policy/clipfrac"] < 1 if loss == "gspo" else row["policy/clipfrac"] >= 0
    done = world.run("train_ppo.py", out=tmp_path / "other", **options | {"dual_clip": 3})
    assert done.code == 2 and f"no effect with --policy_loss={loss}" in done.err
