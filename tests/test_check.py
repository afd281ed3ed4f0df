"""rlhf.check: frameworks' dumps are explained by the right convention, right ones pass, bad files get one clear line."""

import itertools
import json
import re
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rlhf.advantages import gae, grpo, rloo
from rlhf.check.__main__ import Config, main
from rlhf.check.conventions import OURS
from rlhf.check.dump import KEYS, load_dump
from rlhf.check.recompute import QUANTITIES, check, examine, table
from rlhf.functional import masked_mean, whiten
from rlhf.infra.config import run
from rlhf.kl import k1
from rlhf.losses import approx_kl, clip_fraction, policy_loss, preference_loss, value_loss
from rlhf.rewards import shape_rewards

DOC = (ROOT / "docs" / "check.md").read_text()

# ---- dumps of frameworks, from the golden files ---------------------------------------------------------------------


def dump_of(**tensors):
    """Tensors as load_dump would give them."""
    dump = {key: torch.as_tensor(x, dtype=torch.float64) for key, x in tensors.items()}
    return dump | {key: dump[key].bool() for key in ("mask",) if key in dump}


def trl_1_12(golden_dir, case="gamma=1.0,lam=0.95"):
    g, l = (load(golden_dir, name, "f64") for name in ("trl112_ppo_rewards_gae", "trl112_ppo_loss"))
    i, common, out = g.inputs, g.outputs["common(gamma=1,lam=.95,k1,kl_coef=.05)"], g.outputs[case]
    options, loss = i["cases"][case], l.outputs["clip=.2,vclip=.2"]
    return dump_of(
        mask=i["mask"],
        logprobs=i["old_logprobs"],
        ref_logprobs=i["ref_logprobs"],
        scores=out.get("scores", i["scores"]),
        values=common["values_masked"],
        kl=out.get("kl", common["kl"]),
        rewards=out.get("rewards", common["rewards"]),
        returns=out["returns"],
        whitened_advantages=out["advantages"],
        kl_coef=options["kl_coef"],
        gamma=options["gamma"],
        lam=options["lam"],
        new_logprobs=l.inputs["new_logprobs"],
        new_values=l.inputs["vpred"],
        clip=0.2,
        value_clip=0.2,
        policy_loss=loss["pg_loss"],
        value_loss=loss["vf_loss"],
        approx_kl=loss["approxkl"],
        clip_fraction=loss["pg_clipfrac"],
    )


def trl_0_11(golden_dir, penalty="kl", whitened=False):
    g = load(golden_dir, "trl0114_ppo_rewards_gae", "f64")
    i, out = g.inputs, g.outputs[f"gamma=1.0,lam=0.95,kl_penalty={penalty},whiten_rewards={whitened}"]
    return dump_of(
        mask=i["mask"],
        logprobs=i["old_logprobs"],
        ref_logprobs=i["ref_logprobs"],
        scores=i["scores"],
        values=i["values"],
        kl=out["kls"],
        rewards=out["rewards"],
        returns=out["returns"],
        whitened_advantages=out["advantages"],
        kl_coef=0.05,
        gamma=1.0,
        lam=0.95,
    )


def openrlhf(
    golden_dir, normalisation="global advantage normalisation (compute_advantages_and_returns, gamma=1,lam=.95)"
):
    g = load(golden_dir, "openrlhf_rewards_gae", "f64")
    i, whitened = g.inputs, g.outputs[f"gae + {normalisation}"]
    return dump_of(
        mask=i["mask"],
        kl=i["kl(masked)"],
        scores=i["scores"],
        values=i["values"],
        rewards=g.outputs["rewards"],
        advantages=g.outputs["gamma=1.0,lam=0.95"]["advantages"],
        returns=whitened["returns"],
        whitened_advantages=whitened["advantages"],
        kl_coef=0.05,
        gamma=1.0,
        lam=0.95,
    )


HOLE = "gamma=1.0,lam=0.95 with a hole in the mask of row 0 (positions 2,3)"


