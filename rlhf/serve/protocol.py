"""OpenAI's requests, checked and taken apart; answers are in answers.py. Nothing here touches a model or a socket.

platform.openai.com/docs/api-reference: chat, completions, models. Fields that nobody knows are ignored, as clients
expect; fields that we or other servers know and that we cannot honour are an error, never silently without effect.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.chat import Chat
from data.tokenizer import Tokenizer
from model.steering import Steering
from rlhf.serve.grammar import Grammar
from rlhf.serve.scheduler import Request, Sampling, TextStream, Token

MOST_STOPS, MOST_STOP_IDS, MOST_ALTERNATIVES = 4, 1024, 20
LOGPROBS = ("raw_logprobs", "processed_logprobs")  # of the model, and of what is sampled from: vLLM's names
MOST_LOGPROBS = 2**20  # that one request may ask for, some hundred bytes each
MOST_BIASES, MOST_INPUTS = 1024, 2048
COLDEST, HOTTEST = 1e-30, 100.0  # temperatures: colder ones than the first are taken as it, or logits would overflow
SMALLEST_TOP_P = 1e-9  # what 0 means: the likeliest token alone
UNSUPPORTED = {  # known fields that would change the answer, and the values at which they do not; null never does
    # OpenAI's
    **dict.fromkeys(("audio", "web_search_options"), ({},)),
    **dict.fromkeys(("tools", "functions"), ([],)),  # unless the model is told to use none, see `check_unsupported`
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("reasoning_effort", "reasoning", "thinking"), ()),
    "suffix": ("",),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    # vLLM's
    **dict.fromkeys(("min_tokens", "priority"), (0,)),
    "length_penalty": (1,),
    **dict.fromkeys(("allowed_token_ids", "bad_words", "logits_processors", "documents"), ([],)),
    **dict.fromkeys(("include_stop_str_in_output", "use_beam_search", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("truncate_prompt_tokens", "prompt_logprobs", "structured_outputs", "structural_tag"), ()),
    **dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs"), ({},)),
    "chat_template": ("",),
    # of llama.cpp, SGLang, TGI and others
    **dict.fromkeys(("repeat_penalty", "typical_p", "tfs_z"), (1,)),
    **dict.fromkeys(
        ("top_a", "mirostat", "mirostat_mode", "dynatemp_range", "xtc_probability", "dry_multiplier"), (0,)
    ),
    **dict.fromkeys(("no_repeat_ngram_size", "penalty_alpha", "epsilon_cutoff", "eta_cutoff", "n_keep"), (0,)),
    **dict.fromkeys(("grammar", "regex", "ebnf", "json_schema", "negative_prompt"), ("", {})),
    **dict.fromkeys(("n_predict", "max_new_tokens", "num_predict", "lora_path", "lora", "adapter_id"), ()),
    **dict.fromkeys(("watermark", "ban_eos_token"), (False,)),
    "do_sample": (True,),
    "num_beams": (1,),
}
GUIDED = "guided_"  # and all that begin so: guided_json, guided_regex, guided_choice, guided_grammar ...
TOOLS = {"tools": "tool_choice", "functions": "function_call"}  # and which field says whether to use them
OF_TOOLS = ("tool_calls", "function_call", "tool_call_id", "audio")  # of a message
OF_COMPLETIONS = {  # that a chat has not
    **dict.fromkeys(("echo", "add_special_tokens", "return_token_ids"), (False,)),
    "best_of": (1,),
    "logprobs_mode": ("raw_logprobs",),
    "uniforms": (),
}
OF_CHATS = {  # that a completion has not
    "max_completion_tokens": (),
    "top_logprobs": (0,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}
OF_SAMPLING = {  # that a text which is there already has no use for
    **dict.fromkeys(("ignore_eos", "return_token_ids"), (False,)),
    **{name: OF_COMPLETIONS[name] for name in ("logprobs_mode", "uniforms")},
    "stop_token_ids": ([],),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p"), (0,)),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    **{name: OF_CHATS[name] for name in ("continue_final_message", "add_generation_prompt")},
}
OF_TEXTS = OF_SAMPLING | {"add_special_tokens": (True,)}  # scores are those of training, with the start token


class ApiError(Exception):
    """An answer in OpenAI's form for errors."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict:
        kind = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
        name = kind.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": name, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    width: int  # longest prompt and answer together, tokens
    max_tokens: int  # longest answer
    choices: int  # most texts per request


