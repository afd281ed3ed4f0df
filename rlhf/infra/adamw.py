"""AdamW."""

import torch
from torch import nn


class AdamW:
    """AdamW (arXiv:1711.05101) by torch's fused kernel: all parameters in one pass, with the same bits each time.

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  w <- (1 - lr decay) w - lr m^ / (sqrt(v^) + eps), with
    m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t). A parameter without gradient is left out. torch.optim.AdamW calls the
    same kernel, and to be made imports torch's compiler, a second and 74 MB in every process. The moments are made at once:
    made in the first step they would lie where its activations were, so that those of the second fit nowhere there.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.param_groups = [{"lr": lr, "betas": betas, "eps": eps} | group for group in groups]
        self.state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        for p in self.parameters():
            moments = {
                name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")
            }
            self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)} | moments

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, divisor: torch.Tensor | None = None) -> None:
        """One step on the gradients there are; divisor (): they are divided by it in place, as they are read."""
        for group in self.param_groups:
            kinds: dict[tuple, list[nn.Parameter]] = {}  # the kernel takes one at a time
            for p in group["params"]:
                if p.grad is not None:
                    kinds.setdefault((p.device, p.dtype), []).append(p)
            for (device, _), params in kinds.items():
                grads, states = [p.grad for p in params], [self.state[p] for p in params]
                m, v, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
                torch._foreach_add_(steps, 1)
                torch._fused_adamw_(
                    params, grads, m, v, [], steps,
                    lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                    weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
                    grad_scale=None if divisor is None else divisor.to(device, torch.float32),
                )  # fmt: skip
                torch.autograd.graph.increment_version(params)  # the kernel does not say that they have changed

    def zero_grad(self) -> None:
        for p in self.parameters():
            p.grad = None
