"""When a run ends before its last iteration: a held-out judge stops liking what it sees, or the policy is too far away."""

from collections.abc import Callable

import torch
from torch import Tensor

from model.generate import Generated
from rlhf.infra.distributed import Dist
from rlhf.infra.run import Run
from rlhf.overoptimisation import best_place, has_stalled
from rlhf.reward.model import Score


class NoJudge:
    """Nobody is asked, and nobody ends the run."""

    verdicts: tuple[float, ...] = ()

    def stalled(self) -> str:
        return ""

    def ask(self, done: int, run: Run) -> dict[str, float]:
        return {}


class HeldOutJudge:
    """Scores the policy every few iterations, always on the same prompts with the same random numbers.

    act(prompts (P, T), lengths (P,), ids, iteration) -> Generated answers as the policy does now. rows (P,): which of the
    data's prompts they are, for a score that looks them up. `verdicts` are the mean scores so far; the policy with the
    best of them is kept in out/best.
    """

    def __init__(
        self,
        score: Score,
        act: Callable[..., Generated],
        prompts: Tensor,
        lengths: Tensor,
        rows: Tensor,
        every: int,
        patience: int,
        at_once: int,
        dist: Dist,
    ):
        self.score, self.act = score, act
        self.prompts, self.lengths, self.rows = prompts, lengths, rows
        self.every, self.patience, self.at_once, self.dist = every, patience, at_once, dist
        self.verdicts: list[float] = []

    def stalled(self) -> str:
        """Why the run should end; empty while it may go on."""
        if not has_stalled(self.verdicts, self.patience):
            return ""
        return f"{self.patience} judgements in a row did not beat the held-out judge's best"

    def ask(self, done: int, run: Run) -> dict[str, float]:
        """judge/mean of the policy after `done` iterations, when it is time."""
        if done % self.every:
            return {}
        scores = torch.zeros(len(self.prompts), dtype=torch.float64)
        for start in range(self.dist.rank, len(scores), self.at_once):
            rows = torch.arange(start, min(start + self.at_once, len(scores)), self.dist.world)
            g = self.act(self.prompts[rows], self.lengths[rows], rows, -1)  # -1: numbers that no iteration draws
            scores[rows] = self.score(g.tokens, g.lengths, g.mask, self.rows[rows]).double().cpu()
        mean = float(self.dist.sum(scores).mean())  # each rank adds zeros to the others': exact for any world size
        self.verdicts.append(mean)
        if best_place(self.verdicts) == len(self.verdicts) - 1:
            run.save_best({"done": done, "judge/mean": mean})
        return {"judge/mean": mean}


def too_far(kl: float, max_kl: float | None) -> str:
    """Why a policy at `kl` nats per response from the reference should not go on; empty if it may. None = no bound."""
    return f"KL to the reference passed max_kl {max_kl} nats" if max_kl is not None and kl > max_kl else ""
