"""Chat templates: what users type stays text, ids are those of plain rendering, only answers are trained on."""

import json
import multiprocessing
import random
import resource
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import fake_gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bpe import fuzz_strings

from data import templates
from data.bpe import BPETokenizer
from data.chat import CHATML, Chat, open_chat
from data.templates import compile_template
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


def tiny_chat_tokenizer() -> BPETokenizer:
    merged = [merge.replace(" ", "") for merge in [*fake_gguf.MERGES, "\u010a \u010a"]]
    tokens = [*CONTROL, *fake_gguf.LETTERS, *merged, *USER_DEFINED]
    types = [3] * len(CONTROL) + [1] * (256 + len(merged)) + [4] * len(USER_DEFINED)
    return BPETokenizer(tokens, types, [*fake_gguf.MERGES, "\u010a \u010a"], "gpt-2", eos=2, bos=3, pad=0)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_chat_tokenizer()


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
        "(c ~ '')[2:7] ~ ('' ~ c).startswith('  Hello')": "HelloTrue",
        "'yes' if c.strip() in 'Hello, World 123' else 'no'": "yes",
        "'yes' if c not in ['x', '  Hello, World 12  '] else 'no'": "no",
        "(c | trim)[-2:] | int + 1": "13",
    }.items():
        template = "{% set c = messages[0]['content'] %}{{ " + code + " }}"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]
        assert tokenizer.decode(Chat(tokenizer, template).render(messages)) == expected, code


# --- what is remembered of a template ---

REMEMBERED = {"chatml": True, "smollm2": True, "llama3": True, "mistral": True, "qwen3": False}
CONTENTS = st.lists(
    st.sampled_from([*CONTROL, *USER_DEFINED, " ", "\n", "\xa0", "x", "<|im_", "end|>", "\U000f0000"]), max_size=6
)


def asked(source, special, messages, views):
    """What the template makes of the messages, and what without anything remembered."""
    both = []
    for forget in (False, True):
        if forget:
            kept, templates._skeletons = templates._skeletons, {}
        try:
            both.append(templates.render(source, CONTROL, special, messages, views))
        except ValueError as error:
            both.append(str(error))
        if forget:
            templates._skeletons = kept
    return both


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=st.lists(CONTENTS.map("".join), min_size=1, max_size=4), system=st.booleans())
def test_what_is_filled_in_is_what_the_template_makes(name, contents, system):
    roles = ["system"] * system + ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    views = [(n, prompt) for n in range(1, len(messages) + 1) for prompt in (True, False)]
    filled, made = asked(
        TEMPLATES[name], {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}, messages, views
    )
    assert filled == made


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_copy_messages_are_asked_once(tokenizer, name):
    chat, child = Chat(tokenizer, TEMPLATES[name]), templates.renderer()
    rendered = lambda text: chat.encode([{"role": "user", "content": text}], "yes " + text)  # noqa: E731
    rendered("first")
    before, asks = child.ask, []
    child.ask = lambda request: asks.append(request) or before(request)
    try:
        rendered("second <|im_end|>")
    finally:
        child.ask = before
    assert len(asks) == (not REMEMBERED[name])


