"""What joins the transformer to tokens: which position predicts which token, and what that costs in nats."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.packed import text_states
from model.transformer import Transformer
from rlhf.functional import logprobs_and_entropy
from rlhf.losses import next_token_loss

LOGITS_AT_ONCE = 2**25  # numbers; 128 MiB in float32


def predictions(model: Transformer, hidden: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and ids (N,) of the N masked tokens, in row-major order.

    `hidden` (B, T-1, D) is the trunk's output for tokens[:, :-1]: column t-1 predicts token t. Only masked positions meet
    the vocabulary, so no (B, T, V) tensor ever exists.
    """
    states, ids = predicting(hidden, tokens, mask)
    return model.unembed(states), ids


def predicting(hidden: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """States (N, D) that the masked tokens are predicted from, and ids (N,). This is the one place where that shift happens."""
    if bool(mask[:, 0].any()):
        raise ValueError(
            "the first token of a row has nothing before it to be predicted from: mask[:, 0] must be False"
        )
    shifted = mask[:, 1:]
    return hidden[shifted], tokens[:, 1:][shifted]


def of_predictions(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    model: Transformer,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
) -> tuple[Tensor, ...]:
    """function (logits (n, V), ids (n,)) -> (n,) each, of all N masked tokens.

    A model that recomputes its blocks recomputes logits too, some rows at a time: with their gradient they may be the largest
    tensors of a step.
    """
    states, ids = predicting(hidden, tokens, mask)
    if not (model.recompute and torch.is_grad_enabled()):
        return function(model.unembed(states), ids)

    def of_rows(states: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return function(model.unembed(states), ids)

    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size if model.logits_in_parts else len(ids))
    parts = [
        checkpoint(of_rows, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(states.split(rows), ids.split(rows))
    ]
    return tuple(torch.cat(x) for x in zip(*parts))


def token_logprobs(
    model: Transformer, hidden: Tensor, tokens: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the masked tokens, each (B, T) and zero elsewhere; `hidden` as above."""
    function = partial(logprobs_and_entropy, temperature=temperature)
    logprobs, entropy = of_predictions(function, model, hidden, tokens, mask)
    return to_columns(logprobs, mask), to_columns(entropy, mask)


def token_losses(model: Transformer, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Next-token loss of the masked tokens, nats: (N,); `hidden` as above."""
    return of_predictions(lambda logits, ids: (next_token_loss(logits, ids),), model, hidden, tokens, mask)[0]


def to_columns(x: Tensor, mask: Tensor) -> Tensor:
    """Put the (N,) values of the masked tokens back to their places: (B, T), zero elsewhere."""
    return x.new_zeros(mask.shape).masked_scatter(mask, x)


class LanguageModel(nn.Module):
    """The transformer as pretraining sees it: forward gives the next-token loss of every masked token."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, lengths: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64, mask (B, T) bool -> negative log-likelihoods (N,) of the masked tokens, nats.

        With lengths (B,), all above 1, rows stand one after the other on a CPU, without padding; the result is the same.
        """
        inputs = tokens[:, :-1]
        hidden = self.model.trunk(inputs) if lengths is None else text_states(self.model, inputs, lengths - 1)
        return token_losses(self.model, hidden, tokens, mask)
