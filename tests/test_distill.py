"""Leaving out whole layers: the distance of the paper, the right layers gone, and a student that comes closer."""

import copy
import json
import math

import pytest
import torch
from reference_model import FAMILIES, random_ids, small_model
from test_export import export, refused, where_the_runs_are  # noqa: F401

from evaluation import receipt
from model.generate import Sampling, generate
from rlhf.lm.distill import distill, distillation_loss, drop_layers, layer_distances
from rlhf.lm.pretrained import open_pretrained


def deep(family: str = "llama", layers: int = 4):
    return small_model(family, torch.float32, layers=layers)


def masks(lengths, T):
    t = torch.arange(T)
    return (t >= 1) & (t < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("count", [1, 2])
def test_the_distance_is_the_papers(count):
    model, tokens, lengths = deep(), random_ids(1, 3, 7), [7, 3, 5]
    entered = [[] for _ in range(5)]  # what hooks see: the hidden states before every layer, and after the last
    for layer, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda _, inputs, layer=layer: entered[layer].append(inputs[0]))
    model.layers[-1].register_forward_hook(lambda *inputs: entered[4].append(inputs[-1]))
    found = layer_distances(model, count, [(tokens, masks(lengths, 7))])
    with torch.no_grad():
        for states in entered:
            states.clear()
        model.trunk(tokens)
    for first in range(5 - count):
        angles = []
        for row, n in enumerate(lengths):
            for t in range(1, n):
                a, b = entered[first][0][row, t].double(), entered[first + count][0][row, t].double()
                angles.append(math.acos(float(a @ b / (a.norm() * b.norm()))) / math.pi)
        assert float(found[first]) == pytest.approx(sum(angles) / len(angles), abs=1e-5)
    assert len(found) == 5 - count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first, count", [(0, 1), (1, 2), (3, 1)])
@torch.no_grad()
def test_the_right_layers_are_gone(family, first, count):
    model, ids = deep(family), random_ids(2, 2, 6)
    smaller = drop_layers(model, first, count)
    span = model.span(ids)
    hidden = model.blocks(model.embed(ids, span), span, 0, first)
    hidden = model.norm(model.blocks(hidden, span, first + count))
    assert torch.equal(smaller.trunk(ids), hidden) and smaller.config.layers == 4 - count
    rows = generate(
        smaller, ids, torch.tensor([6, 4]), Sampling(4, [], 0, temperature=0.0)
    )  # its cache has its own layers
    assert torch.equal(smaller(rows.tokens[:1])[0, 5:-1].argmax(-1), rows.tokens[0, 6:])


@pytest.mark.parametrize("first, count", [(0, 4), (2, 3), (-1, 1), (0, 0)])
def test_one_layer_must_stay(first, count):
    with pytest.raises(ValueError, match="cannot be left out"):
        drop_layers(deep(), first, count)


def test_a_layer_that_does_nothing_is_chosen():
    model = deep()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.layers[2].get_submodule(name).weight.zero_()
    distances = layer_distances(model, 1, [(random_ids(1, 4, 9), masks([9, 9, 4, 6], 9))])
    assert int(distances.argmin()) == 2 and float(distances[2]) < 1e-3
    with torch.no_grad():
        assert torch.equal(drop_layers(model, 2, 1)(random_ids(3, 2, 5)), model(random_ids(3, 2, 5)))


def test_the_loss_is_a_divergence():
    p, q = (small_model("llama", torch.float64, seed)(random_ids(1, 2, 5)).flatten(0, 1) for seed in (1, 2))
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (p, q)))
    assert torch.allclose(distillation_loss(q, p), expected) and torch.allclose(
        distillation_loss(p, p), torch.zeros(10).double()
    )


def test_the_student_comes_closer_and_the_teacher_stays():
    teacher = deep()
    teacher.requires_grad_(False)
    student, before = drop_layers(teacher, 1, 1), copy.deepcopy(teacher.state_dict())

    def batch(step):
        return random_ids(step, 8, 9), masks([9] * 8, 9)

    held_out = [(random_ids(1000, 16, 9), masks([9] * 16, 9))]
    at_first = receipt.compare(teacher, student, held_out)["kl"]
    losses = distill(student, teacher, batch, steps=30, lr=0.01)
    assert len(losses) == 30 and losses[0] == pytest.approx(at_first, rel=0.5)
    assert receipt.compare(teacher, student, held_out)["kl"] < 0.7 * at_first
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    again = [distill(drop_layers(teacher, 1, 1), teacher, batch, steps=3, lr=0.01) for _ in range(2)]
    assert again[0] == again[1]  # nothing random


def test_an_export_without_a_layer(world):
    printed = export(
        world, init="lm", out="pruned", drop_layers=1, distill_steps=4, distill_batch=8, data="data", texts=8, max_kl=9
    )
    before, after = open_pretrained(world.path / "lm").model, open_pretrained(world.path / "pruned").model
    measured = json.loads((world.path / "pruned" / "receipt.json").read_text())
    assert after.config.layers == before.config.layers - 1 and "which turn the hidden states least" in printed
    assert measured["kl"] > 0 and len(measured["dropped"]["losses"]) == 4 and len(measured["dropped"]["distances"]) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(drop_layers=1), "--data="),
        (dict(drop_layers=2, data="data"), "leaves none of the model's 2 layers"),
        (dict(distill_steps=3, data="data"), "--distill_steps has no effect"),
        (dict(drop_layers=1, distill_steps=0, data="data", texts=4), "more than --max_kl=0.02"),
    ],
)
def test_one_clear_line(world, options, message):
    assert message in refused(world, init="lm", out="refused-pruned", **options)
    assert not (world.path / "refused-pruned").exists()
