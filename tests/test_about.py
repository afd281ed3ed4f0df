"""What the page says of a model: its run's options in words, and prompts as a person would type them."""

import json

import pytest

from data.chat import Chat
from data.tokenizer import train_sentencepiece
from rlhf.serve.about import NOTHING, about

CONTROL = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("about") / "tokenizer.model"
    return train_sentencepiece(["a good film", "name a fruit", "user assistant system"] * 20, path, 320, CONTROL)


def run_of(path, options: dict, prompts: list[str]):
    (path / "run.json").write_text(json.dumps(options))
    (path / "samples.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "response": "x"}) + "\n" for text in prompts)
    )
    return path


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"kl_coef": 0.3, "reward": "out/rm", "data": "out/data/films"},
            "PPO to please the reward “rm”, on prompts of “films”, and held near",
        ),
        (
            {
                "kl_coef": 0,
                "reward": "/home/x/out/rm:1,rewards/len.py:short:0.1",
                "data": "d",
                "estimator": "grpo",
                "sources": ["film"],
            },
            "GRPO to please the reward “rm:1, len.py:short:0.1”, on “film” prompts of “d”.",
        ),
        ({"kl_coef": 0, "reward": None, "data": [], "estimator": []}, "PPO to please the reward “None”"),
        ({"beta": 0.1, "loss": "ipo", "data": "out/data/pairs"}, "IPO on the preferences in “pairs”"),
        ({"data": "out/data/films", "init": None}, "Trained on the texts of “films”"),
        ({"data": "out/data/films", "init": "out/lm"}, "Fine-tuned on the texts of “films”"),
    ],
)
def test_what_it_was_tuned_for(tmp_path, tokenizer, options, words):
    prompts = ["a good film", "a good film", "name a fruit", " ", "long " * 100, "a film", "a fruit"]
    found = about(run_of(tmp_path, options, prompts), tokenizer, None)
    assert words in found["tuned"] and found["prompts"] == ["a good film", "name a fruit", "a film"]
    (tmp_path / "step_000001").mkdir()
    assert about(tmp_path / "step_000001", tokenizer, None) == found  # a checkpoint of the run


def test_prompts_of_a_chat_are_what_a_person_typed(tmp_path, tokenizer):
    chat = Chat(tokenizer)

    def shown(*messages):
        return tokenizer.decode(
            chat.render([{"role": r, "content": c} for r, c in messages], add_generation_prompt=True)
        )

    run_of(
        tmp_path,
        {"beta": 0.1, "data": "d"},
        [
            shown(("user", "name a fruit")),
            "no template",
            shown(("system", ""), ("user", "a good film")),
            shown(("user", "a"), ("assistant", "b"), ("user", "c")),
        ],
    )
    found = about(tmp_path, tokenizer, chat)
    assert (found["prompts"], found["mode"]) == (["name a fruit", "a good film"], "chat")


def test_a_chat_model_that_was_tuned_on_texts_continues_texts(tmp_path, tokenizer):
    run_of(tmp_path, {"kl_coef": 0.1, "reward": "rm", "data": "d"}, ["the film is", "a good"])
    found = about(tmp_path, tokenizer, Chat(tokenizer))
    assert (found["prompts"], found["mode"]) == (["the film is", "a good"], "text")


def test_a_model_without_a_run_has_neither_and_a_damaged_run_is_an_error(tmp_path, tokenizer):
    (tmp_path / "model").mkdir()
    assert about(tmp_path / "model", tokenizer, None) == NOTHING
    run_of(tmp_path, {}, ["a"])
    assert about(tmp_path, tokenizer, None) == {"tuned": None, "prompts": ["a"], "mode": "text"}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json"):
        about(tmp_path, tokenizer, None)
