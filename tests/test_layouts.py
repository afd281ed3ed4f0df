"""The four layouts of the roles: the same walls, who learns and who never moves, and what a checkpoint gives back.

Several ranks: tests/test_shard.py.
"""

import copy
import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import random_ids, small_model
from small_rollout import EOS, PAD, RESPONSE, TEMPERATURE, WIDTH, prompts, reward_model

from model.generate import Sampling, generate, row_uniforms
from model.packed import pack
from rlhf.functional import whiten
from rlhf.infra import checkpoint, distributed, optim
from rlhf.lm.trunks import LoRA, policy_adapter, tuned_model
from rlhf.ppo import update as ppo
from rlhf.ppo.roles import CRITICS, LAYOUTS, Roles
from rlhf.ppo.rollout import Experience, Rollout, gather, judge, minibatches, share
from rlhf.rewards import shape_rewards

pytestmark = pytest.mark.bits

ROWS, LAYERS, TOP = 16, 3, 2
ALONE, EVERYBODY = distributed.Dist(), torch.arange(ROWS)
SETTINGS = LoRA(rank=3, alpha=6.0, seed=5)
CASES = [("full", "separate")] + [(x, c) for x in ("shared", "adapters", "branch") for c in ("shared", "separate")]
OBJECTIVE = ppo.Objective(clip=0.1, value_clip=0.1, value_coef=0.4, entropy_coef=0.02)
every_case = pytest.mark.parametrize("layout, critic", CASES)
frozen_trunk = pytest.mark.parametrize("layout", ["adapters", "branch"])


def base_model(family="llama", dtype=torch.float64, **changes):
    return small_model(family, dtype, seed=1, layers=LAYERS, **changes)


def build(layout, critic=None, base=None, branch_layers=TOP, **kwargs) -> Roles:
    base = base_model(**kwargs) if base is None else base
    return LAYOUTS[layout](base, critic or CRITICS[layout], TEMPERATURE, SETTINGS, branch_layers)


def act(roles: Roles, mine=EVERYBODY, iteration=0):
    ids, lengths = (x[mine] for x in prompts(ROWS, iteration))
    uniforms = row_uniforms(1, iteration, mine.tolist(), RESPONSE)
    how = Sampling(RESPONSE, [EOS], PAD, TEMPERATURE)
    return generate(roles.sampler(), ids, lengths, how, uniforms, depths=roles.seen())


def act_and_judge(roles: Roles, dist=ALONE, iteration=0, micro_batch=4) -> Rollout:
    """This rank's rows."""
    samples = act(roles, torch.arange(dist.rank, ROWS, dist.world), iteration)
    score = reward_model(roles.policy.model.norm.weight.dtype).score
    return judge(samples, roles.policy, roles.reference, score, micro_batch, WIDTH, roles.features)


def experience_of(rollout: Rollout) -> Experience:
    rewards = shape_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, 0.1)
    return Experience.of(rollout, rewards, whiten(rewards, rollout.mask), rewards.flip(1).cumsum(1).flip(1))


def train(roles: Roles, dist=ALONE, iterations=2, micro_batch=4) -> list[dict]:
    """Two iterations of two epochs of two minibatches."""
    learner, precision, updates = dist.wrap(roles.policy), optim.amp(dist.device), []
    optimizer = optim.make_optimizer(roles.policy, lr=1e-2, eps=1e-5)
    for iteration in range(iterations):
        judged = act_and_judge(roles, dist, iteration, micro_batch)
        experience = experience_of(gather(judged, dist))
        for rows in minibatches(ROWS, 2, 2, 1, iteration):
            minibatch = share(experience, judged.features, rows, dist)
            updates.append(ppo.accumulate_gradient(learner, minibatch, OBJECTIVE, micro_batch, dist, precision))
            optim.step(optimizer, roles.policy, precision.scaler, clip=0.5)
    return updates


