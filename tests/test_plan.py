"""The plan of memory: counted parts against real models, estimated parts against what autograd keeps."""

from dataclasses import asdict

import pytest
import torch
from reference_model import FAMILIES, SMALL, random_ids

from model.hf import save_hf
from model.panels import can_pack
from model.transformer import KVCache, ModelConfig, Transformer
from rlhf.infra import checkpoint, optim
from rlhf.lm.pretrained import config_of
from rlhf.lm.trunks import LoRA
from rlhf.ppo.plan import PARTS, PHASES, Sizes, fewest, peak, plan
from rlhf.ppo.roles import CRITICS, LAYOUTS

LORA = LoRA(rank=3)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_family = pytest.mark.parametrize(
    "family", ["gpt2", "llama", "qwen3", "olmo2", "granite", "gemma2", "gemma3_text"]
)


def config(family="llama", **changes):
    return ModelConfig(**{**SMALL, "layers": 3, **FAMILIES[family], **changes})


def sizes(**changes) -> Sizes:
    return Sizes(
        **{"batch": 8, "micro_batch": 4, "prompt": 5, "response": 6, "lora": LORA, "branch_layers": 2, **changes}
    )


def size_of(tensors) -> int:
    """Bytes; what shares its memory counts once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@every_layout
@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("critic", ["shared", "separate", "none"])
def test_weights_and_optimiser_are_the_real_bytes(layout, family, critic, dtype, monkeypatch):
    monkeypatch.setattr("model.half.LARGEST", -1)
    critic = "separate" if (layout, critic) == ("full", "shared") else critic
    base = Transformer(config(family))
    roles = LAYOUTS[layout](base, critic, 1.0, LORA, 2).stored_in(dtype)
    policy, planned = roles.policy, plan(config(family), sizes(critic=critic, dtype=dtype), layout)
    everything = [*base.parameters(), *policy.parameters(), *roles.sampler().parameters()]
    assert planned["weights"] + planned["reference"] + planned["sampler"] == size_of(everything)
    roles.rest()
    assert planned["weights"] + planned["reference"] == size_of(everything)
    trained = [x for x in policy.parameters() if x.requires_grad]
    assert planned["optimiser"] == 2 * size_of(trained)
    how = {"critic": critic, "dtype": dtype, "bounded": True}  # which keeps a policy to go back to
    bounded = plan(config(family), sizes(**how), layout)
    assert bounded["bound"] == size_of(trained) and peak(bounded) == peak(planned) + size_of(trained)
    assert planned["gradients"] >= size_of(trained)
    assert (planned["gradients"] == size_of(trained)) == (not base.config.tied or layout in ("adapters", "branch"))


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="oneDNN has no bf16 for this CPU")
@every_layout
@every_family
def test_panels_are_counted_where_a_cpu_keeps_some(layout, family):
    base = Transformer(config(family))
    roles = LAYOUTS[layout](base, CRITICS[layout], 1.0, LORA, 2).stored_in(torch.bfloat16)
    how = sizes(dtype=torch.bfloat16, on_cpu=True)
    model, ids = roles.sampler(), torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        model(ids)
    kept = 2 * sum(x.panels.numel() for x in roles.half.products)
    embedding = model.embed_tokens.weight
    kept += embedding.nbytes * (embedding is not roles.policy.model.embed_tokens.weight)
    assert plan(config(family), how, layout)["sampler"] == kept


@every_layout
@every_family
def test_panels_of_a_policy_in_float32_are_counted(layout, family, monkeypatch):
    """Of one that trains as a whole, for as many rows and steps as gain."""
    monkeypatch.setattr("model.panels.WIDTH", 0)
    roles = LAYOUTS[layout](Transformer(config(family)), CRITICS[layout], 1.0, LORA, 2).stored_in(torch.float32)
    for rows, steps in ((8, 20), (8, 6), (80, 20), (3, 20)):
        kept = 0
        if panels := getattr(roles.sampler(), "panels", None):
            panels.lay(rows, steps)
            for *_, product in panels.products:
                product.lay()
                kept += product.panels.nbytes
        how = sizes(batch=rows, response=steps, on_cpu=True)
        assert plan(config(family), how, layout)["sampler"] == kept
        assert (kept > 0) == (layout in ("full", "shared") and (rows, steps) == (8, 20))
        beside = plan(config(family), sizes(batch=rows, response=steps, on_cpu=True, alone=False), layout)
        assert beside["sampler"] == 0
        roles.rest()


@every_family
def test_the_cache_is_the_real_one(family):
    cache = KVCache(config(family), 8, 11)
    assert plan(config(family), sizes(), "shared")["cache"] == size_of([*cache.keys, *cache.values])


@every_layout
@every_family
@pytest.mark.parametrize(
    "precision, stored", [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]
)  # the last: shards
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_activations_are_what_autograd_keeps(layout, family, critic, precision, stored):
    """Within 30 percent of all the tensors that a forward leaves for its backward, parameters and logits apart."""
    if (layout, critic) == ("full", "shared"):
        return
    wide = config(family, width=64, ffn=160, vocab_size=16, head_dim=16, context=40)
    amp = optim.amp(torch.device("cpu"), precision)
    stored = optim.DTYPES[stored]
    roles = LAYOUTS[layout](Transformer(wide), critic, 1.0, LORA, 2).stored_in(stored)
    policy = roles.policy
    tokens, mask = random_ids(0, 4, 33), torch.ones(4, 33, dtype=torch.bool)
    mask[:, 0] = False
    kept: dict[int, int] = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with amp.autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy(tokens, mask, roles.features(tokens))
    for parameter in policy.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    parts = plan(wide, sizes(critic=critic, prompt=1, response=32, dtype=stored, product=amp.dtype), layout)
    planned = parts["activations"] + parts["casts"]
    assert 0.7 < sum(kept.values()) / planned < 1.25, (sum(kept.values()), planned)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_servers_sample_there_is_no_cache_and_no_copy(layout, dtype):
    base = Transformer(config())
    roles = LAYOUTS[layout](base, CRITICS[layout], 1.0, LORA, 2).stored_in(dtype, sampler=False)
    assert roles.half is None
    planned, own = (plan(config(), sizes(dtype=dtype, sampler=on), layout) for on in (False, True))
    assert planned["weights"] + planned["reference"] == size_of([*base.parameters(), *roles.policy.parameters()])
    assert planned["cache"] == 0 < own["cache"] and planned["logits"] <= own["logits"]
    assert planned["sampler"] == 0 and (own["sampler"] > 0) == (dtype != torch.float32)
    same = PARTS[:1] + ("gradients", "optimiser", "activations", "casts")
    assert [planned[name] for name in same] == [own[name] for name in same]


def test_the_layouts_in_order():
    """At the shape of SmolLM2-135M: what shares more needs less, and nothing is forgotten."""
    smollm2 = ModelConfig(49152, width=576, layers=30, heads=9, kv_heads=3, ffn=1536, context=2048)
    sums = {name: sum(plan(smollm2, sizes(branch_layers=4, lora=LoRA()), name).values()) for name in LAYOUTS}
    assert sums["full"] > sums["shared"] > 2 * sums["adapters"] and sums["shared"] > 2 * sums["branch"]
    weights = 134_515_008 * 4
    shared = plan(smollm2, sizes(), "shared")
    assert (shared["weights"], shared["reference"]) == (weights + 577 * 4, weights)
    assert set(plan(smollm2, sizes(), "shared")) == set(PARTS)
    more = plan(smollm2, sizes(reward=1000, baseline=7), "branch")
    assert more["reward"] == 4000 and more["baseline"] == 7
    rows = 4 * 4 * sizes().batch * 576 * (sizes().prompt + sizes().response + 1)  # bytes, of four depths' states
    kept = [plan(smollm2, sizes(branch_layers=4, depths=frozenset({9, 15, 29})), name)["states"] for name in LAYOUTS]
    assert kept == [0, 0, 0, rows]  # to learn from; and at 9, 15 and 26 as sampled
    assert plan(smollm2, sizes(branch_layers=4, sampler=False), "branch")["states"] == rows / 4
    assert plan(smollm2, sizes(branch_layers=30), "branch")["states"] == rows / 2  # above no layer: what embeds
    assert CRITICS.keys() == LAYOUTS.keys()


def test_the_shape_is_read_from_the_config_alone(tmp_path):
    """Not even the weights' file need be there."""
    model = Transformer(config("qwen2"))
    save_hf(tmp_path / "hf", model)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        file.unlink()
    assert config_of(tmp_path / "hf") == model.config
    checkpoint.save(tmp_path / "ours", {"x": torch.zeros(1)}, {"kind": "lm", "model": asdict(model.config)})
    assert config_of(tmp_path / "ours") == model.config


