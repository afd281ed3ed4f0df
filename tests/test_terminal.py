"""What a person sees who sits before a terminal: the same texts as in a pipe, as they come, and keys that do what they say."""

import re
import subprocess
import sys
import unicodedata

import pytest
import torch
from terminal import terminal
from test_chat import TEMPLATES, tiny_chat_tokenizer
from tiny import ROOT

from data.tokenizer import write_hf
from model.hf import save_hf
from model.transformer import ModelConfig, Transformer
from rlhf.infra.files import read_lines


def as_shown(text: str) -> str:
    """No text may steer a terminal."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


@pytest.mark.slow
def test_a_terminal_shows_what_a_pipe_gets(world, tmp_path):
    """Ragged bytes of an untrained model, two samples of a prompt; with the keys of readline, and where Python lacks it."""
    command, env = world.command("sample.py", samples=2, tokens=40, temperature=3), world.environment()
    how = dict(input=b"The film\nThe film\n\n", capture_output=True, check=True, cwd=world.path, env=env)
    piped = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], **how)
    assert piped.stderr == b""
    _, first, second = [as_shown(turn) for turn in piped.stdout.decode().removesuffix("> ").split("> ")]
    assert "\ufffd" in first and first != second
    with terminal(command, world.path, env) as screen:
        assert screen.until("> ") == "Ctrl-C stops an answer; Ctrl-D or an empty line ends\n> "
        for keys, turn in [("The filn\x7fm\n", first), ("\x1b[A\n", second)]:
            screen.type(keys)
            screen.until("\n")  # the echo
            assert screen.until("\n> ").removesuffix("> ") == turn
        screen.type("film " * 300 + "\n")  # what a file is refused for, a person may say in other words
        assert "leaves no room in the model's context of 256\n> " in screen.until("256\n> ")
        screen.type("\x04")
        assert screen.end()[0] == 0
    (tmp_path / "readline.py").write_text("raise ImportError")
    with terminal(command, world.path, env | {"PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}"}) as screen:
        screen.until("> ")
        screen.type("The film\n")
        screen.until("\n")
        assert screen.until("\n> ").removesuffix("> ") == first
        screen.type("\n")
        assert screen.end() == (0, "\n")


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A chat model that never comes to an end by itself, for seconds."""
    tokenizer, place = tiny_chat_tokenizer(), tmp_path_factory.mktemp("talker")
    tokenizer.chat_template = TEMPLATES["smollm2"]
    shape = dict(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, context=8192)
    model = Transformer(ModelConfig(**shape))
    model.init_weights(torch.Generator().manual_seed(0))
    save_hf(place, model, eos_ids=[tokenizer.eos], pad_id=tokenizer.pad, bos_id=tokenizer.bos)
    write_hf(tokenizer, place)
    return place


def test_ctrl_c_stops_the_answer_and_not_the_talk(world, talker):
    command = world.command("sample.py", checkpoint=talker, chat="true", tokens=8000, temperature=0)
    with terminal(command, world.path, world.environment()) as screen:
        screen.until("> ")
        for said in ("Hi\n", "Go on\n"):
            screen.type(said)
            screen.until("\n")  # the echo
            assert screen.read()  # the first of the answer
            screen.type("\x03")
            assert "\nstopped\n> " in screen.until("> ")
        screen.interrupt()
        assert screen.until("> ").endswith("\nCtrl-D ends\n> ")
        screen.type("\x04")
        assert screen.end()[0] == 0


@pytest.mark.slow
def test_training_fits_the_terminal_and_changes_no_number(world, tmp_path):
    """As many columns as fit, what is good in words, samples whole; metrics.jsonl is that of a run into a file."""
    runs = {"file": tmp_path / "file", "screen": tmp_path / "screen"}
    printed = world.ok("train_ppo.py", out=runs["file"], weak_reward="true")
    assert re.search(r"^step      0   scores .* explained_var .* length ", printed, re.MULTILINE)
    command = world.command("train_ppo.py", out=runs["screen"], weak_reward="true")
    with terminal(command, world.path, world.environment(), size=(24, 50)) as screen:
        code, shown = screen.end()
    assert code == 0, shown
    shown = [line.rpartition("\r")[2] for line in shown.splitlines()]
    header = shown.index("  step     scores         kl   approxkl   clipfrac")
    assert " ".join(shown[:header]).count("healthy: scores rises; kl a few nats, below 10;") == 1
    assert [line[:6].strip() for line in shown if re.fullmatch(r" {5}\d( +\S+){4}", line)] == ["0", "1", "2", "3"]
    rows = [read_lines(run / "metrics.jsonl") for run in runs.values()]
    for one, other in zip(*rows, strict=True):
        assert {name for name in one if one[name] != other[name]} <= {
            x for x in one if x.startswith(("time/", "perf/"))
        }