# ---- one pass for two


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@given(lengths=st.lists(st.integers(3, WIDTH), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_two_adapters_on_one_trunk_take_one_pass(family, lengths, seed):
    """Log-probs, entropies, values and every gradient are those of a pass for each."""
    policy = build("adapters", "separate", family=family).policy
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in policy.parameters():
            if x.requires_grad:
                x.normal_(std=0.3, generator=generator)
    tokens, t = random_ids(seed, len(lengths), WIDTH), torch.arange(WIDTH)
    mask = (t >= 2) & (t < torch.tensor(lengths)[:, None])
    passes = []
    for policy.on_one_trunk in (True, False):
        policy.zero_grad()
        output = policy(tokens, mask)
        (output.logprobs.square().sum() + output.entropy.sum() + output.values.square().sum()).backward()
        gradients = {name: x.grad for name, x in policy.named_parameters() if x.requires_grad}
        passes.append([output.logprobs, output.entropy, output.values, gradients])
    torch.testing.assert_close(*passes, rtol=1e-9, atol=1e-11)


# ---- the start


@every_case
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_the_policy_starts_as_its_reference(layout, critic, family):
    """Bit for bit where the same kernels run; the adapters' reference is one column longer."""
    for dtype in (torch.float64, torch.float32):
        rollout = act_and_judge(build(layout, critic, family=family, dtype=dtype))
        tolerance = 0 if layout != "adapters" else 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, rtol=0, atol=tolerance)
        assert (rollout.values == 0).all() and rollout.mask.any()


@every_case
def test_the_first_ratio_is_exactly_one(layout, critic):
    roles = build(layout, critic, dtype=torch.float32)
    experience = experience_of(act_and_judge(roles))
    args = (ppo.Objective(), 4, ALONE, optim.amp(torch.device("cpu")))
    update = ppo.accumulate_gradient(roles.policy, experience[:8], *args)
    assert update["policy/ratio"] == 1 and update["policy/approxkl"] == 0
    for batch in experience.split(4):
        assert torch.equal(roles.policy(batch.tokens, batch.mask, batch.features).logprobs, batch.logprobs)


@every_case
def test_layouts_start_alike(layout, critic):
    """What is sampled and what is said of it does not depend on who shares whose memory."""
    ours, theirs = act_and_judge(build(layout, critic)), act_and_judge(build("full"))
    assert torch.equal(ours.tokens, theirs.tokens)
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "scores", "sampler_logprobs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-10, msg=name)


def test_only_branches_have_features():
    for layout, critic in CASES:
        rollout = act_and_judge(build(layout, critic))
        assert rollout.features.shape == (ROWS, WIDTH, 24 if layout == "branch" else 0)


def test_a_branch_of_all_layers_starts_from_what_the_sampler_embedded():
    roles = build("branch", branch_layers=LAYERS)
    samples = act(roles)
    assert samples.states.keys() == {0} and roles.policy.depth == 0
    real = torch.arange(samples.tokens.shape[1]) < samples.lengths[:, None]
    assert torch.equal(samples.states[0][real], roles.policy.model.embed_tokens(samples.tokens[real]))


@given(read=st.sets(st.integers(0, LAYERS), max_size=3), critic=st.sampled_from(["shared", "separate"]))
@settings(max_examples=10, deadline=None)
def test_states_that_the_sampler_saw_are_not_computed_again(read, critic):
    """Judged by them, and by a pass of the frozen trunk: the same numbers, also for who reads deeper than it is frozen."""
    roles = build("branch", critic)
    train(roles, iterations=1)
    said, frozen = {depth: torch.linspace(-1, 1, 24, dtype=torch.float64) for depth in read}, roles.frozen.read(read)

    def score(tokens, lengths, mask):
        states = frozen(tokens)
        return sum((torch.where(mask[..., None], states[d], 0) * x).sum((1, 2)) for d, x in said.items()) + lengths

    samples, passed, how = act(roles), [], (score, 4, WIDTH, roles.features)
    assert samples.states.keys() == {LAYERS - TOP} | {depth for depth in read if depth <= LAYERS - TOP}
    hooks = [
        layer.register_forward_pre_hook(lambda *_, i=i: passed.append(i)) for i, layer in enumerate(frozen.model.layers)
    ]
    kept = judge(samples, roles.policy, roles.reference, *how)
    assert min(passed) == LAYERS - TOP  # the reference's layers, and no other
    again = judge(replace(samples, states={}), roles.policy, roles.reference, *how)
    assert min(passed) == 0
    for hook in hooks:
        hook.remove()
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "scores"):
        torch.testing.assert_close(getattr(kept, name), getattr(again, name), rtol=0, atol=1e-9, msg=name)


