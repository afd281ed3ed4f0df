"""When a run ends before its last iteration: a held-out judge stops liking what it sees, or the policy is too far away."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf.infra import checkpoint
from rlhf.infra.distributed import Dist
from rlhf.infra.run import Run
from rlhf.overoptimisation import best_place, has_stalled
from rlhf.ppo.rollout import Sampler
from rlhf.reward.model import Score


class NoJudge:
    """Nobody is asked, and nobody ends the run."""

    verdicts: tuple[float, ...] = ()

    def stalled(self) -> str:
        return ""

    def ask(self, done: int, bound: "NoBound | KLBound") -> dict[str, float]:
        return {}


class HeldOutJudge:
    """Scores the policy every few iterations, always on the same prompts with the same random numbers.

    prompts (P, T), lengths (P,). rows (P,): which of the data's prompts they are, for a score that looks them up; modules:
    the score's weights, of which a rank may keep a part. `verdicts` are the mean scores so far; the policy with the best of
    them is kept in out/best.
    """

    def __init__(
        self,
        score: Score,
        modules: Sequence[nn.Module],
        sampler: Sampler,
        prompts: Tensor,
        lengths: Tensor,
        rows: Tensor,
        every: int,
        patience: int,
        at_once: int,
        dist: Dist,
    ):
        self.score, self.modules, self.sampler = score, modules, sampler
        self.prompts, self.lengths, self.rows = prompts, lengths, rows
        self.every, self.patience, self.at_once, self.dist = every, patience, at_once, dist
        self.verdicts: list[float] = []

    def stalled(self) -> str:
        """Why the run should end; empty while it may go on."""
        if not has_stalled(self.verdicts, self.patience):
            return ""
        return f"{self.patience} judgements in a row did not beat the held-out judge's best"

    def ask(self, done: int, bound: "NoBound | KLBound") -> dict[str, float]:
        """judge/mean of the policy after `done` iterations, when it is time."""
        if done % self.every:
            return {}
        self.sampler.refresh()
        scores = torch.zeros(len(self.prompts), dtype=torch.float64)
        with self.dist.whole(bound.run.module.model, *self.modules):
            for start in range(self.dist.rank, len(scores), self.at_once):
                rows = torch.arange(start, min(start + self.at_once, len(scores)), self.dist.world)
                g = self.sampler(
                    self.prompts[rows], self.lengths[rows], rows, -1
                )  # -1: numbers that no iteration draws
                scores[rows] = self.score(g.tokens, g.lengths, g.mask, self.rows[rows]).cpu().double()
        mean = float(self.dist.sum(scores).mean())  # each rank adds zeros to the others': exact for any world size
        self.verdicts.append(mean)
        if best_place(self.verdicts) == len(self.verdicts) - 1:
            bound.save_best({"done": done, "judge/mean": mean})
        return {"judge/mean": mean}


class NoBound:
    """No policy is too far away."""

    extra = 0

    def __init__(self, run: Run):
        self.run = run

    def passed(self, kl: float, iteration: int, state: dict) -> str:
        return ""

    def save(self, done: int, **state) -> None:
        self.run.save(done, **state)

    def save_best(self, record: dict) -> None:
        self.run.save_best(record)

    def stop(self, iteration: int, **state) -> None:
        """The checkpoint of a run that ends before its time."""
        self.run.save(iteration, **state)


class KLBound:
    """Ends the run at the first policy further than `max_kl` from the reference, and brings the one before back.

    How far it is: the mean KL of its responses and those of the `window - 1` policies before it, or of as many as there are.
    What a policy's KL is (nats per response) shows when it has acted. So its checkpoint is written then, `save` remembers
    what for; the last policy acts once more (`extra`); and the trained weights of the one before stay in memory. The
    optimiser is not rolled back. A resumed run starts from a policy that has passed.
    """

    def __init__(self, run: Run, max_kl: float, window: int):
        self.run, self.max_kl = run, max_kl
        self.extra = 1
        self.kls = deque[float](run.state.get("kls", []), maxlen=window)
        self.brake: dict | None = None  # what broke the bound, for report.json
        self.best: dict | None = None  # what the held-out judge says of the policy that has not acted yet
        self.unproven: tuple | None = None  # the save that waits: its arguments, is it scheduled, who waits for it
        self.kept: tuple[int, dict[str, Tensor], dict] | None = None  # the last that passed: iteration, weights, state

    def save(self, done: int, **state) -> None:
        self.unproven = (done, state | {"kls": list(self.kls)}, self.run.scheduled, self.run.wanted)
        self.run.wanted = 0  # a signal waits too

    def save_best(self, record: dict) -> None:
        self.best = record

    def passed(self, kl: float, iteration: int, state: dict) -> str:
        """Why the run ends after what the policy of `iteration` did; "" while it may go on. `state` is for a checkpoint."""
        state |= {"kls": list(self.kls)}
        self.kls.append(kl)
        kl = sum(self.kls) / len(self.kls)
        if kl <= self.max_kl:
            if self.best:  # before the checkpoint that counts it among the verdicts
                self.run.save_best(self.best)
                self.best = None
            if self.unproven:
                done, saved, self.run.scheduled, wanted = self.unproven
                self.run.save(done, **saved)
                self.run.wanted, self.unproven = wanted, None
                self.run.leave_if_wanted(done)
            weights = {name: x.detach() for name, x in checkpoint.trained_state(self.run.module).items()}
            if self.kept is None:
                weights = {name: x.clone() for name, x in weights.items()}
            else:  # into the copy that is there: two at once would be memory that --plan does not count
                weights = {name: kept.copy_(weights[name]) for name, kept in self.kept[1].items()}
            self.kept = (iteration, weights, state)
            return ""
        who = f"the last {n} policies are" if (n := len(self.kls)) > 1 else "the policy is"
        why = f"after {iteration} iterations {who} {kl:.4g} nats from the reference, above max_kl {self.max_kl}"
        self.brake = {"name": "max_kl", "limit": self.max_kl, "objective/kl": kl, "mean_of": n, "iteration": iteration}
        if self.kept is None:  # the first of a new run, or of one whose bound was lowered: there is no other
            self.kept = (iteration, checkpoint.trained_state(self.run.module), state)
        else:
            why += f"; the one after {self.kept[0]}, which kept it, is restored"
        return why

    def stop(self, iteration: int, **state) -> None:
        if self.brake:
            iteration, weights, kept = self.kept
            checkpoint.load_weights(self.run.module, weights, "memory")
            state |= kept | {"brake": self.brake | {"restored": iteration}}
        self.run.save(iteration, **state)
