"""Where a response ends and which token carries its score, against TRL, verl, torchtune and transformers.

The frameworks find ends by looking for ids; here lengths are kept from the moment of sampling, so that the same number
may be padding in one place and text in another.
"""

import pytest
import torch
from golden import load

from model.generate import Sampling, generate
from model.transformer import ModelConfig, Transformer
from rlhf.reward.model import last_token


class Scripted(Transformer):
    """A model that says one fixed text, whatever it is asked."""

    def __init__(self, text):
        super().__init__(ModelConfig(vocab_size=16, width=16, layers=1, heads=2, context=16))
        self.text = iter(text)

    def unembed(self, hidden):
        return torch.nn.functional.one_hot(torch.tensor([next(self.text)]), 16).float()


def sampled(responses, eos, pad):
    """What `generate` makes of a policy that would say these responses: tokens, mask (B, T), finished (B,)."""
    prompt, length = torch.tensor([[2]]), torch.tensor([1])
    rows = [
        generate(Scripted(r), prompt, length, Sampling(len(r), [eos], pad, temperature=0)) for r in responses.tolist()
    ]
    width = responses.shape[1]
    tokens = [
        torch.nn.functional.pad(row.tokens[0, 1:], (0, width + 1 - row.tokens.shape[1]), value=pad) for row in rows
    ]
    masks = [torch.nn.functional.pad(row.mask[0, 1:], (0, width + 1 - row.mask.shape[1])) for row in rows]
    return torch.stack(tokens), torch.stack(masks), torch.cat([row.finished for row in rows])


def test_trl_0_11_truncate_response(golden_dir):
    g = load(golden_dir, "trl0114_truncate_response")
    tokens, mask, finished = sampled(g.inputs["responses"], g.inputs["stop_token_id"], g.inputs["pad_token_id"])
    assert torch.equal(tokens, g.outputs["truncated"])
    assert torch.equal(mask.sum(1), g.outputs["first_pad"])
    assert torch.equal(mask.sum(1) - 1, g.outputs["sequence_length(index of last real token)"])
    assert torch.equal(finished, g.outputs["contains_eos"])


def test_verl_and_torchtune_response_masks(golden_dir):
    g = load(golden_dir, "token_processing__verl_torchtune")
    responses = g.inputs["responses"]
    tokens, mask, finished = sampled(responses, g.inputs["eos"], g.inputs["pad"])
    assert torch.equal(mask, g.outputs["verl get_response_mask(eos=1)"].bool())
    assert torch.equal(mask, ~g.outputs["torchtune padding_mask"])
    assert torch.equal(tokens, g.outputs["torchtune truncated"])
    assert torch.equal(mask.sum(1) - 1, g.outputs["torchtune seq_lens(index of last)"])
    # torchtune takes "no padding" for "no EOS" and punishes the row whose EOS is its last possible token
    full = mask.all(1)
    assert torch.equal(~finished | full, g.outputs["torchtune get_reward_penalty_mask(no_eos)"])
    short = mask.sum(1) - 1 < 2
    assert torch.equal(~finished | full | short, g.outputs["torchtune get_reward_penalty_mask(no_eos,min_len=2)"])
    assert (finished & full).sum() == 1


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_hf_pooling_position(golden_dir, family):
    """transformers scores the rightmost token that is not the pad id; ours is at the row's length, whatever is there."""
    g = load(golden_dir, "hf_seqcls_pooling_index")
    ids = g.inputs["input_ids"]
    positions = torch.arange(ids.shape[1])
    hidden = positions.expand_as(ids)[..., None].float()  # the state at position t says t
    for pad, name in ((0, "pad=0,eos=1 (separate)"), (1, "pad=eos=1")):
        theirs = g.outputs[f"{family}ForSequenceClassification, {name}"]
        rightmost = torch.where(ids != pad, positions, 0).amax(1)
        assert torch.equal(last_token(hidden, rightmost + 1)[:, 0].long(), theirs)
    lengths = torch.tensor([4, 6, 6, 6, 5, 3])  # row 5: 5 6 EOS, then EOS as padding
    ours = last_token(hidden, lengths)[:, 0].long()
    separate = g.outputs[f"{family}ForSequenceClassification, pad=0,eos=1 (separate)"]
    shared = g.outputs[f"{family}ForSequenceClassification, pad=eos=1"]
    assert ours[0] == separate[0] and ours[5] == 2 and shared[5] == 1  # with pad = eos it never sees the EOS
    assert ours[4] == 4 and separate[4] == 2  # row 4 is 5 0 6 0 0: an id that equals pad is text if the length says so