# ---- learning


@every_case
def test_values_on_a_base(layout, critic):
    """The head learns what the base lacks: the loss and its gradients are those of the returns less the base."""
    roles = build(layout, critic)
    train(roles)
    score = reward_model(torch.float64)
    asked = (act(roles), roles.policy, roles.reference, score.score, 4, WIDTH, roles.features)
    plain, found = judge(*asked), []
    on_base = judge(*asked, value_base=torch.no_grad()(score.prefix_scores))
    base = on_base.base_values
    assert (base != 0).any(0).sum() > RESPONSE and (plain.base_values == 0).all()
    whole = score.prefix_scores(on_base.tokens, on_base.lengths, on_base.mask)  # other rows together: other last bits
    torch.testing.assert_close(base, whole, rtol=0, atol=1e-12)
    returns = torch.where(plain.mask, plain.logprobs + plain.sampler_logprobs, 0)
    for rollout, targets in ((plain, returns), (on_base, returns + base)):
        torch.testing.assert_close(rollout.values, plain.values + rollout.base_values)
        roles.policy.zero_grad()
        moved = replace(rollout, values=rollout.values + 0.3 * rollout.mask)  # so that some values are clipped
        batch = Experience.of(moved, returns, returns, targets)
        loss, sums = ppo.ppo_loss(roles.policy(batch.tokens, batch.mask, batch.features), batch, OBJECTIVE)
        loss.backward()
        grads = [x.grad for x in roles.policy.parameters() if x.requires_grad]
        found.append([loss, *sums.values(), *(x.clone() for x in grads)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every_case
def test_training_moves_the_policy_and_nobody_else(layout, critic):
    base = base_model()
    before = copy.deepcopy(base.state_dict())
    roles = build(layout, critic, base)
    rollout = act_and_judge(roles)
    start = {name: x.clone() for name, x in roles.policy.named_parameters()}
    train(roles)
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())
    moved = {name for name, x in roles.policy.named_parameters() if not torch.equal(x, start[name])}
    trained = {name for name, x in roles.policy.named_parameters() if x.requires_grad}
    assert moved == trained and any(name.startswith("model.") for name in moved)
    again = roles.reference(rollout.tokens, rollout.mask, rollout.features)
    torch.testing.assert_close(again, rollout.ref_logprobs, rtol=0, atol=1e-12)
    now = roles.policy(rollout.tokens, rollout.mask, rollout.features).logprobs
    assert float((now - rollout.logprobs).abs().max()) > 1e-3
    assert float((roles.policy(rollout.tokens, rollout.mask).values).abs().max()) > 1e-3


@every_case
def test_what_is_frozen_is_the_bases_own_memory(layout, critic):
    base = base_model()
    theirs = {x.data_ptr() for x in base.parameters()}
    policy = build(layout, critic, base).policy
    assert {x.data_ptr() for x in policy.parameters() if not x.requires_grad} <= theirs
    assert not {x.data_ptr() for x in policy.parameters() if x.requires_grad} & theirs
    assert sum(not x.requires_grad for x in policy.parameters()) > 0 or layout in ("full", "shared")
    names = {name for name, x in policy.named_parameters() if x.requires_grad}
    inner = {name for name in names if not name.startswith("value_head.")}
    if layout == "adapters":
        assert all(".lora_" in name for name in inner)
    if layout == "branch":
        assert all(name.split(".")[1:3] in (["layers", "1"], ["layers", "2"]) or ".norm." in name for name in inner)
    assert (critic == "separate") == any(name.startswith("value_trunk.") for name in inner)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("top", [1, 2, LAYERS])
def test_features_change_nothing(critic, family, top):
    """From the kept states or from the tokens: the same log-probs, values and gradients."""
    roles = build("branch", critic, base_model(family), branch_layers=top)
    train(roles)
    rollout = act_and_judge(roles)
    found = []
    for features in (rollout.features, rollout.features[..., :0], None):
        roles.policy.zero_grad()
        output = roles.policy(rollout.tokens, rollout.mask, features)
        (output.logprobs.sum() + output.values.square().sum() + output.entropy.sum()).backward()
        grads = [x.grad.clone() for x in roles.policy.parameters() if x.requires_grad]
        reference = roles.reference(rollout.tokens, rollout.mask, features)
        found.append([*vars(output).values(), reference, *grads])
    for ours, theirs in zip(found[0], found[2]):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2]))