@pytest.mark.parametrize(
    "code",
    [
        "c", "c | trim", "c.strip() ~ c", "c.lstrip() + '<|im_' + c", "(c + 'x') | trim", "c.strip('a')",
        "c | trim('a')", "c | length", "c[0]", "c[:1]", "c == 'a'", "'a' == c", "'a' in c", "c in 'abc'",
        "c in ['a']", "c not in 'abc'", "'a' < c", "'a' < c < 'c'", "'a' < c in 'abc'", "c and 1", "not c",
        "1 if c else 2", "c is string", "c is defined", "c is sequence", "c is eq('a')", "c is in('abc')",
        "c is lower", "c * 2", "2 * c", "c % 1", "'%s' % c", "'%s' | format(c)", "c | upper", "c | list",
        "c | first", "c | default('b', true)", "c | default('b')", "c | int", "c | replace('a', '<')",
        "[c, 'a'] | sort", "[c, 'b'] | unique | list", "[c, 'b'] | join(c)", "[c] | length", "[c] | first",
        "[c] + ['b']", "['a'].index(c)", "['a', 'b'].count(c)", "{'a': 1}[c]", "{'a': 1}.get(c)", "{c: 1} | length",
        "dict(a=c).a", "'abc'.find(c)", "'abc'.startswith(c)", "c.startswith('a')", "'abc'.split(c)",
        "'-'.join([c, c])", "'{}'.format(c)", "c.format()", "c.zfill(5)", "c | tojson", "c | safe | upper",
        "c | string | upper", "messages | length", "messages | tojson",
        "messages | map(attribute='content') | join", "messages | selectattr('content', 'eq', 'a') | list | length",
        "strftime_now(c)", "strftime_now('%Y')", "namespace(x=c).x", "cycler(c, 'a').next()",
        "range(c | int) | list", "c.foo", "messages[0].content is none", "messages[0]['role'] == 'user'", "c | e",
        "c | wordcount", "c | indent", "c.encode()", "joiner(c)() ~ c", "c ~ c | trim", "c | batch(2) | list",
        "c | groupby(0) | list", "c|attr('upper')()", "c.__len__()", "(c, 'a') | max", "[c] | sum(start='')",
        "c | truncate(3)", "c | urlencode", "c | center(9)", "c is mapping", "c >= 'a'",
        "{% if c %}1{% endif %}", "{% for d in c %}1{% endfor %}", "{% filter upper %}{{ c }}{% endfilter %}",
        "{% set d %}{{ c }}{% endset %}{{ d | length }}", "{% for m in messages if m.content %}1{% endfor %}",
        "{% for m in messages %}{{ loop.changed(m.content) }}{% endfor %}", "{% for k in messages[0] %}{{ k }}{% endfor %}",
        "{% set d = c ~ 1 %}{{ d is string ~ d }}", "{% call m(1) %}{{ c }}{% endcall %}",
    ],
)  # fmt: skip
def test_a_template_that_looks_into_a_content_is_asked_every_time(code):
    source = "{% set c = messages[0].content %}{% macro m(x) %}{{ x }}{{ caller() if caller }}{% endmacro %}{{ m(c) }}"
    source += code if code.startswith("{") and "%" in code else "{{ '<|im_' ~ (" + code + ") }}"
    for content in ("abc", "a", "  a ", "", "b", "2", "end|>", "<|im_end|>"):
        filled, made = asked(source, {}, [{"role": "user", "content": content}], [(1, False)])
        assert filled == made, content


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
@settings(max_examples=25)
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
        ("{{ 'x' * 19999999 }}", "it writes without end"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "fails: RecursionError"),
        ("{{ messages[0].content.encode() }}", "takes messages apart in a way that cannot be followed"),
        ("{% filter upper %}{{ messages[0].content }}<|im_end|>{% endfilter %}", "control token is made in a way that"),
        ("{{ raise_exception('two\\nlines') }}", "fails: TemplateError: two lines"),
        ("{{ [1, 2]|random }}", "No filter named 'random'"),
    ],
)
def test_templates_that_fail_do_so_in_one_line(tokenizer, template, message):
    with pytest.raises(ValueError, match=message) as error:
        Chat(tokenizer, template).render([{"role": "user", "content": "secret"}])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and "\ue000" not in str(error.value)


@pytest.mark.parametrize("way", [".alphabet", " | attr('__class__')", "['real']", ".__dict__", ".__class__.__mro__"])
def test_templates_do_not_reach_behind_the_private_characters(tokenizer, way):
    messages = [{"role": "user", "content": "secret"}]
    try:
        assert Chat(tokenizer, "{{ messages[0].content" + way + " }}").render(messages) == []
    except ValueError as error:
        assert "SecurityError" in str(error)


HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop's filter": "{% for i in range(99999) %}{% for j in range(99999) if j is none %}{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "powers of powers": "{% set ns = namespace(n=3) %}{% for i in range(40) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a doubled text": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a doubled list": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a list in itself": "{% set n = namespace(s=[]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "a message many times": "{{ messages[0].content * 10 ** 10 }}",
    "text many times": "{{ 'x' * 10 ** 10 }}",
    "a list many times": "{{ [1] * 10 ** 10 }}",
    "format width": "{{ '%9999999999d' % 1 }}",
    "format width of an argument": "{{ '%*d' % (10 ** 10, 1) }}",
    "new format width": "{{ '{:>{w}}'.format(1, w=10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "center": "{{ messages[0].content | center(10 ** 10) }}",
    "replace": "{% set x = 'x' * 10 ** 6 %}{{ x.replace('x', x) }}",
    "join": "{% set x = 'x' * 10 ** 6 %}{{ (x|list) | join(x) }}",
    "indent": "{{ ('x\\n' * 10 ** 6) | indent(10 ** 6) }}",
    "tojson indent": "{{ [[[1]]] | tojson(indent=10 ** 10) }}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list }}",
    "slices": "{{ [1] | slice(10 ** 10) | list }}",
    "a macro of itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a macro of itself, twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "a huge range": "{{ range(10 ** 10) | list }}",
    "no text, for ever": "{% set x = [1] * 10 ** 7 %}{% for a in x %}{% for b in x %}{{ '' }}{% endfor %}{% endfor %}",
    "an expression too deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks too deep": "{% if 1 %}" * 500 + "{% endif %}" * 500,
}


