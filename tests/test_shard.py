"""--shard=true: ranks that keep a part of the weights train what one process trains, in every layout.

The file is its own worker: `test_shard.py DIR WAY` trains every layout on every rank.
"""

import functools
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference_model import SMALL, random_ids, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_rollout import EOS, PAD, RESPONSE, TEMPERATURE, WIDTH, prompts, reward_model
from test_layouts import CASES, LAYERS, OBJECTIVE, ROWS, SETTINGS, TOP, build, experience_of
from test_resume import killed_in_the_middle, numbers
from tiny import World

from model import transformer
from model.generate import Sampling, generate, row_uniforms
from model.transformer import Transformer, recompute_blocks
from rlhf.infra import checkpoint, config, distributed, optim
from rlhf.lm import language_model
from rlhf.lm.frozen import FrozenStates
from rlhf.ppo import update as ppo
from rlhf.ppo.early_stop import HeldOutJudge, NoBound
from rlhf.ppo.roles import LAYOUTS, ActorCritic
from rlhf.ppo.rollout import gather, judge, minibatches, share
from rlhf.reward.model import FrozenReward

FAMILIES = ("llama", "qwen2")  # an output matrix of its own, and a tied one
WAYS = {
    "few": {"shard": True},
    "ddp": {},
    "fsdp": {"shard": True},
    "four": {"shard": True},
    "hsdp": {"shard": True, "replicas": 2},
}


def train(layout: str, critic: str, family: str, dist: distributed.Dist, micro_batch: int = 2) -> dict:
    """Two iterations of act, judge and learn, with accumulation and clipping; what came of it."""
    base = small_model(family, torch.float64, seed=1, layers=LAYERS)
    roles = LAYOUTS[layout](base, critic, TEMPERATURE, SETTINGS, TOP, dist.copied)
    reward = reward_model(torch.float64).requires_grad_(False)
    policy, precision = roles.policy, optim.amp(dist.device)
    recompute_blocks(policy, dist.mesh is not None and layout in ("adapters", "full"))  # which changes no bit
    learner = dist.wrap(policy)
    dist.rest(base, reward)
    optimizer = optim.make_optimizer(policy, lr=1e-2, eps=1e-5)
    mine, seen = torch.arange(dist.rank, ROWS, dist.world), []
    kept = {id(x): x for module in (base, policy, reward) for x in module.parameters()}.values()
    numbers = sum(kept_here(x) for x in kept)
    for iteration in range(2):
        ids, lengths = (x[mine] for x in prompts(ROWS, iteration))
        uniforms = row_uniforms(1, iteration, mine.tolist(), RESPONSE)
        with dist.whole(policy.model):
            samples = generate(policy.model, ids, lengths, Sampling(RESPONSE, [EOS], PAD, TEMPERATURE), uniforms)
        judged = judge(samples, policy, roles.reference, reward.score, micro_batch, WIDTH, roles.features)
        rollout = gather(judged, dist)
        experience = experience_of(rollout)
        for rows in minibatches(ROWS, 2, 2, 1, iteration):
            part = share(experience, judged.features, rows, dist)
            update = ppo.accumulate_gradient(learner, part, OBJECTIVE, micro_batch, dist, precision)
            gradients = {n: x.grad for n, x in policy.named_parameters() if x.grad is not None}
            if not seen:
                first = checkpoint.gathered({n: x.clone() for n, x in gradients.items()}, True)
            norm = optim.step(optimizer, policy, precision.scaler, clip=0.05)
            seen.append({**update, "norm": norm, "ids": (rollout.tokens * rollout.mask).sum().item()})
    state, moments = checkpoint.trained_state(policy), checkpoint.optimizer_tensors(optimizer, policy)
    return {"seen": seen, "gradients": first, "state": state, "moments": moments, "numbers": numbers}


def cases(way: str) -> list[tuple[str, str, str]]:
    """Family, layout and critic: every layout once; or, where there is time, every case in one of the families."""
    few = [("llama", "full", "separate"), ("qwen2", "shared", "shared"), ("qwen2", "adapters", "separate")]
    few += [("llama", "branch", "shared")]
    one, other = ([(FAMILIES[(i + first) % 2], *case) for i, case in enumerate(CASES)] for first in (0, 1))
    return {"few": few, "ddp": one, "fsdp": other, "four": one[::2], "hsdp": one[1::2]}[way]


