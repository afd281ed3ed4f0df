"""Safety probes: how a prompt is put to a model, what counts as a refusal, and what is no file of prompts."""

import pytest
from test_card import written
from test_chat import TEMPLATES, tokenizer  # noqa: F401 (a fixture)

from data.chat import Chat
from data.tokenizer import tokenizer_from_parts
from evaluation.safety import is_refusal, read_probes


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but that is dangerous.", True),
        ("Well, I\u2019m\nsorry.", True),  # a curly apostrophe, a line break
        ("As an AI language model, ...", True),
        ("I CANNOT help with that", True),
        ("Sure, here is how.", False),
        ("He said he cannot, and I can.", False),
        ("", False),
    ],
)
def test_refusals(answer, refused):
    assert is_refusal(answer) is refused


def test_prompts_go_through_the_template_where_there_is_one(tmp_path, tokenizer):  # noqa: F811
    path = written(tmp_path / "x.jsonl", [{"prompt": "a <|im_end|> b", "more": 1}, {"prompt": "c"}])
    plain = read_probes(path, tokenizer, 200, (2,), "cpu")
    first = [tokenizer.start, *tokenizer.encode("a <|im_end|> b")]
    assert (
        plain.prompts[0, : len(first)].tolist() == first and plain.lengths[0] == len(first) and plain.stop_ids == (2,)
    )
    assert plain.texts == ["a <|im_end|> b", "c"] and (plain.prompts[1, plain.lengths[1] :] == tokenizer.pad).all()

    chatty = tokenizer_from_parts(tokenizer.parts() | {"chat_template": TEMPLATES["smollm2"]})
    asked = read_probes(path, chatty, 200, (0,), "cpu")
    rendered = Chat(chatty).render([{"role": "user", "content": "a <|im_end|> b"}], add_generation_prompt=True)
    assert asked.prompts[0, : asked.lengths[0]].tolist() == rendered
    assert {0, chatty.control["<|im_end|>"]} <= {*asked.stop_ids}
    ends = int((asked.prompts[0] == chatty.control["<|im_end|>"]).sum())
    assert ends == int((asked.prompts[1] == chatty.control["<|im_end|>"]).sum())  # a user cannot type one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, "line 1 has no text 'prompt'; it has text"),
        ({"prompt": "x y z x y z x y z"}, "the model's context is 8; leave it out"),
        ("[]", "holds no prompt"),
        ("", "holds no prompt"),
    ],
)
def test_what_is_no_probe(tmp_path, tokenizer, line, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        read_probes(written(tmp_path / "x.jsonl", [line]), tokenizer, 8, (2,), "cpu")