@dataclass(frozen=True)
class Call:
    """What a client asked for: its requests in the order of their choices."""

    chat: bool
    requests: list[Request]
    prompts: list[list[int]]
    echo: list[str] | None  # with echo: the text of each prompt
    skip: int  # tokens of a prompt that are ours, not the client's: the start token before a text
    n: int
    logprobs: bool
    token_ids: bool  # of all that was sampled, the token that ended it included
    stream: bool
    include_usage: bool


# ---- fields


def parse_body(raw: bytes) -> dict:
    def finite(word: str) -> float:  # Python also reads NaN and Infinity, and 1e999 as one: no answer could repeat them
        if not math.isfinite(number := float(word)):
            raise ApiError(400, f"the body has the number {word:.40}; numbers must be finite")
        return number

    try:
        body = json.loads(raw, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return body


def take(body: dict, name: str, kind: type, default=None, low: float | None = None, high: float | None = None):
    """The field as a `kind` within [low, high], or the default where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "an object"}
        raise ApiError(400, f"{name} must be {names[kind]}", name)
    if low is not None and value < low or high is not None and value > high:
        bounds = (
            f"between {low} and {high}"
            if None not in (low, high)
            else f"at least {low}"
            if high is None
            else f"at most {high}"
        )
        raise ApiError(400, f"{name} must be {bounds}, not {value!r:.40}", name)
    return text(value, name) if kind is str else value


def text(value, name: str, param: str | None = None) -> str:
    """ApiError unless it is a text that has bytes (a lone surrogate has none). param: the field, where name is longer."""
    if not isinstance(value, str):
        raise ApiError(400, f"{name} must be a text", param or name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{name} holds half a surrogate pair", param or name) from None
    return value


def stops(body: dict) -> tuple[str, ...]:
    value = body.get("stop")
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) > MOST_STOPS:
        raise ApiError(400, f"stop must be a text, or a list of at most {MOST_STOPS}", "stop")
    if any(not text(stop, "stop") or len(stop) > 1000 for stop in value):
        raise ApiError(400, "a stop text must have between 1 and 1000 characters", "stop")
    return tuple(value)


def stop_tokens(body: dict) -> tuple[int, ...]:
    """Tokens that end the answer beside the model's own."""
    value = body.get("stop_token_ids")
    value = [] if value is None else value
    if not isinstance(value, list) or len(value) > MOST_STOP_IDS or any(type(i) is not int or i < 0 for i in value):
        raise ApiError(400, f"stop_token_ids must be a list of at most {MOST_STOP_IDS} token ids", "stop_token_ids")
    return tuple(value)


def steering(body: dict, vocab_size: int) -> Steering | None:
    """Penalties (OpenAI's of counts, CTRL's of repetition) and biases; None where they change nothing."""
    presence, frequency = (take(body, f"{name}_penalty", float, 0.0, -2, 2) for name in ("presence", "frequency"))
    repetition = take(body, "repetition_penalty", float, 1.0, 0.01, 100)
    given, bias = take(body, "logit_bias", dict, {}), []
    if len(given) > MOST_BIASES:
        raise ApiError(400, f"logit_bias has {len(given)} tokens; at most {MOST_BIASES} are taken", "logit_bias")
    for word in given:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", word) or int(word) >= vocab_size:
            message = f"logit_bias must be of token ids between 0 and {vocab_size - 1}, not {word!r:.40}"
            raise ApiError(400, message, "logit_bias")
        value = take({"logit_bias": given[word]}, "logit_bias", float, 0.0, -100, 100)
        bias.append((int(word), value))
    how = Steering(presence, frequency, repetition, tuple(bias))
    return None if how == Steering() else how


def draws(body: dict, n: int) -> tuple[int | None, int, list[int]]:
    """(seed, iteration, row of each of the n choices): what its uniforms depend on, see model.generate.row_uniforms.

    "seed" alone: the rows 0 .. n-1 of iteration 0. Ours is "uniforms": {"seed", "iteration", "rows"}, what a rollout of
    PPO draws by.
    """
    seed, given = take(body, "seed", int, None, -(2**63), 2**64), take(body, "uniforms", dict)
    if given is None:
        return seed, 0, list(range(n))
    if seed is not None:
        raise ApiError(400, "seed has no effect beside uniforms, which have their own", "seed")
    if strange := given.keys() - {"seed", "iteration", "rows"}:
        raise ApiError(400, f"uniforms have no {min(strange)!r:.40}; they have seed, iteration and rows", "uniforms")
    rows = given.get("rows")
    if not isinstance(rows, list) or len(rows) != n or any(type(row) is not int or abs(row) >= 2**63 for row in rows):
        raise ApiError(400, f"the rows of uniforms must be a list of n = {n} integers", "uniforms")
    seed = take(given, "seed", int, 0, -(2**63), 2**64)
    return seed, take(given, "iteration", int, 0, -(2**63), 2**63), rows


def model_of(body: dict, names: Sequence[str]) -> int:
    """Which of the models a request asks for; the first where it names none."""
    if (model := take(body, "model", str, names[0])) not in names:
        known = " or ".join(map(repr, names))
        raise ApiError(404, f"no model {model!r:.100} here; it is {known}", "model", "model_not_found")
    return names.index(model)


def check_unsupported(body: dict, others: dict[str, tuple]) -> None:
    """ApiError for a known field that cannot be honoured. others: fields of other endpoints, at what values harmless."""
    known = UNSUPPORTED | others
    for name, choice in TOOLS.items():
        if body.get(name) not in (None, []) and body.get(choice) != "none":
            message = (
                f'{name} are not supported here: leave them out, or send {choice} "none", with which none is called'
            )
            raise ApiError(400, message, name, "unsupported_parameter")
        known.pop(name)
    for name, value in body.items():
        if name.startswith(GUIDED) and value is not None or name in known and value not in (None, *known[name]):
            raise ApiError(400, f"{name} is not supported here", name, "unsupported_parameter")


# ---- prompts


def messages_of(body: dict) -> list[dict]:
    """The conversation with every content one text; clients send lists of parts too."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    plain = []
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} must be an object with role and content", "messages")
        for name in OF_TOOLS:
            if message.get(name) not in (None, [], {}):
                raise ApiError(
                    400, f"{where} has {name}, which are not supported; its content must be a text", "messages",
                    "unsupported_parameter",
                )  # fmt: skip
        content = message.get("content")
        if content is None and message.get("role") == "assistant":
            content = ""  # a turn without words
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise ApiError(400, f"{where}.content has parts other than text, which are not supported", "messages")
            content = "".join(text(part.get("text"), f"{where}.content", "messages") for part in content)
        role = text(message.get("role"), f"{where}.role", "messages")
        plain.append({"role": role, "content": text(content, f"{where}.content", "messages")})
    return plain


def begun(messages: list[dict]) -> str:
    """The beginning of the answer, where the last message is the assistant's."""
    return messages[-1]["content"].strip() if messages[-1]["role"] == "assistant" else ""


def render(chat: Chat | None, messages: list[dict]) -> list[int]:
    """Ids up to where the model writes: behind the template's opening of an answer, or behind one that is begun."""
    if chat is None:
        raise ApiError(400, "the model has no chat template; use /v1/completions", "messages")
    *history, last = messages
    try:
        if begun(messages):
            ids = chat.begin(history, last["content"])
        else:
            ids = chat.render(history if last["role"] == "assistant" else messages, add_generation_prompt=True)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None
    if not ids:
        raise ApiError(400, "the chat template makes no tokens of these messages", "messages")
    return ids


def prompts_of(
    body: dict, tokenizer: Tokenizer, most: int, name: str = "prompt"
) -> tuple[list[list[int]], list[str] | None, int]:
    """Ids of every prompt; their texts (None where ids were given); how many start tokens stand before each."""
    prompt = body.get(name)
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(400, f"{name} must be a text, a list of texts, token ids, or a list of those", name)
    if len(prompt) > most:
        raise ApiError(400, f"{len(prompt)} of {name}; at most {most} are taken at once", name)
    if all(isinstance(one, str) for one in prompt):
        start = [tokenizer.start] if take(body, "add_special_tokens", bool, True) else []
        return [[*start, *tokenizer.encode(text(one, name))] for one in prompt], prompt, len(start)
    for one in prompt:
        if not isinstance(one, list) or not one or not all(type(i) is int for i in one):
            raise ApiError(400, f"{name} of token ids must be a list of at least one integer", name)
        if not 0 <= min(one) <= max(one) < tokenizer.vocab_size:
            raise ApiError(400, f"token ids must be between 0 and {tokenizer.vocab_size - 1}", name)
    return prompt, None, 0


def prompt_of(body: dict, tokenizer: Tokenizer, chat: Chat | None) -> list[int]:
    """The one prompt of /v1/score and /v1/tokens: a text or a conversation."""
    check_unsupported(body, OF_TEXTS)
    if ("prompt" in body) == ("messages" in body):
        raise ApiError(400, "give prompt or messages, one of them")
    if "messages" in body:
        return render(chat, messages_of(body))
    return [tokenizer.start, *tokenizer.encode(text(body["prompt"], "prompt"))]


def continuation(body: dict, tokenizer: Tokenizer) -> list[int]:
    """Ids of the response of /v1/score and /v1/tokens, whether or not it brings the space between it and the prompt."""
    response = text(body.get("response"), "response")
    ids = tokenizer.encode(response)
    if response.startswith(" ") and b"".join(map(tokenizer.token_bytes, ids)) == b" " + response.encode():
        return tokenizer.encode(response[1:])  # sentencepiece has added one by itself
    return ids


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each id of a text from its start adds to it; all together are the text."""
    stream, texts = TextStream(tokenizer, strip=True), []
    for i in ids:
        texts.append(stream.push(Token(i, None, []))[0])
    rest = stream.flush()[0]
    return [*texts[:-1], texts[-1] + rest] if texts else []


# ---- calls


def check_continuation(body: dict, messages: list[dict]) -> None:
    """vLLM's two fields for a begun answer, which is continued without them too. ApiError where there is none."""
    fields = (("continue_final_message", False, True), ("add_generation_prompt", True, False))
    for name, default, other in fields:
        if take(body, name, bool, default) == other and not begun(messages):
            message = f"{name} {json.dumps(other)} is not supported unless the last message is the assistant's"
            raise ApiError(400, message, name, "unsupported_parameter")


def parse_chat(body: dict, tokenizer: Tokenizer, chat: Chat | None, limits: Limits) -> Call:
    check_unsupported(body, OF_COMPLETIONS)
    messages = messages_of(body)
    check_continuation(body, messages)
    if begun(messages) and response_format(body) is not None:
        message = (
            "response_format is not supported with an answer that is begun: leave out the assistant's last message"
        )
        raise ApiError(400, message, "response_format", "unsupported_parameter")
    prompts = [render(chat, messages)]
    wants = take(body, "logprobs", bool, False)
    alternatives = take(body, "top_logprobs", int, 0, 0, MOST_ALTERNATIVES)
    if alternatives and not wants:
        raise ApiError(400, "top_logprobs has no effect without logprobs", "top_logprobs")
    longest = take(body, "max_completion_tokens", int, None, 1, limits.max_tokens)
    if longest is None:
        longest = take(body, "max_tokens", int, None, 1, limits.max_tokens)
    strip = not begun(messages)  # or a space belongs to the text
    return call(body, tokenizer, prompts, None, 0, longest, alternatives if wants else None, limits, True, strip)


def parse_completion(body: dict, tokenizer: Tokenizer, limits: Limits) -> Call:
    check_unsupported(body, OF_CHATS)
    prompts, texts, skip = prompts_of(body, tokenizer, limits.choices)
    alternatives = take(body, "logprobs", int, None, 0, MOST_ALTERNATIVES)
    mode = take(body, "logprobs_mode", str, LOGPROBS[0])
    if mode not in LOGPROBS:
        raise ApiError(400, f"logprobs_mode must be one of {', '.join(LOGPROBS)}, not {mode!r:.40}", "logprobs_mode")
    if mode != LOGPROBS[0] and (alternatives != 0 or take(body, "echo", bool, False)):
        raise ApiError(400, f"logprobs_mode {mode} is of sampled tokens: use logprobs 0, and no echo", "logprobs_mode")
    if take(body, "return_token_ids", bool, False) and take(body, "stream", bool, False):
        raise ApiError(
            400, "return_token_ids is not supported with stream", "return_token_ids", "unsupported_parameter"
        )
    longest = take(body, "max_tokens", int, 16, 0, limits.max_tokens)
    if take(body, "best_of", int, 1, 1) > take(body, "n", int, 1, 1):
        raise ApiError(400, "best_of is not supported; use n", "best_of", "unsupported_parameter")
    echo = None
    if take(body, "echo", bool, False):
        echo = texts or ["".join(token_texts(tokenizer, ids)) for ids in prompts]
    return call(body, tokenizer, prompts, echo, skip, longest, alternatives, limits)


def parse_embeddings(body: dict, tokenizer: Tokenizer, width: int, context: int) -> tuple[list[list[int]], int, bool]:
    """Ids of every text, how many start tokens stand before each, and whether the numbers are wanted as base64."""
    check_unsupported(body, OF_SAMPLING | {"dimensions": (width,)})
    form = take(body, "encoding_format", str, "float")
    if form not in ("float", "base64"):
        raise ApiError(400, f"encoding_format must be float or base64, not {form!r:.40}", "encoding_format")
    texts, _, skip = prompts_of(body, tokenizer, MOST_INPUTS, "input")
    for ids in texts:
        if not skip < len(ids) <= context:
            what = "is empty" if len(ids) <= skip else f"has {len(ids)} tokens, more than the context of {context}"
            raise ApiError(400, f"an input {what}", "input", "context_length_exceeded" if len(ids) > skip else None)
    return texts, skip, form == "base64"


def response_format(body: dict) -> dict | bool | None:
    """The schema that an answer must follow; None: any text."""
    form = take(body, "response_format", dict, {"type": "text"})
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise ApiError(
            400, f"response_format must be text, json_object or json_schema, not {kind!r:.40}", "response_format"
        )
    about = form.get("json_schema")
    if not isinstance(about, dict) or not isinstance(about.get("schema"), dict | bool):
        raise ApiError(400, "response_format.json_schema must be an object with a schema", "response_format")
    take({"response_format.json_schema.strict": about.get("strict")}, "response_format.json_schema.strict", bool)
    return about["schema"]


def grammar_of(body: dict, tokenizer: Tokenizer) -> Grammar | None:
    """What response_format asks for, compiled."""
    if (schema := response_format(body)) is None:
        return None
    if take(body, "ignore_eos", bool, False):
        raise ApiError(
            400, "ignore_eos is not supported with response_format: an answer ends where it is complete", "ignore_eos"
        )
    try:
        return Grammar(schema, tokenizer)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"response_format {error}", "response_format", "unsupported_parameter") from None