@every_case
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_rows_without_padding_change_nothing(monkeypatch, layout, critic, family):
    """Of unlike lengths, and answers to one prompt that is long enough to be read once: log-probs, values and gradients."""
    roles = build(layout, critic, family=family)
    train(roles)
    lengths = torch.tensor([25, 22, 30, 19, 4, 9])
    tokens = torch.where(torch.arange(30) < lengths[:, None], random_ids(2, 6, 30), PAD)
    tokens[1:4:2, :18] = tokens[0:4:2, :18]
    mask = (torch.arange(30) >= torch.tensor([18, 18, 18, 18, 2, 2])[:, None]) & (torch.arange(30) < lengths[:, None])
    found, packed = [], []
    for most_left in (0, 0.8):
        monkeypatch.setattr("model.packed.MOST_LEFT", most_left)
        monkeypatch.setattr("model.packed.pack", lambda *args: packed.append(1) or pack(*args))
        roles.policy.zero_grad()
        with torch.no_grad():
            features = roles.features(tokens, lengths if most_left else None)
        output = roles.policy(tokens, mask, features)
        (output.logprobs.sum() + output.values.square().sum() + output.entropy.sum()).backward()
        grads = [x.grad.clone() for x in roles.policy.parameters() if x.requires_grad]
        found.append([*vars(output).values(), roles.reference(tokens, mask, features), *grads])
        assert bool(packed) == bool(most_left)
    for padded, apart in zip(*found):
        torch.testing.assert_close(apart, padded, rtol=1e-10, atol=1e-10)


def test_learning_costs_the_top_layers_alone(monkeypatch):
    """The frozen layers read every token once, whatever the number of epochs: as it is sampled, or when servers did."""
    roles = build("branch")
    calls, forward = [], type(roles.sampler().layers[0]).forward
    samples = replace(act(roles), states={})
    monkeypatch.setattr(
        type(roles.sampler().layers[0]),
        "forward",
        lambda self, *args: calls.append(self.self_attn.layer) or forward(self, *args),
    )
    score = lambda tokens, lengths, mask: lengths.double()  # noqa: E731
    rollout = judge(samples, roles.policy, roles.reference, score, 4, WIDTH, roles.features)
    assert calls.count(0) == 4 and calls.count(1) == calls.count(2) == 8  # policy and reference, 4 micro-batches
    calls.clear()
    args = (OBJECTIVE, 4, ALONE, optim.amp(torch.device("cpu")))
    ppo.accumulate_gradient(roles.policy, experience_of(rollout), *args)
    assert set(calls) == {1, 2}


@every_case
def test_micro_batches_change_no_gradient(layout, critic):
    roles = build(layout, critic)
    train(roles)
    experience = experience_of(act_and_judge(roles))
    found = []
    for micro_batch in (16, 4, 1):
        roles.policy.zero_grad()
        args = (OBJECTIVE, micro_batch, ALONE, optim.amp(torch.device("cpu")))
        ppo.accumulate_gradient(roles.policy, experience, *args)
        found.append({n: x.grad.clone() for n, x in roles.policy.named_parameters() if x.requires_grad})
    for other in found[1:]:
        for name, x in found[0].items():
            torch.testing.assert_close(other[name], x, rtol=1e-8, atol=1e-12, msg=name)


# ---- checkpoints


