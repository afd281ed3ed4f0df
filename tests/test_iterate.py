"""The loop of rounds: with a simulated rater, with people, stopped at any point, refused promotions."""

import json
import sqlite3

import pytest
from test_bad_input import refused
from tiny import SMALL, World, lines

from rlhf.feedback import FeedbackStore


def words(script: str, leave: tuple[str, ...], **changes) -> str:
    """The small options of a script as iterate.py passes them on."""
    options = {k: v for k, v in (SMALL[script] | changes).items() if k not in leave}
    return " ".join(f"--{name}={value}" for name, value in options.items())


OURS = ("init", "data", "out", "reward", "base", "tuned", "response_tokens", "prompt_tokens", "judge")
LOOP = {
    "init": "lm", "data": "data", "out": "rounds", "rounds": 2, "pairs": 40, "response_tokens": 8, "domain": "none",
    "rater": "rewards.py:shorter", "judge": "rewards.py:shorter", "seed": 3,
    "rm": words("train_rm.py", OURS), "ppo": words("train_ppo.py", OURS, iterations=2, weak_reward="true"),
    "evaluate": words("evaluate.py", OURS, prompts=12, best_of=1, human_texts=8),
}  # fmt: skip


def loop(**changes) -> list[str]:
    options = {name: value for name, value in (LOOP | changes).items() if value is not None}
    return ["iterate.py", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def finished(world):
    """Two rounds, by the real commands."""
    done = world.spawn(loop())
    assert done.code == 0, done
    return world.path / "rounds", done.out


def test_two_rounds(finished):
    out, said = finished
    page = json.loads((out / "rounds.json").read_text())
    print(said)
    print((out / "rounds.md").read_text())
    assert len(page["rounds"]) == 2
