"""Acting: the responses of an iteration, and groups that teach nothing sampled again (DAPO, arXiv:2503.14476, section 3.2)."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from model.generate import Generated
from rlhf.infra.distributed import Dist
from rlhf.infra.optim import Precision
from rlhf.ppo.rollout import Sampler, interleaved
from rlhf.reward.model import Score
from rlhf.rewards import missing_eos


@dataclass(frozen=True)
class Acted:
    """What the policy answered in an iteration: the rows of this rank, global row r on rank r mod world."""

    samples: Generated
    prompts: Tensor  # (G,) which of the data's each group of global rows answers
    rows: Tensor  # (B / world,) the same for this rank's rows
    width: int  # columns that the longest of all ranks may need
    said: Tensor | None = None  # (B / world, 1 + K) what the reward said of them, where it was asked already
    counts: dict[str, float] = field(default_factory=dict)  # metrics


@dataclass(frozen=True)
class Acting:
    """acting(iteration) -> Acted: `samples_per_prompt` responses to each prompt of the step, in neighbouring global rows.

    prompts: batch(step) and width(step), the same on every rank.
    """

    sampler: Sampler
    prompts: object
    samples_per_prompt: int
    dist: Dist

    def __call__(self, iteration: int) -> Acted:
        self.sampler.refresh()
        batch = self.prompts.batch(iteration)
        samples, rows = self.answers(batch, len(batch.rows), 0, iteration)
        return Acted(samples, batch.rows, rows, self.prompts.width(iteration))

    def answers(self, batch, groups: int, first_id: int, iteration: int) -> tuple[Generated, Tensor]:
        """This rank's share of the responses to the first `groups` prompts, and which of the data's they answer."""
        mine = torch.arange(self.dist.rank, groups * self.samples_per_prompt, self.dist.world)
        of = mine // self.samples_per_prompt
        return self.sampler(batch.prompts[of], batch.prompt_lengths[of], first_id + mine, iteration), batch.rows[of]


@dataclass(frozen=True)
class Resampling(Acting):
    """Groups whose responses all have one score are sampled again, of further prompts, at most `tries` times.

    Of the flat ones that are left after the last try nothing is learned but the KL. What is drawn depends on (seed,
    iteration, try) and the scores alone: `further` are the same prompts in another order, of which try t of an iteration
    takes batch iteration * tries + t. So it is the same for any number of ranks, and after a resume.
    """

    further: object
    score: Score  # (tokens, lengths, mask, rows) -> (B, 1 + K)
    tries: int
    eos_penalty: float
    micro_batch: int  # responses that are scored at once
    precision: Precision

    def __call__(self, iteration: int) -> Acted:
        first = super().__call__(iteration)
        width, n, world = first.width, self.samples_per_prompt, self.dist.world
        samples, said = self.everybody(first.samples, self.ask(first.samples, first.rows), width)
        prompts, again = first.prompts.clone(), 0
        for t in range(self.tries):
            flat = self.flat(samples, said)  # (G,), the same on every rank
            if not (count := int(flat.sum())):
                break
            again += count
            step = iteration * self.tries + t
            batch, divides = self.further.batch(step), count
            while divides * n % world:  # every rank samples as many; what is too much is left out
                divides += 1
            new, rows = self.answers(batch, divides, (t + 1) * len(prompts) * n, iteration)
            wider = max(width, self.further.width(step))
            new, new_said = self.everybody(new, self.ask(new, rows), wider)
            places, taken = flat.repeat_interleave(n), slice(0, count * n)
            wide = samples.map(partial(padded, width=wider))
            both = {name: exchange(x, places, getattr(new, name)[taken]) for name, x in wide.tensors().items()}
            samples = Generated(**both)
            said, width = exchange(said, places, new_said[taken]), wider
            prompts[flat.cpu()] = batch.rows[:count]
        mine = slice(self.dist.rank, None, world)
        samples = samples.map(lambda x: x[mine])
        rows = prompts.repeat_interleave(n)[mine]
        return Acted(samples, prompts, rows, width, said[mine], {"group/resampled": again})

    def flat(self, samples: Generated, said: Tensor) -> Tensor:
        return flat_groups(missing_eos(said[:, 0], samples.finished, self.eos_penalty), self.samples_per_prompt)

    @torch.no_grad()
    def ask(self, samples: Generated, rows: Tensor) -> Tensor:
        """What the reward says of this rank's samples, `micro_batch` at a time: (b, 1 + K)."""
        said = []
        for start in range(0, len(rows), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            longest = int(samples.lengths[part].max())
            tokens, mask = samples.tokens[part, :longest], samples.mask[part, :longest]
            with self.precision.autocast():
                said.append(self.score(tokens, samples.lengths[part], mask, rows[part]))
        return torch.cat(said)

    def everybody(self, samples: Generated, said: Tensor, width: int) -> tuple[Generated, Tensor]:
        """The samples of all ranks in global order, `width` columns wide, and what was said of them."""
        return samples.map(lambda x: interleaved(padded(x, width), self.dist)), interleaved(said, self.dist)


def padded(x: Tensor, width: int) -> Tensor:
    """(B, T) -> (B, width); (B,) as it is."""
    return F.pad(x, (0, width - x.shape[1])) if x.dim() > 1 else x


def exchange(old: Tensor, places: Tensor, new: Tensor) -> Tensor:
    """`old` with `new` in these places (B,) bool."""
    both = old.clone()
    both[places] = new
    return both


def flat_groups(scores: Tensor, samples_per_prompt: int) -> Tensor:
    """Which groups are without contrast, all their scores the same: (B,) -> (B / samples_per_prompt,) bool."""
    groups = scores.reshape(-1, samples_per_prompt)
    return (groups == groups[:, :1]).all(1)


def group_metrics(scores: Tensor, samples_per_prompt: int) -> dict[str, float]:
    """group/flat, the share of prompts without contrast; nothing where a prompt has one response."""
    if samples_per_prompt == 1:
        return {}
    return {"group/flat": float(flat_groups(scores, samples_per_prompt).cpu().double().mean())}
