"""A sample of tests/faults.py, the program that breaks runs: kills, damages and signals at other places with every seed."""

import random

import pytest
from faults import Lab, prepared

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(prepared(tmp_path_factory.mktemp("faults")), random.Random(0))


def test_kills_change_nothing(lab, capsys):
    assert lab.kill(8, ("lm", "rm adapters", "dpo", "ppo branch", "ppo rloo", "ppo, 2 ranks")) == 0, (
        capsys.readouterr().out
    )


def test_no_damage_is_silent(lab, capsys):
    """Every sixth of the table."""
    assert lab.damage(75, every=6) == 0, capsys.readouterr().out


def test_a_signal_ends_every_trainer_after_its_step(lab, capsys):
    names = ("lm", "rm", "dpo", "ppo full", "dpo, 2 ranks")
    assert lab.signal(len(names), names) == 0, capsys.readouterr().out