def call(
    body: dict, tokenizer: Tokenizer, prompts: list[list[int]], echo: list[str] | None, skip: int, longest: int | None,
    alternatives: int | None, limits: Limits, chat: bool = False, strip: bool = False,
) -> Call:  # fmt: skip
    n = take(body, "n", int, 1, 1, limits.choices)
    if n * len(prompts) > limits.choices:
        raise ApiError(400, f"{n} choices of {len(prompts)} prompts; at most {limits.choices} texts at once", "n")
    temperature = take(body, "temperature", float, 1.0, 0, HOTTEST)
    temperature = max(temperature, COLDEST) if temperature else 0.0
    top_p = take(body, "top_p", float, 1.0, 0, 1) or SMALLEST_TOP_P
    top_k = max(0, take(body, "top_k", int, 0, -1))  # -1: off
    seed, iteration, rows = draws(body, n)
    stop, stream = stops(body), take(body, "stream", bool, False)
    how = dict(
        iteration=iteration,
        stop_ids=stop_tokens(body),
        ignore_eos=take(body, "ignore_eos", bool, False),
        processed=body.get("logprobs_mode") == LOGPROBS[1],
        min_p=take(body, "min_p", float, 0.0, 0, 1),
        steering=steering(body, tokenizer.vocab_size),
        grammar=grammar_of(body, tokenizer),
        strip=strip,
    )
    options = take(body, "stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options have no effect without stream", "stream_options")
    requests, reported = [], 0
    for ids in prompts:
        if not ids:
            raise ApiError(400, "the prompt has no tokens", "prompt")
        room = limits.width - len(ids)
        most = min(limits.max_tokens, room) if longest is None else longest
        if not (0 if longest == 0 else 1) <= most <= room:
            wanted = "" if longest is None else f" and {longest} of the answer"
            raise ApiError(
                400, f"{len(ids)} tokens of the prompt{wanted} exceed the {limits.width} that there is room for",
                "messages" if chat else "prompt", "context_length_exceeded",
            )  # fmt: skip
        if alternatives is not None:
            reported += n * (most + (len(ids) if echo else 0)) * (1 + alternatives)
        if reported > MOST_LOGPROBS:
            raise ApiError(400, f"more than {MOST_LOGPROBS} log-probs asked for; lower n or max_tokens", "logprobs")
        for row in rows:
            sampling = Sampling(
                most, temperature, top_k, top_p, stop, seed, row, alternatives,
                prompt_logprobs=echo is not None and alternatives is not None, **how,
            )  # fmt: skip
            requests.append(Request(ids, sampling))
    usage, token_ids = take(options, "include_usage", bool, False), take(body, "return_token_ids", bool, False)
    return Call(chat, requests, prompts, echo, skip, n, alternatives is not None, token_ids, stream, usage)