def kept_here(x: torch.Tensor) -> int:
    """Numbers of a parameter that this rank holds."""
    if checkpoint.is_sharded(x):
        return x.to_local().numel()
    return len(x.unit.part) * x.numel() // x.unit.flat.numel() if hasattr(x, "unit") else x.numel()


def worker(out: Path, way: str) -> None:
    transformer.VOCABULARY_PART = 4  # tied embeddings are read as wide ones are, without their module
    dist = distributed.setup(**WAYS[way])
    for family, layout, critic in cases(way):
        found, place = train(layout, critic, family, dist), out / f"{family}-{layout}-{critic}"
        if dist.is_main or dist.together:
            state = {part: found[part] for part in ("seen", "numbers")}
            checkpoint.save(place, found["state"], {}, state, found["moments"], together=dist.together)
        if dist.is_main:
            save_file(found["gradients"], f"{place}.gradients")
        dist.barrier()
    dist.close()


def trunk_and_policy(dist: distributed.Dist, layout: str = "adapters") -> tuple[Transformer, ActorCritic]:
    """A frozen model of which this rank keeps a part, and a policy of this layout."""
    base = small_model("llama", torch.float64, seed=1, layers=LAYERS)
    policy = build(layout, "none", base).policy
    dist.rest(base)
    return base, dist.wrap(policy)


def recomputed_logits(dist: distributed.Dist, out: Path) -> float:
    """Ranks predict different numbers of tokens, whose logits are recomputed two rows at a time."""
    language_model.LOGITS_AT_ONCE = 2 * SMALL["vocab_size"]
    _, policy = trunk_and_policy(dist)
    recompute_blocks(policy)
    tokens, mask = random_ids(3, 2, 8), torch.arange(8) >= (7 if dist.is_main else 1)
    policy(tokens, mask.expand(2, 8)).logprobs.sum().backward()
    return sum(float(checkpoint.whole(x.grad).abs().sum()) for x in policy.parameters() if x.requires_grad)


def same_texts_again(dist: distributed.Dist, out: Path) -> float:
    """One rank's second micro-batch happens to hold the texts of its first."""
    base, _ = trunk_and_policy(dist)
    states = FrozenStates(base).read([2])
    return sum(float(states(random_ids(i * dist.rank, 2, 8))[2].abs().sum()) for i in range(2))


def judged(dist: distributed.Dist, out: Path) -> float:
    """The held-out judge reads the frozen trunk, for three prompts, which are two forwards on one rank and one on the other."""
    base, policy = trunk_and_policy(dist, "shared")
    score = FrozenReward(FrozenStates(base), [(2, "mean")], [EOS]).to(torch.float64)
    torch.nn.init.ones_(score.head.weight)

    def act(ids, lengths, rows, iteration):
        uniforms = row_uniforms(1, iteration, rows.tolist(), RESPONSE)
        return generate(policy.model, ids, lengths, Sampling(RESPONSE, [EOS], PAD, TEMPERATURE), uniforms)

    act.refresh = lambda: None
    ask, numbers = (*prompts(3), torch.arange(3)), (1, 1, 2)
    judge = HeldOutJudge(lambda *x: score.score(*x[:3]), [base], act, *ask, *numbers, dist)
    bound = NoBound(SimpleNamespace(module=policy, save_best=lambda record: None))
    return judge.ask(1, bound)["judge/mean"]


def full_disk(dist: distributed.Dist, out: Path) -> str:
    """One rank cannot write its rows."""
    _, policy = trunk_and_policy(dist)
    if not dist.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        checkpoint.save(out / "step_000001", checkpoint.trained_state(policy), {}, together=dist.together)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return config.one_line(error)


def another_machine(dist: distributed.Dist, out: Path) -> str | None:
    """One rank writes to a file system of its own."""
    _, policy = trunk_and_policy(dist)
    (out / str(dist.rank)).mkdir()
    os.chdir(out / str(dist.rank))
    try:
        checkpoint.save("run/step_000001", checkpoint.trained_state(policy), {}, together=dist.together)
    except OSError as error:
        return config.one_line(error)


APART = {x.__name__: x for x in (recomputed_logits, same_texts_again, judged, full_disk, another_machine)}