def verl(golden_dir, case="gamma=1.0,lam=0.95"):
    g = load(golden_dir, "verl_rewards_gae", "f64")
    i, out = g.inputs, g.outputs[case]
    return dump_of(
        mask=out.get("mask", i["mask"]),
        logprobs=i["old_logprobs"],
        ref_logprobs=i["ref_logprobs"],
        scores=i["token_level_scores"].sum(1),
        values=i["values"],
        rewards=g.outputs["token_level_rewards as ray_trainer.apply_kl_penalty (KL masked)"],
        returns=out["returns"],
        whitened_advantages=out["advantages"],
        kl_coef=0.05,
        gamma=1.0,
        lam=0.95,
    )


def explained(dump, **options):
    """quantity -> None if equal, else the explanations joined."""
    return {
        f.quantity: None if f.equal else "  or  ".join(f.explanations) for f in check(dump, **options) if not f.missing
    }


def test_trl_1_12_is_explained(golden_dir):
    found = explained(trl_1_12(golden_dir))
    assert {name for name, why in found.items() if why is None} == {
        "kl", "whitened_advantages", "policy_loss", "clip_fraction"
    }  # fmt: skip
    assert found["rewards"].startswith("score on the slot after EOS (TRL >= 0.12)")
    assert found["returns"].startswith("the slot after EOS is part of the episode (TRL >= 0.12")
    assert found["value_loss"] == "the slot after EOS is trained too (TRL >= 0.12, torchtune)"
    assert found["approx_kl"] == "divided by rows x columns, padding is zero (Dr. GRPO)"


def test_trl_1_12_whitened_rewards_and_k3_are_explained(golden_dir):
    found = explained(trl_1_12(golden_dir, "whiten_rewards"))
    assert (
        "score on the slot after EOS (TRL >= 0.12) + rewards whitened, mean kept (TRL whiten_rewards)"
        in found["rewards"]
    )
    found = explained(trl_1_12(golden_dir, "k3"))
    assert found["kl"] == "KL estimator k3"


def test_trl_0_11_is_explained(golden_dir):
    assert set(explained(trl_0_11(golden_dir)).values()) == {None}
    assert explained(trl_0_11(golden_dir, "abs"))["kl"] == "KL estimator |k1| (TRL <= 0.11 'abs')"
    assert explained(trl_0_11(golden_dir, "mse"))["kl"] == "KL estimator k2 (TRL <= 0.11 'mse')"
    leak = explained(trl_0_11(golden_dir, whitened=True))
    assert leak.pop("returns") == (
        "rewards outside the mask enter GAE (TRL <= 0.11 whiten_rewards)"
        " + rewards whitened, mean kept (TRL whiten_rewards)"
    )
    assert set(leak.values()) == {None}  # given its own returns, the whitening is right


def test_openrlhf_is_explained(golden_dir):
    found = explained(openrlhf(golden_dir))
    assert found.pop("whitened_advantages") == "biased variance (OpenAI, OpenRLHF, vwxyzjn)"
    assert found == {"rewards": None, "advantages": None, "returns": None}
    found = explained(openrlhf(golden_dir, "mean-only normalisation (no_std_norm)"))
    assert found["whitened_advantages"] == "mean removed, not divided (OpenRLHF no_std_norm)"


def test_verl_is_equal(golden_dir):
    for case in ("gamma=1.0,lam=0.95", HOLE):
        assert set(explained(verl(golden_dir, case)).values()) == {None}