def test_the_script_prints_the_plan_and_stops(world, tmp_path):
    out = world.ok("train_ppo.py", out=tmp_path / "run", plan="true", layout="branch", branch_layers=1, max_kl=5.0)
    table = [line.split() for line in out.splitlines()]
    assert table[1] == ["full", "shared", "adapters", "branch*"]
    there = [part for part in PARTS[:-3] if part != "sampler"]  # which in float32 is the policy
    assert [row[0] for row in table[2:]] == [*there, *PHASES, "peak"] and all(len(row) == 5 for row in table[2:])
    for column in range(1, 5):
        said = {row[0]: float(row[column]) for row in table[2:]}
        for phase, parts in PHASES.items():
            assert said[phase] == pytest.approx(sum(said.get(part, 0) for part in parts), abs=0.005)
        assert said["peak"] == max(said[phase] for phase in PHASES)
    assert not (tmp_path / "run").exists()


def test_how_many_gpus(world):
    """One where a rank fits alone, else the fewest shards that keep the bound; or more than are tried."""
    models = [config(), config(layers=40)]
    for model, gb in ((models[0], 1.0), (models[1], 0.9 * peak(plan(models[1], sizes(), "full")) / 1e9)):
        ranks, parts = fewest(model, lambda ranks: sizes(ranks=ranks), "full", gb)
        assert peak(parts) <= gb * 1e9 and (ranks == 1) == (model is models[0])
        assert ranks == 1 or peak(plan(model, sizes(ranks=ranks // 2), "full")) > gb * 1e9
    assert fewest(models[0], lambda ranks: sizes(ranks=ranks), "full", 1e-6)[0] is None
    said = world.ok("train_ppo.py", plan="true", gpu_gb=80).splitlines()
    assert said[-4].startswith("fewest GPUs of 80 GB") and said[-2].split() == ["GPUs", *"1111"]


@every_layout
def test_a_run_says_its_peak_beside_the_plan(world, tmp_path, layout):
    out = world.ok(
        "train_ppo.py",
        out=tmp_path,
        iterations=1,
        layout=layout,
        **({"branch_layers": 1} if layout == "branch" else {}),
    )
    line = next(line for line in out.splitlines() if line.startswith("peak memory"))
    assert line.endswith(f"in layout {layout}") and "planned" in line