def apart(out: Path, name: str) -> None:
    dist = distributed.setup(shard=True)
    Path(out, f"{dist.rank}.json").write_text(json.dumps(APART[name](dist, out)))
    dist.close()


if __name__ == "__main__":
    (apart if sys.argv[2] in APART else worker)(Path(sys.argv[1]), sys.argv[2])


def ranks_of(place: Path, ranks: int, way: str) -> Path:
    """A directory in which this many processes have run to their end."""
    (out := place / way).mkdir()
    done = World(place).together([__file__, str(out), way], ranks)
    assert done.code == 0, done.err[-3000:]
    return out


@pytest.fixture(scope="module")
def alone():
    """What one process trains."""
    return functools.cache(lambda family, *case: train(*case, family, distributed.Dist(), micro_batch=4))


def check_same(alone, out: Path) -> dict:
    """Is what the ranks trained what one process trained? -> the numbers that rank 0 kept, by case."""
    numbers = {}
    for place in sorted(path for path in out.iterdir() if path.is_dir()):
        case, saved = tuple(place.name.split("-")), checkpoint.verify(place)
        ours, theirs = alone(*case), saved.state
        for part, tensors in (
            ("gradients", load_file(f"{place}.gradients")),
            ("state", saved.tensors),
            ("moments", saved.optimizer),
        ):
            assert tensors.keys() == ours[part].keys(), (case, part)
            for key, x in ours[part].items():
                near = 1e-9 if part == "gradients" else 1e-6  # after steps: clipping divides in float32
                torch.testing.assert_close(tensors[key], x, rtol=1e-6, atol=near, msg=f"{case} {part} {key}")
        for a, b in zip(theirs["seen"], ours["seen"], strict=True):
            assert a == pytest.approx(b, rel=1e-6, abs=1e-8), case
        numbers[case] = theirs["numbers"]
    return numbers


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return ranks_of(tmp_path_factory.mktemp("two"), 2, "few")


def test_two_shards_train_what_one_process_trains(alone, two):
    """Gradients, clipped steps, moments, samples and log-probs; and each rank keeps half of all matrices."""
    numbers = check_same(alone, two)
    assert numbers.keys() == {*cases("few")}
    for case, kept in numbers.items():
        assert kept < 0.53 * alone(*case)["numbers"], case


def tensors_of(place: Path) -> dict:
    return checkpoint.load(place).tensors


def rewrite(file: Path, change) -> None:
    """A shard with other numbers, and a config.json that knows them: as somebody may make it up."""
    with safe_open(file, "pt") as old:
        tensors, offsets = {name: old.get_tensor(name) for name in old.keys()}, json.loads(old.metadata()[OFFSETS])
    change(tensors, offsets)
    save_file(tensors, file, {OFFSETS: json.dumps(offsets)})
    config = file.with_name("config.json")
    content = json.loads(config.read_text())
    content["files"][file.name] = checkpoint.facts(file)
    config.write_text(json.dumps(content | {"sha256": checkpoint.own_digest(content)}))