def test_torchtune_deepspeed_chat_and_trlx_are_explained(golden_dir):
    g = load(golden_dir, "torchtune_rewards_gae", "f64")
    i, theirs = g.inputs, g.outputs["valid_score_idxs=recipe value_seq_idxs"]
    case = theirs["gamma=1.0,lam=0.95"]
    shared = {key: i[name] for key, name in (("mask", "mask"), ("logprobs", "old_logprobs"), ("scores", "scores"))}
    shared |= {"ref_logprobs": i["ref_logprobs"], "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95}
    found = explained(
        dump_of(
            **shared,
            values=i["values"],
            rewards=theirs["rewards"],
            returns=case["returns"],
            whitened_advantages=case["advantages"],
        )
    )
    assert found == {
        "rewards": "score on the slot after EOS, unless EOS is all there is (torchtune)",
        "returns": "the slot after EOS is part of the episode, unless EOS is all there is (torchtune)",
        "whitened_advantages": "mean added back (torchtune's inverted shift_mean)",
    }
    g = load(golden_dir, "deepspeedchat_ppo", "f64")
    found = explained(
        dump_of(
            **shared | {"mask": g.inputs["mask(response)"]},
            values=g.outputs["values_masked"],
            rewards=g.outputs["rewards"],
            advantages=g.outputs["advantages"],
        )
    )
    assert found["rewards"] == "score on the slot after EOS, which pays KL too (DeepSpeed-Chat)"
    assert found["advantages"].startswith("the slot after EOS is part of the episode (TRL >= 0.12, DeepSpeed-Chat)")
    g = load(golden_dir, "trlx_ppo", "f64")
    found = explained(
        dump_of(
            mask=g.inputs["mask"],
            values=g.inputs["old_values(masked)"],
            returns=g.outputs["returns"],
            whitened_advantages=g.outputs["advantages"],
            new_logprobs=g.inputs["new_logprobs"],
            logprobs=g.inputs["old_logprobs"],
            approx_kl=g.outputs["approx_kl(k3, unmasked mean)"],
        )
    )
    assert found["whitened_advantages"] == "padding whitened too (trlX)"
    assert "ratio - 1 - log ratio (CleanRL, trlX) + divided by rows x columns" in found["approx_kl"]


def losses(golden_dir, name, quantity="policy_loss"):
    g = load(golden_dir, "ppo_losses__openrlhf_verl_torchtune", "f64")
    i = g.inputs
    policy = {
        "new_logprobs": i["new_logprobs"],
        "logprobs": i["old_logprobs"],
        "advantages": i["advantages"],
        "clip": 0.2,
    }
    value = {"new_values": i["vpred"], "values": i["old_values(masked)"], "returns": i["returns"], "value_clip": 0.2}
    inputs = policy if quantity == "policy_loss" else value
    return dump_of(mask=i["mask"], **inputs, **{quantity: g.outputs[name]["loss"]})


@pytest.mark.parametrize(
    "name, convention",
    [
        ("OpenRLHF PolicyLoss(token_level)", None),
        ("OpenRLHF PolicyLoss(token_level_loss=False)", "mean of each response's mean"),
        ("OpenRLHF PolicyLoss(clip .2/.28)", "upper clip 0.28 (DAPO)"),
        ("OpenRLHF PolicyLoss(gspo)", "one ratio per response, of the mean log ratio (GSPO)"),
        ("verl compute_policy_loss(dual clip c=3)", "dual clip 3 (verl's default)"),
        ("verl compute_policy_loss(c=1e9)", None),
        ("verl compute_policy_loss(clip-higher .2/.28)", "upper clip 0.28 (DAPO) + dual clip 3 (verl's default)"),
        ("verl seq-mean-token-sum", "sum over each response, mean over responses + dual clip 3 (verl's default)"),
        ("verl seq-mean-token-mean", "mean of each response's mean"),
    ],
)
def test_policy_losses_are_explained(golden_dir, name, convention):
    why = explained(losses(golden_dir, name))["policy_loss"]
    assert why is None if convention is None else convention in why


@pytest.mark.parametrize(
    "name, convention",
    [
        ("OpenRLHF ValueLoss(clip=.2)", None),
        ("OpenRLHF ValueLoss(no clip)", "no value clip"),
        ("OpenRLHF ValueLoss(clip=.2,seq-mean)", "mean of each response's mean"),
        ("verl compute_value_loss(clip=.2)", None),
    ],
)
def test_value_losses_are_explained(golden_dir, name, convention):
    why = explained(losses(golden_dir, name, "value_loss"))["value_loss"]
    assert why is None if convention is None else convention in why


def test_micro_batches_of_trl_are_explained(golden_dir):
    g = load(golden_dir, "trl112_ppo_microbatch", "f64")
    dump = trl_1_12(golden_dir)
    dump = {key: dump[key] for key in ("mask", "new_logprobs", "logprobs", "clip", "whitened_advantages")}

    def why(name, **more):
        loss = g.outputs[name]["micro_pg_loss"].mean()
        return explained(dump | dump_of(**more) | {"policy_loss": loss})["policy_loss"]

    assert why("per_device=8,accum=1") is None
    assert why("per_device=2,accum=4") == "mean of the means of 4 micro-batches or ranks"
    assert why("per_device=2,accum=4", micro_batch=2) == "mean of the means of 4 micro-batches or ranks"
    assert why("per_device=2,accum=4", micro_batch=4) == ""  # the dump says otherwise
    each = "mean of each response's mean (TRL GRPO, OpenRLHF token_level_loss=False)"
    assert why("per_device=1,accum=8") == each


def test_groups_and_pairs_are_explained(golden_dir):
    g = load(golden_dir, "verl_group_advantages", "f64")
    scores, theirs = g.inputs["token_level_scores"].sum(1), g.outputs["groups 5+2+1(single)"]
    dump = dump_of(scores=scores, grpo_advantages=theirs["grpo"][:, 0], rloo_advantages=theirs["rloo"][:, 0])
    alone = "a response alone in its group keeps its score (verl)"
    assert explained(dump | {"group": theirs["index"]}) == {"grpo_advantages": alone, "rloo_advantages": alone}
    g = load(golden_dir, "trl116_grpo_advantages", "f64")
    two = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    for case, why in (
        ("group", "eps 1e-4 (TRL)"),
        ("batch", "standard deviation of the whole batch (TRL scale_rewards='batch')"),
        ("none", "not divided (Dr. GRPO)"),
    ):
        dump = dump_of(scores=g.inputs["rewards"], grpo_advantages=g.outputs[f"scale_rewards={case}"])
        assert explained(dump | {"group": two}, tolerance=1e-6)["grpo_advantages"] == why
    g = load(golden_dir, "trl116_rloo", "f64")
    i = g.inputs
    dump = dump_of(mask=i["mask"], logprobs=i["old_logprobs"], ref_logprobs=i["ref_logprobs"], scores=i["rewards"])
    for case, why in (
        ("beta=0", None),
        ("beta=0.05", "the response's KL is part of its score (TRL RLOO)"),
        ("beta=0,normalize", "normalised over the batch (TRL normalize_advantages)"),
    ):
        more = dump_of(kl_coef=0.05, rloo_advantages=g.outputs[case]["advantages"]) | {"group": two}
        assert explained(dump | more)["rloo_advantages"] == why
    g = load(golden_dir, "trl0114_reward_loss", "f64")
    pairs = {f"{side}_scores": g.inputs[f"rewards_{side}(n,1)"][:, 0] for side in ("chosen", "rejected")}
    pairs["margin"] = g.inputs["margin(n,)"]
    found = explained(dump_of(**pairs, preference_loss=g.outputs["margin"]["loss"]))
    assert found == {"preference_loss": "every pair meets every margin (TRL <= 0.23)"}
    g = load(golden_dir, "openrlhf_pairwise_loss", "f64")
    found = explained(dump_of(**pairs, preference_loss=g.outputs["LogExpLoss(margin is ignored)"]["loss"]))
    assert found == {"preference_loss": "margin ignored (OpenRLHF LogExpLoss)"}


# ---- dumps of our own -----------------------------------------------------------------------------------------------


def random_dump(seed, rows=8, columns=9, prompt=0, garbage=0.0):
    """Every quantity, computed by our formulas; `garbage` outside the mask of every input."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = columns, max(1, columns - 2)  # one full row, one with room after it
    columns = torch.arange(columns + prompt)
    mask = (columns >= prompt) & (columns < prompt + lengths[:, None])
    d = {key: torch.where(mask, normal(*mask.shape), garbage) for key in ("values", "new_values")}
    for key in ("logprobs", "ref_logprobs", "new_logprobs"):
        d[key] = torch.where(mask, -normal(*mask.shape).abs(), garbage)
    numbers = {"kl_coef": 0.1, "gamma": 0.97, "lam": 0.9, "clip": 0.2, "value_clip": 0.3, "label_smoothing": 0.1}
    d |= {key: torch.tensor(x, dtype=torch.float64) for key, x in numbers.items()}
    d |= {"mask": mask, "scores": normal(rows) * 3, "group": torch.arange(rows) // 4, "margin": normal(rows).abs()}
    d |= {"chosen_scores": normal(rows), "rejected_scores": normal(rows)}
    d["kl"] = k1(d["logprobs"], d["ref_logprobs"])
    d["mean_kl"] = torch.where(mask, d["kl"], 0).sum(1).mean()
    d["rewards"] = shape_rewards(d["scores"], d["logprobs"], d["ref_logprobs"], mask, 0.1)
    d["advantages"], d["returns"] = gae(d["rewards"], d["values"], mask, 0.97, 0.9)
    d["whitened_advantages"] = whiten(d["advantages"], mask)
    new, old, a = d["new_logprobs"], d["logprobs"], d["whitened_advantages"]
    d["policy_loss"] = masked_mean(policy_loss(new, old, a, 0.2), mask)
    d["value_loss"] = masked_mean(value_loss(d["new_values"], d["values"], d["returns"], 0.3), mask)
    d["approx_kl"] = masked_mean(approx_kl(new, old), mask)
    d["clip_fraction"] = masked_mean(clip_fraction(new, old, a, 0.2), mask)
    d["rloo_advantages"] = rloo(d["scores"], d["group"])
    d["grpo_advantages"] = grpo(d["scores"], d["group"])
    d["preference_loss"] = preference_loss(d["chosen_scores"], d["rejected_scores"], d["margin"], 0.1).mean()
    return d


def floats(dump):
    return {key: x.float() if x.dtype == torch.float64 else x for key, x in dump.items()}


def write(path, dump):
    if path.suffix == ".json":
        path.write_text(json.dumps({key: x.tolist() for key, x in dump.items()}))
    else:
        save_file({key: x.contiguous() for key, x in dump.items()}, path)
    return path


def command(monkeypatch, capsys, *words):
    """Exit code, stdout and stderr of `python -m rlhf.check words`."""
    monkeypatch.setattr(sys, "argv", ["check", *map(str, words)])
    try:
        run(main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("garbage", [0.0, float("nan")])
def test_our_own_dump_is_equal_everywhere(tmp_path, monkeypatch, capsys, suffix, garbage):
    dump = random_dump(0, prompt=3, garbage=garbage)
    path = write(tmp_path / f"ours{suffix}", floats(dump) if suffix == ".safetensors" else dump)
    code, out, err = command(monkeypatch, capsys, path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 2 + len(QUANTITIES) and all("  equal  " in line for line in lines[2:])


def test_a_difference_exits_with_1(tmp_path, monkeypatch, capsys):
    dump = random_dump(1)
    path = write(tmp_path / "off.json", dump | {"value_loss": 2 * dump["value_loss"]})
    code, out, _ = command(monkeypatch, capsys, path)
    assert code == 1
    assert re.search(r"value_loss +differs .*  without the factor one half\n", out)
    dump["returns"][0, 0] += 0.1
    assert re.search(r"returns +differs .*no known convention", command(monkeypatch, capsys, write(path, dump))[1])
    assert command(monkeypatch, capsys, path, "--tolerance=10")[0] == 0


def test_the_module_runs(tmp_path):
    path = write(tmp_path / "ours.json", random_dump(2))
    done = subprocess.run([sys.executable, "-m", "rlhf.check", path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@settings(max_examples=150)
@given(st.data())
def test_a_convention_is_identified(data):
    """A dump with one quantity computed by one or two other conventions: they are named, or fewer that do as well."""
    dump = random_dump(data.draw(st.integers(0, 10**6)))
    if data.draw(st.booleans()):
        dump["values"] = torch.where(dump["mask"], dump["values"], 0.7)  # padding that is not zero can leak
        dump["rewards"] = torch.where(dump["mask"], dump["rewards"], -0.4)
        dump["kl"] = torch.where(dump["mask"], dump["kl"], 0.3)
    name = data.draw(st.sampled_from(sorted(QUANTITIES)))
    axes = QUANTITIES[name].axes(dump)
    count = data.draw(st.integers(1, min(2, len(axes))))
    changed = data.draw(st.permutations(range(len(axes))))[:count]
    names = [
        data.draw(st.sampled_from([n for n in axis if n])) if i in changed else OURS for i, axis in enumerate(axes)
    ]
    theirs = QUANTITIES[name].compute(dump, *(axis[n] for axis, n in zip(axes, names)))
    theirs, where = theirs if isinstance(theirs, tuple) else (theirs, torch.ones_like(theirs, dtype=torch.bool))
    dump[name] = torch.where(where & theirs.isfinite(), theirs, 0)
    if not theirs[where].isfinite().all():
        return
    finding = examine(dump, name, tolerance=1e-9, most=2)
    label = " + ".join(n for n in names if n)
    if finding.equal:  # the convention makes no difference on this batch
        ours = QUANTITIES[name].compute(dump, *(axis[OURS] for axis in axes))
        ours = ours[0][dump["mask"]] if isinstance(ours, tuple) else ours
        given = theirs[dump["mask"]] if theirs.dim() == 2 else theirs
        assert torch.allclose(ours, given, rtol=1e-8, atol=1e-9)
        return
    fewest = min(len(why.split(" + ")) for why in finding.explanations)
    assert label in finding.explanations or fewest < count, (label, finding.explanations)


def test_ours_comes_first_on_every_axis():
    dump = random_dump(3)
    for quantity in QUANTITIES.values():
        assert all(next(iter(axis)) == OURS for axis in quantity.axes(dump))


# ---- bad files ------------------------------------------------------------------------------------------------------

GOOD = {"mask": [[1, 1, 0], [1, 1, 1]], "rewards": [[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]], "gamma": 1.0, "lam": 1.0}
GOOD |= {"values": [[0.5, 0.5, 0.0], [0.1, 0.2, 0.3]], "returns": [[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]]}
NAN = float("nan")


def test_the_good_file_is_good(tmp_path, monkeypatch, capsys):
    path = tmp_path / "dump.json"
    path.write_text(json.dumps(GOOD))
    assert command(monkeypatch, capsys, path)[0] == 0
    assert command(monkeypatch, capsys, f"--dump={path}")[0] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": [[1, 1, 2], [1, 1, 1]]}, "mask must be boolean or 0 and 1, it holds 2"),
        ({"mask": [[0.5, 1, 1], [1, 1, 1]]}, "mask must be boolean or 0 and 1, it holds 0.5"),
        ({"mask": [[1, 1, 0]]}, r"values has shape \(2, 3\), but B is 1 in mask"),
        ({"mask": None}, "rewards needs a mask"),
        ({"mask": [[0, 0, 0], [1, 1, 1]]}, "row 0 of the mask has no token"),
        ({"values": [[0.5, 0.5], [0.1, 0.2]]}, r"values has shape \(2, 2\), but T is 3 in mask"),
        ({"values": [0.5, 0.5]}, r"values has shape \(2,\), expected \(B, T\)"),
        ({"gamma": [1.0, 1.0]}, r"gamma has shape \(2,\), expected a single number"),
        ({"values": [[0.5, NAN, 0.0], [0.1, 0.2, 0.3]]}, r"values holds nan at \(0, 1\), inside the mask"),
        ({"returns": [[1.0, float("inf"), 0.0], [2.0] * 3]}, r"returns holds inf at \(0, 1\)"),
        ({"lam": NAN}, "lam holds nan"),
        ({"value": [[1.0]]}, "unknown key 'value'; did you mean 'values'"),
        ({"zzz": 1.0}, "unknown key 'zzz'; known: mask, "),
        ({"values": [[0.5, 0.5], [0.1]]}, "'values' is not a number or a rectangular list of numbers"),
        ({"values": "high"}, "'values' is not a number"),
        ({"gamma": None, "lam": None}, "nothing to check; rewards needs .*; returns needs gamma, lam"),
        ({"returns": None}, "nothing to check; .*rewards needs .*scores"),
        ({"world": 3.0}, "2 rows do not divide into world = 3"),
        ({"micro_batch": 0.0}, "2 rows do not divide into micro_batch = 0"),
    ],
)
def test_bad_content_is_one_line(tmp_path, monkeypatch, capsys, change, message):
    content = {key: x for key, x in (GOOD | change).items() if x is not None}
    path = tmp_path / "dump.json"
    path.write_text(json.dumps(content))
    code, out, err = command(monkeypatch, capsys, path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(message, err), err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("dump.json", b"{", "is not JSON"),
        ("dump.json", b"[1, 2]", "must hold an object of lists and numbers, not a list"),
        ("dump.json", b"\xff\xfe\x00", "is not JSON"),
        ("dump.safetensors", b"not one", "is not a safetensors file"),
        ("dump.pt", b"", r"must be a \.safetensors or \.json file"),
        ("missing.json", None, "No such file"),
        ("missing.safetensors", None, "No such file"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, monkeypatch, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = command(monkeypatch, capsys, tmp_path / name)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(message, err), err
    assert name in err


def test_a_wrong_command_line_is_one_line(monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys)
    assert code == 2 and "--dump" in err
    code, _, err = command(monkeypatch, capsys, "dump.json", "--tolerence=1")
    assert code == 2 and "did you mean --tolerance?" in err


def test_half_precision_and_booleans_are_read(tmp_path):
    dump = random_dump(4)
    half = {key: x.bfloat16() if x.dim() == 2 and key != "mask" else x for key, x in floats(dump).items()}
    read = load_dump(write(tmp_path / "half.safetensors", half))
    assert read["values"].dtype == torch.float64 and read["mask"].dtype == torch.bool
    assert all(f.equal for f in check(read, tolerance=0.05) if f.quantity in ("kl", "rewards", "returns"))
    assert not any(f.equal for f in check(read, tolerance=1e-6) if f.quantity == "whitened_advantages")


# ---- the documentation ----------------------------------------------------------------------------------------------


def section(name):
    return DOC.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].strip()


def test_the_documented_keys_are_the_keys():
    shapes = {"": "number", "B": "(B,)", "N": "(N,)", "BT": "(B, T)"}
    rows = [f"| `{key}` | {shapes[shape]} | {meaning} |" for key, (shape, meaning) in KEYS.items()]
    assert section("keys") == "\n".join(["| key | shape | meaning |", "|---|---|---|", *rows])


def test_the_documented_conventions_are_the_conventions():
    dump = {key: x for key, x in random_dump(5).items() if key != "kl"}
    dump["mask"][0, 2] = False  # so that holes matter
    lines, seen = [], set()
    for name, quantity in QUANTITIES.items():
        labels = [label for axis in quantity.axes(dump) for label in axis if label]
        # "of 4 ranks", "every 4th row": one entry for all numbers
        labels = dict.fromkeys(re.sub(r"\b[248](?=th| ranks| micro)", "n", label) for label in labels)
        if new := [label for label in labels if label not in seen]:
            lines.append(f"- `{name}`: " + "; ".join(new))
        seen |= set(labels)
    assert section("conventions") == "\n".join(lines)


def blocks(language):
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)\n```$", DOC, flags=re.S | re.M) if name == language]


def test_the_tables_in_the_text_are_printed(golden_dir):
    """The numbers of rounding size may differ between machines; everything else is as documented."""

    def settled(text):
        return re.sub(r"\d\.\de-(0[9]|1\d)", "0.0e+00", text)

    kept = ("mask", "kl", "scores", "values", "returns", "whitened_advantages", "kl_coef", "gamma", "lam")
    dumps = [trl_1_12(golden_dir), {key: openrlhf(golden_dir)[key] for key in kept}, verl(golden_dir)]
    outputs = [block for block in blocks("") if "given vs ours" in block]
    assert len(outputs) == len(dumps)
    for dump, output in zip(dumps, outputs):
        documented = output[output.index("quantity") :]
        assert settled(documented) == settled(table(check(dump)))


def fake_modules(monkeypatch, **modules):
    for name, content in modules.items():
        parts = name.split("__")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        module = types.ModuleType(".".join(parts))
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, ".".join(parts), module)
        setattr(sys.modules[".".join(parts[:-1])], parts[-1], module)


def test_the_openrlhf_snippet_dumps_what_it_says(golden_dir, monkeypatch, tmp_path):
    """On a stand-in with the attributes and the call of the real class, filled with its real numbers."""
    theirs = openrlhf(golden_dir)
    rows = [slice(0, 4), slice(4, 8)]  # two micro rollouts, the second one wider
    narrow = [theirs["mask"][r].any(0).sum() for r in rows]

    class Maker:
        args = types.SimpleNamespace(gamma=1.0, lambd=0.95)
        kl_ctl = types.SimpleNamespace(value=0.05)

        def compute_advantages_and_returns(self, experiences, **kwargs):
            for e, r, n in zip(experiences, rows, narrow):
                e.kl = None
                e.returns, e.advantages = theirs["returns"][r, :n], theirs["whitened_advantages"][r, :n]
            return experiences

    fake_modules(monkeypatch, openrlhf__trainer__ppo_utils__experience_maker={"RemoteExperienceMaker": Maker})
    monkeypatch.chdir(tmp_path)
    exec(next(block for block in blocks("python") if "openrlhf" in block), {})
    experiences = [
        types.SimpleNamespace(
            action_mask=theirs["mask"][r, :n],
            kl=theirs["kl"][r, :n],
            values=theirs["values"][r, :n],
            rewards=theirs["scores"][r],
        )
        for r, n in zip(rows, narrow)
    ]
    assert Maker().compute_advantages_and_returns(experiences) is experiences
    found = explained(load_dump("openrlhf.safetensors"))
    assert found == {"returns": None, "whitened_advantages": "biased variance (OpenAI, OpenRLHF, vwxyzjn)"}


def test_the_verl_snippet_dumps_what_it_says(golden_dir, monkeypatch, tmp_path):
    theirs = verl(golden_dir)
    names = {"response_mask": "mask", "old_log_probs": "logprobs", "ref_log_prob": "ref_logprobs", "values": "values"}
    batch = {verl_name: theirs[ours] for verl_name, ours in names.items()}
    batch["token_level_rewards"] = theirs["rewards"]
    batch["token_level_scores"] = torch.nn.functional.pad(theirs["scores"][:, None], (0, 5))

    def compute_advantage(data, adv_estimator, gamma=1.0, lam=1.0, num_repeat=1, config=None):
        data.batch |= {"advantages": theirs["whitened_advantages"], "returns": theirs["returns"]}
        return data

    fake_modules(monkeypatch, verl__trainer__ppo__ray_trainer={"compute_advantage": compute_advantage})
    monkeypatch.chdir(tmp_path)
    exec(next(block for block in blocks("python") if "verl" in block), {})
    sys.modules["verl.trainer.ppo.ray_trainer"].compute_advantage(
        types.SimpleNamespace(batch=batch), adv_estimator="gae", gamma=1.0, lam=0.95, num_repeat=1, config=None
    )
    assert set(explained(load_dump("verl.safetensors")).values()) == {None}


def test_the_options_are_those_of_the_text():
    assert all(f"--{name}" in DOC for name in ("tolerance", "most")) and {"dump", "tolerance", "most"} == set(
        Config.__dataclass_fields__
    )


def test_nothing_is_claimed_twice():
    """Two axes of one quantity never use the same name, or an explanation could not say which it means."""
    dump = random_dump(6)
    for quantity in QUANTITIES.values():
        names = list(itertools.chain.from_iterable([n for n in axis if n] for axis in quantity.axes(dump)))
        assert len(names) == len(set(names)) and not any(" + " in name or "  or  " in name for name in names)
