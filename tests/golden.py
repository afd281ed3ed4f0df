"""Numbers that other frameworks computed, as tensors. Each file of the golden directory was made by running their code.

A file says {"source", "notes", "inputs", "outputs"}; `.f64` and `.f32` are the same fixture in two precisions. Where a
framework's convention is not ours, the test writes the conversion down: ours + conversion = theirs.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

DTYPE = {"f64": torch.float64, "f32": torch.float32}
TOLERANCE = {"f64": 1e-10, "f32": 3e-5}
FLOAT32 = 1e-6  # where a framework itself drops to float32: OpenRLHF's KL and whitening, TRL's logged numbers
FLOAT32_RATIO = 1e-7  # where only TRL's n / (n - 1), an integer by an integer, is float32

both = pytest.mark.parametrize("precision", ["f64", "f32"])


def load(directory: Path, name: str, precision: str | None = None) -> SimpleNamespace:
    """inputs and outputs of `name` with every rectangular list as a tensor; a file without a precision reads as float64."""
    path = directory / (f"{name}.{precision}.json" if precision else f"{name}.json")
    content = json.loads(path.read_text())
    dtype, tolerance = DTYPE[precision or "f64"], TOLERANCE[precision or "f64"]
    inputs, outputs = (tensors(content[key], dtype) for key in ("inputs", "outputs"))

    def close(ours, theirs, mask=None, at_least=0.0):
        """Ours equals theirs, where `mask` counts if there is one; `at_least` widens the file's own tolerance."""
        ours, theirs = (
            x.detach() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64) for x in (ours, theirs)
        )
        if mask is not None:
            ours, theirs = ours[mask], theirs[mask]
        bound = max(tolerance, at_least)
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound, check_dtype=False, equal_nan=True)

    return SimpleNamespace(inputs=inputs, outputs=outputs, close=close, dtype=dtype)


def tensors(x, dtype):
    """The same content with lists of floats as `dtype`, of integers as int64 and of booleans as bool tensors."""
    if isinstance(x, dict):
        return {key: tensors(value, dtype) for key, value in x.items()}
    if not isinstance(x, list):
        return x
    try:
        tensor = torch.tensor(x, dtype=torch.float64)
    except (ValueError, TypeError):  # ragged, or text
        return [tensors(item, dtype) for item in x]
    kinds = {type(leaf) for leaf in leaves(x)}
    return tensor.to(dtype if float in kinds else torch.bool if kinds == {bool} else torch.int64)


def leaves(x):
    return (leaf for item in x for leaf in leaves(item)) if isinstance(x, list) else [x]


def gradient(loss, *inputs):
    """d loss / d inputs, zeros where the loss does not depend on them."""
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]
