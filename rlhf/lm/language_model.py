"""What joins the transformer to tokens: which position predicts which token, and what that costs in nats."""

from torch import Tensor, nn

from model.packed import text_states
from model.transformer import Transformer
from rlhf.functional import logprobs_and_entropy
from rlhf.losses import next_token_loss


def predictions(model: Transformer, hidden: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and ids (N,) of the N masked tokens, in row-major order.

    `hidden` (B, T-1, D) is the trunk's output for tokens[:, :-1]: column t-1 predicts token t. This is the one place
    where that shift happens. Only masked positions meet the vocabulary, so no (B, T, V) tensor ever exists.
    """
    if bool(mask[:, 0].any()):
        raise ValueError(
            "the first token of a row has nothing before it to be predicted from: mask[:, 0] must be False"
        )
    shifted = mask[:, 1:]
    return model.unembed(hidden[shifted]), tokens[:, 1:][shifted]


def token_logprobs(
    model: Transformer, hidden: Tensor, tokens: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the masked tokens, each (B, T) and zero elsewhere; `hidden` as above."""
    logits, targets = predictions(model, hidden, tokens, mask)
    logprobs, entropy = logprobs_and_entropy(logits, targets, temperature)
    return to_columns(logprobs, mask), to_columns(entropy, mask)


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
        return next_token_loss(*predictions(self.model, hidden, tokens, mask))