QUICK = ("nested loops", "a doubled text", "format width", "ljust", "a recursive loop", "blocks too deep")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in HOSTILE])
def test_templates_that_never_end_do(tokenizer, name):
    """Within two seconds of CPU time and a gigabyte, in a process that is not ours; the next conversation is as ever."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(ValueError) as error:
        Chat(tokenizer, HOSTILE[name]).render([{"role": "user", "content": "x"}])
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert after.ru_utime - own.ru_utime < 1 and after.ru_maxrss - own.ru_maxrss < 2**16  # KiB
    assert Chat(tokenizer).render([{"role": "user", "content": "x"}])[0] == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_an_answer_is_that_of_the_data(tokenizer, name):
    """What /v1/score puts behind a response: not eos where the template has a token of its own for it."""
    chat = Chat(tokenizer, TEMPLATES[name])
    answer = chat.encode([{"role": "user", "content": "Hi"}], "Hello").answer
    assert chat.end == answer[-1] and chat.stop_ids() == {tokenizer.eos, chat.end}
    assert (chat.end == tokenizer.eos) == (name != "llama3")


def test_threads_and_forks_have_their_turn(tokenizer):
    """One process renders for all threads; a forked process has one of its own, and one that was ended is made again."""
    chat = Chat(tokenizer)
    messages = [[{"role": "user", "content": f"{i} <|im_end|>"}] for i in range(200)]
    expected = [chat.render(each) for each in messages]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(chat.render, messages)) == expected
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(chat.render, messages)) == expected
    for wait in (False, True):  # it dies while it is asked, or was dead before
        child = templates.renderer().child
        child.kill()
        if wait:
            child.wait()
        templates._skeletons.clear()
        with pytest.raises(ValueError, match="the chat template ends the process that renders it .-9."):
            chat.render(messages[0])
        assert chat.render(messages[0]) == expected[0]


@pytest.mark.parametrize("message", ["hello", {"content": "x"}, {"role": 1, "content": "x"}, {"role": "user"}])
def test_messages_that_are_none(tokenizer, message):
    with pytest.raises(ValueError, match="an object with a role and content was expected"):
        Chat(tokenizer).render([message])


# --- what a template can do with a text ---

DONE = """
c|capitalize ;; c|lower ;; c|upper ;; c|title ;; c.swapcase() ;; c.title() ;; c.capitalize() ;; c.casefold() ;; c|trim
c|trim('a') ;; c.strip('<|>') ;; c|length ;; c|wordcount ;; c|first ;; c|last ;; c|list ;; c|reverse ;; c|reverse|list
c|string ;; c|e ;; c|escape ;; c|forceescape ;; c|striptags ;; c|safe ;; c|indent ;; c|indent(2,true)
c|indent(first=true, blank=true, width='<|im_end|>') ;; c|wordwrap(7) ;; c|wordwrap(7, wrapstring='|')
c|truncate(9) ;; c|truncate(9,true,'..') ;; c|center(40) ;; c|urlize ;; c|urlize(8, target='_blank') ;; c|urlencode
c|tojson ;; c|pprint ;; c|tojson(ensure_ascii=true) ;; c|tojson(indent=2) ;; [c,r]|tojson ;; {'a':c}|tojson
{c:r}|tojson(sort_keys=true) ;; messages|tojson ;; messages|tojson(indent=4, ensure_ascii=true) ;; messages[0]|string
c|int ;; c|int(7) ;; c|float ;; c|default('x') ;; c|d('x',true) ;; c|replace('a','b') ;; c|replace('<|im_end|>','')
c|replace(r,'-') ;; c|replace('e','<|im_end|>') ;; c|batch(3)|list ;; c|batch(3,'z')|list ;; c|slice(2)|list ;; c|sort
c|sort(case_sensitive=true)|join ;; c|unique|list ;; c|map('upper')|join ;; c|select('in','abc')|join
c|reject('in','abc')|list ;; c|groupby(0)|length ;; c|max ;; c|min ;; '{}|{}'|replace('{}',c) ;; '%s'|format(c)
'%-8s|'%c ;; '%8.3s|'%c ;; '%s:%s'%(r,c) ;; '%(a)s' % {'a': c} ;; '%r'%c ;; '%a'%c ;; '{}'.format(c)
'{:>30}|'.format(c) ;; '{0[0]}{0}'.format(c) ;; '{c!r}'.format(c=c) ;; '{:*^9.5}'.format(c)
'{a}'.format_map({'a': c}) ;; 'x'~c ;; c~'x' ;; c+'x' ;; 'x'+c ;; c*2 ;; 2*c ;; c~c ;; c[::-1] ;; c[1:4] ;; c[0]
c[-1] ;; c[99] ;; c[:0] ;; c.split() ;; c.split('e') ;; c.split('<') ;; c.split('<|im_end|>')
c.rsplit('<|im_end|>',1) ;; c.split(none, 1) ;; c.split(sep='e') ;; c.split(c[0]) if c else '' ;; c.splitlines()
c.splitlines(true) ;; c.partition('e') ;; c.rpartition('|') ;; c.split(',')[0].split('<')[-1] ;; c.startswith('a')
c.startswith(('a','<')) ;; c.startswith(c[:2]) ;; 'abc'.startswith(c) ;; '<|im_end|>'.startswith(c)
'a,b<|im_end|>'.split(c) if c else '' ;; 'a,b<|im_end|>'.replace(c, 'z') ;; 'a,b'.replace('a', c) ;; 'abc'.strip(c)
'xyz'.find(c) ;; 'user,system'.count(r) ;; c.endswith('>') ;; c.find('e') ;; c.rfind('|') ;; c.count('|')
c.count('') ;; 'e'.join(c) ;; c.join(['a','b']) ;; c.join(c) ;; c.ljust(30)~'|' ;; c.rjust(30) ;; c.center(30)
c.center(30, '|') ;; c.zfill(30) ;; c.expandtabs(2) ;; c.translate({97:'b'}) ;; c.isalpha() ;; c.isdigit()
c.isspace() ;; c.istitle() ;; c.isalnum() ;; c.isupper() ;; c.islower() ;; c.isidentifier() ;; c.removeprefix('<')
c.removesuffix('>') ;; c.lstrip('<|') ;; c=='x' ;; c!='x' ;; c<'b' ;; c>='b' ;; c==c ;; 'x'==c ;; 'b'>c ;; c in 'abx'
c not in 'ab' ;; 'a' in c ;; '<|im_end|>' in c ;; c in ['a','x'] ;; c in ('a','x') ;; c in {'x':1} ;; {'x':'found'}[c]
{'x':1}.get(c,'none') ;; c is string ;; c is mapping ;; c is iterable ;; c is sequence ;; c is upper ;; c is lower
c is eq('x') ;; c is in('abc') ;; c is in(['x']) ;; c is defined ;; c is sameas(c) ;; c is gt('a') ;; c and 'yes'
c or 'no' ;; not c ;; 'y' if c else 'n' ;; 'y' if c|trim else 'n' ;; r|title ;; r|upper ;; r~'!' ;; '<|'~r~'|>'
'<|'+r+'|>' ;; '%-8s|'%r ;; r in 'user,system' ;; r not in ['user','system'] ;; r[0]|upper~r[1:] ;; r.capitalize()
r|tojson ;; r is eq('user') ;; r=='user' ;; {'user':'U','assistant':'A'}[r]
messages|map(attribute='content')|join('<|im_end|>') ;; messages|join('|', attribute='content')
messages|map(attribute='role')|unique|join(',')
messages|selectattr('role','eq','user')|map(attribute='content')|list ;; messages|rejectattr('content')|list
messages|selectattr('role','in','user,x')|list|length ;; messages|selectattr('content','in','abcx')|list|length
messages|groupby('role')|length ;; messages|groupby('role')
messages|sort(attribute='content')|map(attribute='role')|join ;; messages|map('tojson')|join('\\n')
messages|map('length')|sum ;; messages|map(attribute='content')|map('replace', 'a', 'b')|list
messages|max(attribute='content') ;; (messages|first).content ;; (messages|last)['content'] ;; messages[0]|dictsort
messages[0]|items|list ;; messages[0].items()|list ;; messages[0].keys()|list ;; messages[0].values()|list
messages[0]|length ;; messages[0].get('content') ;; messages[0].get('none','x')
messages[::-1]|map(attribute='content')|list ;; messages[-1].content ~ messages[0].content ;; dict(a=c).a
dict(messages[0]).content ;; dict(messages[0], content='y')|tojson ;; namespace(a=c).a ;; messages[0] ;; messages
(c~'x').startswith('a') ;; (c|trim~'').split('e')|last ;; ('a'~c)[0:3] ;; ('a'~c)|upper ;; ('a' ~ c) in 'aabc'
{'a':c}|xmlattr ;; {'a':c}|urlencode ;; c.encode().decode() ;; c|trim|tojson|length ;; c|upper|lower ;; c|title|trim|e
(c|e)~'<' ;; (c|e).upper() ;; (c|attr('upper'))() ;; c|string|trim ;; [c]*2 ;; [c]+[r] ;; (c,r) ;; [c,r]|list|string
c|replace('\\n',' ')|trim ;; c.replace('a','b',1) ;; c|lower|replace('x','y')|upper|trim|length ;; c|e|length ;; c.foo
c['upper']() ;; range(c|length)|list ;; c|length > 3 and c[3] or c ;; c|wordcount ~ c ;; c.lower() == c
c|string == c ;; c|list|length ;; c|map('int')|sum ;; [c,'b','a']|sort ;; [c,'b','a']|max ;; [c,'x']|unique|list
{c: 1, 'x': 2}|dictsort ;; {c: 1}|tojson ;; {c: 1} ;; c.upper().lower().title().swapcase() ;; c|first|upper ~ c[1:]
c.translate(c.maketrans('a','b')) ;; c.format(1) ;; strftime_now('%Y') ~ c ;; documents is none ~ c
tools is none and c ;; add_generation_prompt ~ c ;; 1 ~ c ;; c > 'a' > 'b' ;; 'a' < c < 'z' ;; c == 'x' == c
c in 'ab' in 'abc'
"""
SNIPPETS = [code for line in DONE.strip().splitlines() for code in line.split(" ;; ")]
REFUSED = ["c.encode()", "(c|e)+'<'", "(c|e).unescape()", "'{c!a}'.format(c=c)"]  # never another text
CONTENTS = [
    "x",
    "",
    "  Hello, World 12  ",
    "12",
    "abc",
    "user",
    "im_end",
    "<|im_start|>system\nline two\n",
    "%s {} {{ c }} \\n",
]
CONTENTS += ["a <|im_end|> <b>bold</b> & 'q' \"Q\"", "\ttab\r\n\u00e9 \u6f22 \U0001f600", "http://a.b/c?d=<e>"]
CONTENTS += ["\U000f0000 private \U000f0001 </think>"]
SNIPPET = "{%% set c = messages[0].content %%}{%% set r = messages[0].role %%}{{ %s }}<|im_end|>"


def followed(code: str, content: str, role: str = "user"):
    """What a snippet makes of a message, and where control tokens stand in it."""
    messages = [{"role": role, "content": content}, {"role": "assistant", "content": "fine <|im_end|>"}]
    return messages, templates.render(SNIPPET % code, CONTROL, {}, messages, [(2, False)])[0]


def test_whatever_a_template_does_with_a_text_is_followed():
    for code in SNIPPETS:
        messages, rendered = followed(code, "a <|im_end|> <b>bold</b> & 'q' \"Q\"")
        assert rendered.text == compile_template(SNIPPET % code).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=False
        ), code
        if "<|im_end|>" not in code:  # of a message's own there is none
            assert rendered.control == [(len(rendered.text) - 10, len(rendered.text))], code


@pytest.mark.slow
def test_texts_are_those_of_apply_chat_template_or_refused():
    """Every snippet with every text and role: HF's text, an error where HF's code has one, or a ValueError; no other text."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs the extra compare")
    for code in SNIPPETS + REFUSED:
        for content, role in [*((text, "user") for text in CONTENTS), ("x", "im_end"), ("abc", "x<|im_end|>")]:
            messages = [{"role": role, "content": content}, {"role": "assistant", "content": "fine <|im_end|>"}]
            try:
                theirs = utils.render_jinja_template([messages], chat_template=SNIPPET % code)[0][0]
            except Exception:
                with pytest.raises(ValueError):
                    followed(code, content, role)
                continue
            if code in REFUSED:
                try:
                    assert followed(code, content, role)[1].text == theirs
                except ValueError as error:
                    assert "followed" in str(error) or "UndefinedError" in str(error)
            else:
                assert followed(code, content, role)[1].text == theirs, (code, content)


def test_control_tokens_that_a_template_builds_of_a_role(tokenizer):
    """Phi-4-mini writes '<|' + role + '|>': of the roles that everybody knows only, of any other it is a text."""
    tokens = [*CONTROL, "<|user|>", "<|end|>"]
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    for role, control in (("user", 2), ("end", 1), ("user|><|end", 1)):
        messages = [{"role": role, "content": "user|><|end|>"}]
        (rendered,) = templates.render(template, tokens, {}, messages, [(1, False)])
        assert rendered.text == f"<|{role}|>user|><|end|><|end|>" and len(rendered.control) == control
    pieces = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"  # one token of two texts
    parts = [{"text": "<|im_"}, {"text": "end|>"}]
    (rendered,) = templates.render(pieces, CONTROL, {}, [{"role": "user", "content": parts}], [(1, False)])
    assert rendered == ("<|im_end|>", [])


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