def stored(layout, critic, base, tmp_path):
    """A trained policy and the open checkpoint of it."""
    roles = build(layout, critic, base)
    train(roles)
    config = {"kind": "policy", "layout": layout, "model": asdict(base.config), "lora_rank": 3, "lora_alpha": 6.0}
    path = checkpoint.save(tmp_path / "policy", checkpoint.trained_state(roles.policy), config | {"branch_layers": TOP})
    return roles, checkpoint.load(path)


@frozen_trunk
@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_checkpoint_gives_back_the_tuned_model(layout, critic, family, tmp_path):
    base = base_model(family)
    roles, saved = stored(layout, critic, base, tmp_path)
    fresh = base_model(family)
    before = copy.deepcopy(fresh.state_dict())
    tuned = tuned_model(fresh, saved.config, saved.tensors)
    ids = random_ids(3, 2, 9)
    torch.testing.assert_close(tuned(ids), roles.policy.model(ids), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(tuned(ids), base(ids))
    assert tuned.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in fresh.state_dict().items())
    assert tuned.embed_tokens.weight is fresh.embed_tokens.weight  # one copy in memory
    assert not any(x.requires_grad for x in tuned.parameters())
    stored_names = {name for name in saved.tensors if name.startswith("model.")}
    assert not any(
        name.startswith(("model.embed", "model.lm_head", "model.layers.0.mlp.up_proj.w")) for name in stored_names
    )


def test_the_policys_adapter_by_its_plain_names(tmp_path):
    _, saved = stored("adapters", "separate", base_model(), tmp_path)
    names = policy_adapter(saved.tensors).keys()
    assert len(names) == LAYERS * 7 * 2 and "layers.0.self_attn.q_proj.lora_A" in names


def test_what_does_not_fit_is_refused(tmp_path):
    _, saved = stored("branch", "shared", base_model(), tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        tuned_model(base_model(), saved.config | {"branch_layers": 1}, saved.tensors)
    with pytest.raises(ValueError, match="does not fit"):
        tuned_model(base_model(), saved.config | {"branch_layers": 3}, saved.tensors)
    with pytest.raises(ValueError, match="layout shared"):
        tuned_model(base_model(), saved.config | {"layout": "shared"}, saved.tensors)
    for layers in (0, LAYERS + 1):
        with pytest.raises(ValueError, match="branch_layers"):
            build("branch", branch_layers=layers)


# ---- the script


OPTIONS = {"full": {}, "shared": {}, "adapters": {"lora_rank": 4, "lora_alpha": 8}, "branch": {"branch_layers": 1}}


@pytest.mark.parametrize("layout", OPTIONS)
def test_resume_is_bit_exact(world, tmp_path, layout):
    """A checkpoint in the middle, taken for the last one: the second half is made again, the same to the bit."""
    options = OPTIONS[layout] | {"layout": layout, "iterations": 4, "checkpoint_every": 2, "minibatches": 2}
    options |= {"critic": "separate"} if layout == "adapters" else {}
    world.ok("train_ppo.py", out=tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half/step_000004")
    world.ok("train_ppo.py", out=tmp_path / "half", **options)
    whole, half = (checkpoint.load(tmp_path / name) for name in ("whole", "half"))
    assert whole.path.name == half.path.name == "step_000004"
    for ours, theirs in ((half.tensors, whole.tensors), (half.optimizer, whole.optimizer)):
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert whole.config["layout"] == layout
    assert ("base" in whole.config) == (layout in ("adapters", "branch"))
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert all(row["policy/ratio_first"] == 1 for row in rows)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "full", "critic": "shared"}, "--layout=full has a critic of its own"),
        ({"branch_layers": 2}, "--branch_layers has no effect with --layout=shared"),
        ({"layout": "branch", "lora_rank": 2}, "--lora_rank has no effect with --layout=branch"),
        ({"layout": "branch", "branch_layers": 9}, "branch_layers 9 is not between 1 and the model's 2 layers"),
        ({"layout": "adapters", "lora_targets": "q_prj"}, "no linear layer is called q_prj"),
    ],
    ids=str,
)
def test_one_clear_line(world, tmp_path, options, message):
    done = world.run("train_ppo.py", out=tmp_path / "run", **options)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