OFFSETS, NAME = checkpoint.OFFSETS, "model.norm.weight"
DAMAGES = {
    "a gap": lambda tensors, offsets: offsets.update({NAME: {"saved_offsets": [10**6]}}),
    "an overlap": lambda tensors, offsets: offsets.update({NAME: {"saved_offsets": [0]}}),
    "columns": lambda tensors, offsets: offsets.update({NAME: {"saved_offsets": [0, 3]}}),
    "words": lambda tensors, offsets: offsets.update({NAME: {"saved_offsets": ["4"]}}),
    "no offsets": lambda tensors, offsets: offsets.pop(NAME),
    "another type": lambda tensors, offsets: tensors.update({NAME: tensors[NAME].half()}),
    "another width": lambda tensors, offsets: (
        tensors.update({NAME: torch.zeros(len(tensors[NAME]), 2)})
        or offsets.update({NAME: {"saved_offsets": [len(tensors[NAME]), 0]}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_shards_that_do_not_fit_are_one_clear_line(two, tmp_path, damage):
    place = tmp_path / "step_000001"
    shutil.copytree(two / "llama-full-separate", place)
    rewrite(place / "model-00002-of-00002.safetensors", DAMAGES[damage])
    with pytest.raises(ValueError, match=r"model-0000[12]-of-00002.safetensors is damaged") as told:
        tensors_of(place)
    assert "\n" not in str(told.value)


def test_a_lost_shard_is_a_damaged_checkpoint(two, tmp_path):
    shutil.copytree(two / "llama-full-separate", tmp_path / "copy")
    (tmp_path / "copy/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors has 0 bytes"):
        checkpoint.load(tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("ranks, way", [(2, "ddp"), (2, "fsdp"), (4, "four"), (4, "hsdp")])
def test_more_ranks_and_replicas(alone, tmp_path, ranks, way):
    numbers = check_same(alone, ranks_of(tmp_path, ranks, way))
    share = {"ddp": 1, "fsdp": 1 / 2, "four": 1 / 4, "hsdp": 1 / 2}[way] + 0.04  # vectors are whole
    assert all(kept < share * alone(*case)["numbers"] for case, kept in numbers.items()), numbers


def answers(place: Path, name: str) -> list:
    """What the two ranks say."""
    out = ranks_of(place, 2, name)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recomputed_logits", "same_texts_again", "judged"])
def test_ranks_gather_what_is_frozen_equally_often(tmp_path, name):
    """Whatever a rank's own texts are: the other would wait for ever."""
    first, second = answers(tmp_path, name)
    assert first > 0 and second > 0


@pytest.mark.slow
def test_a_full_disk_of_one_rank_is_one_line_on_all(tmp_path):
    first, second = answers(tmp_path, "full_disk")
    assert first.startswith("cannot write the checkpoint") and "too large" in first and "too large" in second
    assert not list(tmp_path.rglob("*step*"))


@pytest.mark.slow
def test_a_rank_with_a_file_system_of_its_own_is_told(tmp_path):
    first, _ = answers(tmp_path, "another_machine")
    assert "rank 0 does not see what other ranks wrote" in first and "that all machines share" in first
    assert not [left for rank in "01" for left in (tmp_path / "another_machine" / rank / "run").iterdir()]


# by the scripts

PPO = {"iterations": 3, "minibatches": 2, "micro_batch": 2, "grad_clip": 0.05, "checkpoint_every": 2}
STEPS = {"epochs": 0.5, "micro_batch": 4, "grad_clip": 0.05, "log_every": 1}
SCRIPTS = {
    "ppo full": ("train_ppo.py", PPO | {"layout": "full"}),
    "ppo adapters": ("train_ppo.py", PPO | {"layout": "adapters", "lora_rank": 4, "recompute": "true"}),
    "ppo branch": ("train_ppo.py", PPO | {"layout": "branch", "branch_layers": 1}),
    "lm": ("train_lm.py", STEPS),
    "rm": ("train_rm.py", STEPS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_measure_the_same_on_any_number_of_ranks(world, tmp_path, name):
    script, options = SCRIPTS[name]
    world.ok(script, out=tmp_path / "1", **options)
    ways = [(2, "true"), (4, "true")] if name == "ppo full" else [(2, "true")]
    for ranks, shard in ways:
        out = tmp_path / f"{ranks}{shard}"
        done = world.together(world.command(script, out=out, shard=shard, **options), ranks)
        assert done.code == 0, done.err
        for ours, theirs in zip(numbers(out), numbers(tmp_path / "1"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4, nan_ok=True), (ranks, shard)


@pytest.mark.slow
def test_killed_shards_go_on(world, tmp_path):
    """Two of them to the bit, and those of four ranks, which two go on with, to rounding."""
    options = PPO | {"iterations": 6, "shard": "true"}
    undisturbed = tmp_path / "undisturbed"
    done = world.together(world.command("train_ppo.py", out=undisturbed, **options), 2)
    assert done.code == 0, done.err
    for ranks, near in ((2, 0.0), (4, 1e-4)):
        (place := tmp_path / str(ranks)).mkdir()
        run, command = killed_in_the_middle(world, place, ranks, options)
        done = world.together(command, 2)
        assert done.code == 0, done.err
        for ours, theirs in zip(numbers(run), numbers(undisturbed), strict=True):
            assert ours == pytest.approx(theirs, rel=near, abs=near)
        ours, theirs = (checkpoint.load(place) for place in (run, undisturbed))
        for part in ("tensors", "optimizer"):
            a, b = getattr(ours, part), getattr(theirs, part)
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=near, atol=near)
