"""The operations that bench/ppo.py counts are those that torch counts while an iteration runs."""

import importlib.util
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = importlib.util.spec_from_file_location("bench_ppo", ROOT / "bench/ppo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("side", ["full", "shared", "adapters", "adapters_joint", "branch"])
def test_operations_are_those_that_are_done(bench, side):
    """Of all products but attention's; adapters have their own on top, here 2 x 16 x (inputs + outputs) of each matrix."""
    model = ModelConfig(512, 64, 3, 2, tied=False, context=64)
    sizes = bench.Sizes(model, batch=8, prompt=6, response=10, branch_layers=1, epochs=2, minibatches=2)
    with FlopCounterMode(display=False) as counter:
        bench.we(sizes, 1, side, "fp32")
    done = counter.get_flop_counts()["Global"]
    products = sum(n for operation, n in done.items() if operation in (torch.ops.aten.mm, torch.ops.aten.addmm))
    most = 1.3 if side.startswith("adapters") else 1.05
    assert 0.95 < products / bench.operations(sizes, side) < most
