"""Chat templates: what users type stays text, ids are those of plain rendering, only answers are trained on."""

import json
import random

import fake_gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bpe import fuzz_strings

from data.bpe import BPETokenizer
from data.chat import CHATML, Chat, compile_template, open_chat
from data.tokenizer import train_sentencepiece, write_hf

CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
CONTROL += ["<|eot_id|>", "[INST]", "[/INST]"]
USER_DEFINED = ["<think>", "</think>"]
TEMPLATES = {  # the ideas of published ones
    "chatml": CHATML,
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "qwen3": """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string and not message.content.startswith('<tool_response>')
        and ns.found is not defined %}
        {%- set ns.last = index %}{%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and thoughts %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate, not ' + message['role'] + ' here') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}",
}


@pytest.fixture(scope="module")
def tokenizer():
    merged = [merge.replace(" ", "") for merge in [*fake_gguf.MERGES, "\u010a \u010a"]]
    tokens = [*CONTROL, *fake_gguf.LETTERS, *merged, *USER_DEFINED]
    types = [3] * len(CONTROL) + [1] * (256 + len(merged)) + [4] * len(USER_DEFINED)
    return BPETokenizer(tokens, types, [*fake_gguf.MERGES, "\u010a \u010a"], "gpt-2", eos=2, bos=3, pad=0)


def plain_ids(tokenizer, template, messages, add_generation_prompt=False):
    """What HF does: the rendered text, control tokens read wherever they stand."""
    names = {i: token for token, i in tokenizer.control.items()}
    text = compile_template(template).render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        bos_token=names[tokenizer.bos],
        eos_token=names[tokenizer.eos],
    )
    return Chat(tokenizer, "{{ " + json.dumps(text, ensure_ascii=False) + " }}").render([])


def conversation(rng, turns, texts):
    roles = ["user", "assistant"] * turns
    return [{"role": role, "content": rng.choice(texts)} for role in roles[: rng.randrange(1, 2 * turns)]]


def harmless(text: str) -> bool:
    return not any(token in text for token in CONTROL)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_of_plain_rendering(tokenizer, name):
    texts = [text for text in fuzz_strings(400) if harmless(text)]
    texts += [
        "\n\nhi \n",
        "  ",
        "",
        "<think>\nwell\n</think>\n\nyes",
        "a</think>b</think>\n",
        "<tool_response>",
        "{{ 1 }}",
        "%s{}",
    ]
    chat, rng = Chat(tokenizer, TEMPLATES[name]), random.Random(0)
    for _ in range(60):
        messages = conversation(rng, 3, texts)
        for prompt in (False, True):
            assert chat.render(messages, prompt) == plain_ids(tokenizer, TEMPLATES[name], messages, prompt), messages


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    contents=st.lists(
        st.lists(st.sampled_from([*CONTROL, *USER_DEFINED, "\n", " ", "assistant", "<|", "im_end|>", "x"]), max_size=5),
        min_size=1,
        max_size=3,
    )
)
def test_what_users_type_never_becomes_a_control_token(tokenizer, name, contents):
    """The control tokens are those of the same conversation about something else."""
    chat, roles = Chat(tokenizer, TEMPLATES[name]), ["user", "assistant", "user"]
    messages = [{"role": role, "content": "".join(parts)} for role, parts in zip(roles, contents)]
    innocent = [{"role": role, "content": "x"} for role, _ in zip(roles, contents)]
    control = set(tokenizer.control.values())
    ids = chat.render(messages, True)
    assert [i for i in ids if i in control] == [i for i in chat.render(innocent, True) if i in control]
    shown = tokenizer.decode(ids)
    if name != "qwen3":  # which drops thoughts
        assert all(message["content"].strip() in shown for message in messages)


def test_roles_and_any_other_text_are_held_too(tokenizer):
    messages = [
        {"role": "user<|im_end|>", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]}
    ]
    template = "{% for m in messages %}<|im_start|>{{ m.role }}{% for part in m.content %}{% if part.type == 'text' %}"
    ids = Chat(tokenizer, template + "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}").render(messages)
    assert ids[0] == 1 and not set(ids[1:]) & set(tokenizer.control.values())
    assert tokenizer.decode(ids) == "user<|im_end|><|im_end|>"


def test_templates_see_the_text_and_not_the_mark(tokenizer):
    content = "  Hello, World 12  "
    for code, expected in {
        "c | trim | length": "15",
        "c.strip().upper()": "HELLO, WORLD 12",
        "c | upper | trim": "HELLO, WORLD 12",
        "c.split(',')[1].strip()": "World 12",
        "c.split() | join('-')": "Hello,-World-12",
        "c | replace('World', 'all') | trim": "Hello, all 12",
        "(c | trim)[:5]": "Hello",
        "(c | trim)[0] + (c | trim)[-1]": "H2",
        "c.startswith('  H'), 'World' in c, c == 'x', c != 'x', c is string": "(True, True, False, True, True)",
        "{'  Hello, World 12  ': 'found'}[c]": "found",
        "'empty' if c else 'nothing'": "empty",
        "'yes' if messages[1].content else 'no'": "no",
        "(c | trim | list)[:2] | join('|')": "H|e",
        "c.partition(',')[0].strip() ~ '!' ~ 1": "Hello!1",
        "'%s' % c.strip()": "Hello, World 12",
        "c.strip() * 2": "Hello, World 12Hello, World 12",
        "messages[0] | tojson": '{"role": "user", "content": "  Hello, World 12  "}',
    }.items():
        template = "{% set c = messages[0]['content'] %}{{ " + code + " }}"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]
        assert tokenizer.decode(Chat(tokenizer, template).render(messages)) == expected, code


# --- what is trained on ---


@pytest.mark.parametrize("name", TEMPLATES)
def test_segments_train_on_answers_alone(tokenizer, name):
    chat, rng = Chat(tokenizer, TEMPLATES[name]), random.Random(1)
    texts = ["first", "second answer", "the third <|im_end|>", "x\ny"]
    for _ in range(20):
        messages = conversation(rng, 3, texts)
        segments = chat.segments(messages)
        trained = [tokenizer.decode(segment.ids) for segment in segments if segment.trainable]
        assert trained == [message["content"] for message in messages if message["role"] == "assistant"]
        end = {"llama3": "<|eot_id|>"}.get(name, "<|im_end|>")
        assert all(segment.ids[-1] == tokenizer.control[end] for segment in segments if segment.trainable)
        whole = sum((segment.ids for segment in segments), [])
        assert tokenizer.decode(whole) == tokenizer.decode(chat.render(messages))
        assert whole == chat.render(messages) or name == "llama3"  # its prompts end in two newlines, see below
    assert chat.stop_ids() == {tokenizer.eos, tokenizer.control[end]}


def test_an_answer_is_encoded_as_it_is_written(tokenizer):
    """What the model reads before an answer never depends on the answer: the newlines of both do not merge."""
    chat = Chat(tokenizer, CHATML)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n\na"}]
    prompt, answer, rest = chat.segments(messages)
    assert prompt.ids == chat.render(messages[:1], True) and answer.ids == [*tokenizer.encode("\n\na"), 2]
    assert rest.ids == tokenizer.encode("\n") and (prompt.trainable, answer.trainable, rest.trainable) == (0, 1, 0)
    assert [*prompt.ids, *answer.ids, *rest.ids] != chat.render(messages)


def test_answers_that_change_later_are_not_trained_on(tokenizer):
    """Qwen3 shows the thoughts of the last turn alone, so earlier ones are not what the model will ever read."""
    chat = Chat(tokenizer, TEMPLATES["qwen3"])
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    messages = [{"role": "user", "content": "a"}, thought, {"role": "user", "content": "b"}, thought]
    trained = [tokenizer.decode(segment.ids) for segment in chat.segments(messages) if segment.trainable]
    assert trained == ["<think>\nhm\n</think>\n\nyes"]
    plain = [messages[0], {"role": "assistant", "content": "no"}, *messages[2:]]
    assert sum(segment.trainable for segment in chat.segments(plain)) == 2


@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
def test_prompt_and_answer_as_a_policy_reads_and_writes_them(tokenizer, name, data):
    """The prompt knows nothing of the answer, the answer is its text and the token that ends it, forged tokens or not."""
    texts = st.lists(st.sampled_from([*CONTROL, "\n", " ", "yes", "no", "!!", "<|im_"]), min_size=1, max_size=4).map(
        "".join
    )
    chat = Chat(tokenizer, TEMPLATES[name])
    roles = ["user", "assistant"] * data.draw(st.integers(0, 2)) + ["user"]
    history = [{"role": role, "content": data.draw(texts)} for role in roles]
    answer = data.draw(texts)
    encoded = chat.encode(history, answer)
    assert encoded.prompt == chat.encode(history).prompt and chat.encode(history).answer == []
    assert len(encoded.trained) == len(encoded.prompt) + len(encoded.answer)
    assert tokenizer.decode(encoded.prompt) == tokenizer.decode(chat.render(history, True))
    if len(history) == 1:
        assert encoded.prompt == chat.render(history, True)
    shown = (
        answer.strip()
        if name == "llama3"
        else answer.lstrip("\n")
        if name == "qwen3" and "</think>" in answer
        else answer
    )
    assert encoded.answer[-1] in chat.stop_ids() and encoded.answer[:-1] == tokenizer.encode(shown)
    assert all(encoded.trained[len(encoded.prompt) :])
    ids = [*encoded.prompt, *encoded.answer]
    own = tokenizer.decode(i for i, trained in zip(ids, encoded.trained) if trained)
    said = [message["content"] for message in [*history, {"role": "assistant", "content": answer}]][1::2]
    assert own == "".join(text.strip() if name == "llama3" else text for text in said)


def test_an_answer_that_the_template_hides_is_refused(tokenizer):
    for template in (
        "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
        "{{ messages|length }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    ):
        with pytest.raises(ValueError, match="does not show the answer 'yes' as what follows its prompt"):
            Chat(tokenizer, template).encode([{"role": "user", "content": "really?"}], "yes")


def test_the_template_that_an_option_names(tokenizer, tmp_path):
    user = [{"role": "user", "content": "q"}]
    assert open_chat(tokenizer, "none") is None and open_chat(tokenizer).source == CHATML
    file = tmp_path / "t.jinja"
    file.write_text(TEMPLATES["llama3"])
    chat = open_chat(tokenizer, str(file), system="Be brief.")
    assert chat.sha256 == Chat(tokenizer, TEMPLATES["llama3"]).sha256 != open_chat(tokenizer).sha256
    system = [{"role": "system", "content": "Be brief."}]
    assert chat.render(user, True) == Chat(tokenizer, TEMPLATES["llama3"]).render(system + user, True)
    assert chat.encode(user, "a").prompt == chat.render(user, True) == chat.render(system + user, True)
    other = [{"role": "system", "content": "Be long."}, *user]
    assert "brief" not in tokenizer.decode(chat.render(other))  # a conversation's own goes first
    with pytest.raises(ValueError, match="is neither auto, none nor a readable file"):
        open_chat(tokenizer, str(tmp_path / "none.jinja"))
    file.write_text("{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    with pytest.raises(ValueError, match="does not show the system message 'Be brief.'"):
        open_chat(tokenizer, str(file), system="Be brief.")


def test_conversations_without_answers(tokenizer):
    chat = Chat(tokenizer, CHATML)
    assert chat.segments([]) == [] and chat.render([]) == []
    (only,) = chat.segments([{"role": "user", "content": "q"}])
    assert not only.trainable and only.ids == chat.render([{"role": "user", "content": "q"}])


# --- our own models ---


def test_chatml_for_our_own_tokenizers(tmp_path):
    words = "the film was a warm and funny story of two people who never meet again".split()
    texts = [" ".join(random.Random(i).choices(words, k=12)) for i in range(200)]
    ours = train_sentencepiece(texts, tmp_path / "a.model", 330, control=["<|im_start|>", "<|im_end|>"])
    chat = Chat(ours)
    messages = [{"role": "user", "content": "the <|im_end|> film</s>"}, {"role": "assistant", "content": "was warm"}]
    ids, control = chat.render(messages), set(ours.control.values())
    start, end = ours.control["<|im_start|>"], ours.control["<|im_end|>"]
    assert [i for i in ids if i in control] == [start, end, start, end] and chat.stop_ids() == {ours.eos, end}
    (answer,) = (segment for segment in chat.segments(messages) if segment.trainable)
    assert answer.ids[-1] == end and ours.decode(answer.ids) == "was warm"
    with pytest.raises(ValueError, match="no control token <|im_start|>, which ChatML needs: a user could forge it"):
        Chat(train_sentencepiece(texts, tmp_path / "b.model", 330))


# --- templates of strangers ---


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for %}", "does not compile"),
        (["x"], "the chat template is .'x'.; a text was expected"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "fails: SecurityError"),
        ("{{ messages.append(1) }}", "fails: SecurityError"),
        ("{{ raise_exception('no ' + messages[0].role + ' here') }}", "fails: TemplateError: no user here"),
        ("{{ undefined_function() }}", "fails: UndefinedError"),
        ("{{ 'x' + messages }}", "fails: TypeError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "it writes without end"),
        ("{{ 'x' * 99999999 }}", "it writes without end"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "fails: RecursionError"),
        ("{{ (messages[0].content ~ '')[:9] }}", "takes messages apart"),
    ],
)
def test_templates_that_fail_do_so_in_one_line(tokenizer, template, message):
    with pytest.raises(ValueError, match=message) as error:
        Chat(tokenizer, template).render([{"role": "user", "content": "secret"}])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and "\ue000" not in str(error.value)


@pytest.mark.parametrize("way", ["._text", " | attr('_held')", "['_text']", ".__dict__"])
def test_templates_do_not_reach_behind_the_mark(tokenizer, way):
    messages = [{"role": "user", "content": "secret"}]
    assert Chat(tokenizer, "{{ messages[0].content" + way + " }}").render(messages) == []


@pytest.mark.parametrize("message", ["hello", {"content": "x"}, {"role": 1, "content": "x"}, {"role": "user"}])
def test_messages_that_are_none(tokenizer, message):
    with pytest.raises(ValueError, match="an object with a role and content was expected"):
        Chat(tokenizer).render([message])


# --- against HF ---


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_apply_chat_template(tokenizer, name, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install -e '.[compare]'"
    )
    tokenizer.chat_template = TEMPLATES[name]
    write_hf(tokenizer, tmp_path)
    theirs, chat, rng = transformers.AutoTokenizer.from_pretrained(tmp_path), Chat(tokenizer), random.Random(0)
    tokenizer.chat_template = None
    texts = [text for text in fuzz_strings(300) if harmless(text)] + ["\n\nhi \n", "<think>\nwell\n</think>\n\nyes"]
    for _ in range(40):
        messages = conversation(rng, 3, texts)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        assert list(ids["input_ids"] if hasattr(ids, "keys") else ids) == chat.render(messages, True)
