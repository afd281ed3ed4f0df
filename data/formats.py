"""Rows -> Records: the forms in which people have texts, conversations, comparisons, ratings and prompts, by their keys.

A form is recognised row by row, so a file may mix them. What a form does not use stays in `extra`.

    recognise({"prompt": "2+2?", "completion": "4", "label": True})      # the form "thumbs"
    read_row(row, FORMS["thumbs"], "mine")                               # [Record(...)], or ValueError with the reason
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from data.containers import Bad
from data.records import Message, Pair, Record, group_of, pairs_by_score

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bard", "bing", "ai"), "assistant"),
    **{role: role for role in ("system", "developer", "tool", "function", "ipython")},
    **{"observation": "tool"},
}
PROMPTS = ("prompt", "question", "instruction", "query", "problem")  # where the task stands, one of them
INPUTS, SYSTEMS = ("input", "context"), ("system", "system_prompt")
ANSWERS = ("completion", "response", "output")
RESPONSES = ("responses", "completions", "answers", "outputs")
SCORES = ("score", "rating", "helpfulness", "overall_score", "reward", "stars")
SOURCES = ("domain", "subset", "data_source")  # of a row, where its file holds several
TWO = (  # the columns of two answers, and how a verdict names the first and the second
    ("output_1", "output_2", 1, 2),
    ("response1", "response2", 1, 2),
    ("response_1", "response_2", 1, 2),
    ("response_0", "response_1", 0, 1),
    ("response_a", "response_b", "a", "b"),
    ("completion_a", "completion_b", "a", "b"),
    ("answer_a", "answer_b", "a", "b"),
    ("conversation_a", "conversation_b", "a", "b"),
    ("left", "right", "left", "right"),
)
VERDICTS = ("label", "preference", "winner", "choice", "better_response_id", "annotator1", "winner_model_a")
TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad", "draw")


class Columns:
    """A row, and which of its columns were used."""

    def __init__(self, row: dict, source: str = ""):
        self.row, self.used, self.source = row, set(), source

    def has(self, *names: str) -> bool:
        return any(self.row.get(name) is not None for name in names)

    def name(self, names: Sequence[str]) -> str:
        """The first of these columns that the row has and that is not null, else the first that it has."""
        for name in names:
            if self.row.get(name) is not None:
                return name
        return next((name for name in names if name in self.row), names[0])

    def take(self, *names: str):
        """(name, value) of the first of these columns. ValueError where there is none."""
        name = self.name(names)
        if name not in self.row:
            raise ValueError(f"{' or '.join(names)} is missing")
        self.used.add(name)
        if self.row[name] is None:
            raise ValueError(f"{name} is null")
        return name, self.row[name]

    def text(self, *names: str) -> str:
        name, value = self.take(*names)
        return text_of(value, name)

    def optional_text(self, *names: str) -> str:
        """ "" where no such column is, or null in it."""
        self.used |= {name for name in names if name in self.row and self.row[name] is None}
        return self.text(*names) if self.has(*names) else ""

    def number(self, *names: str) -> float:
        name, value = self.take(*names)
        return number_of(value, name)

    def messages(self, *names: str) -> list[Message]:
        name, value = self.take(*names)
        return messages_of(value, name)

    def rest(self) -> dict:
        """The columns that were not used; a NaN, which JSON does not have, is null."""
        return {name: finite(value) for name, value in self.row.items() if name not in self.used}


# --- values ---


def shown(value) -> str:
    return f"{value!r:.40}"


def text_of(value, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)} where a text was expected")
    return value


def answer_text(value, name: str) -> str:
    """A text with something in it."""
    if not text_of(value, name).strip():
        raise ValueError(f"{name} is empty")
    return value


def number_of(value, name: str) -> float:
    """A finite number, which may be spelled as a text."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {shown(value)} where a number was expected")
    return number


def truth_of(value, name: str) -> bool:
    spelled = value.strip().lower() if isinstance(value, str) else value
    for truth, spellings in ((True, (True, "true", "1", "1.0")), (False, (False, "false", "0", "0.0"))):
        if isinstance(spelled, bool | int | float | str) and spelled in spellings:  # 1 == True, 0 == False
            return truth
    raise ValueError(f"{name} is {shown(value)} where true or false was expected")


def finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list) else value


def listed(value):
    """A list or an object that a table spells as JSON, or the value itself."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def conversation_in(value):
    """The messages in a value, also where a table spells them as JSON; None for a text, which may look like a list."""
    if not isinstance(value, str):
        return value if isinstance(value, list | dict) else None
    found = listed(value)
    messages = [found] if isinstance(found, dict) else found
    marks = ({"role", "content"}, {"from", "value"})
    if isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages):
        return found if all(any(mark <= {*one} for mark in marks) for one in messages) else None
    return None


def messages_of(value, name: str) -> list[Message]:
    """A conversation, {"role", "content"} or ShareGPT's {"from", "value"}; roles in our spelling. ValueError otherwise."""
    value = listed(value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {shown(value)} where a list of messages was expected")
    return [message_of(message, f"{name}[{i}]") for i, message in enumerate(value)]


def message_of(message, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {shown(message)} where a message was expected")
    keys = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    for key in keys:
        if key not in message:
            raise ValueError(f"{where} has no {key}; a message has a role and content")
    role, content = message[keys[0]], message[keys[1]]
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)  # parts of type text
    rest = {key: finite(value) for key, value in message.items() if key not in keys}
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"{where} is of {shown(role)}, none of {', '.join(sorted({*ROLES.values()}))}")
    return {"role": ROLES[role.lower()], "content": text_of(content, f"{where}.{keys[1]}"), **rest}


def is_list(value) -> bool:
    return conversation_in(value) is not None


# --- what several forms do ---


def record(columns: Columns, prompt, answers: Iterable[str], group: str = "", **more) -> Record:
    """A Record with the rest of the row as extra, of the source that the row names, or its file's."""
    extra = columns.rest()
    named = [columns.row[name] for name in SOURCES if isinstance(columns.row.get(name), str)]
    return Record(prompt, tuple(answers), extra=extra, source=(named or [columns.source])[0], group=group, **more)


def task(columns: Columns) -> str | list[Message]:
    """The prompt of a row: messages as messages, a text as it is; an instruction with its input, a blank line after each.

    With a system message, or a history of earlier turns, it is a conversation.
    """
    name, value = columns.take(*PROMPTS)
    if is_list(value):
        return messages_of(value, name)
    text = text_of(value, name)
    if name == "instruction":
        text = "".join(part + "\n\n" for part in (text, columns.optional_text(*INPUTS)) if part.strip())
    system = columns.optional_text(*SYSTEMS)
    history = listed(columns.take("history")[1]) if columns.has("history") else []
    if not system and not history:
        return text
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError("history is no list of [question, answer]")
    turns = [{"role": "system", "content": system}] if system else []
    for asked, answered in history:
        turns += said("user", text_of(asked, "history")) + said("assistant", text_of(answered, "history"))
    return turns + said("user", text.rstrip("\n"))


def said(role: str, content: str) -> list[Message]:
    return [{"role": role, "content": content}]


def whole(prompt, answer, name: str) -> list[Message]:
    """The conversation that an answer, a text or messages, is the end of; prompt: None, a text or messages."""
    before = prompt if isinstance(prompt, list) else []
    if isinstance(answer, str) and not is_list(answer):
        return before + (said("user", prompt) if isinstance(prompt, str) else []) + said("assistant", answer)
    turns = messages_of(answer, name)
    if isinstance(prompt, str) and turns[0]["role"] == "assistant":
        before = said("user", prompt)  # else it is a copy of what the conversation begins with
    return turns if turns[: len(before)] == before else before + turns


def last_turn(turns: list[Message], name: str) -> tuple[list[Message], str]:
    """(what came before, the answer) of a conversation that ends with the assistant."""
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{name} ends with a turn of the {turns[-1]['role']}, not of the assistant")
    return turns[:-1], answer_text(turns[-1]["content"], name)


def two_answers(prompt, one, two, names: Sequence[str]) -> tuple[str | list[Message], list[str]]:
    """(prompt, both answers): texts stay texts; conversations are cut before their last turn."""
    if not is_list(prompt) and not is_list(one) and not is_list(two):
        answers = [answer_text(value, name) for value, name in zip((one, two), names)]
        prompt = "" if prompt is None else prompt
    else:
        turns = [last_turn(whole(prompt, value, name), name) for value, name in zip((one, two), names)]
        if turns[0][0] != turns[1][0]:
            raise ValueError(f"{names[0]} and {names[1]} differ before their last turn")
        prompt, answers = turns[0][0], [answer for _, answer in turns]
    if answers[0] == answers[1]:
        raise ValueError(f"{names[0]} and {names[1]} are the same")
    return prompt, answers


def verdict_pair(first: float) -> tuple[Pair, ...]:
    """first: probability that a rater prefers answer 0."""
    winner = 0 if first >= 0.5 else 1
    return (Pair(winner, 1 - winner, p=max(first, 1 - first), gap=float(first != 0.5)),)


# --- the forms ---


def text(columns: Columns) -> list[Record]:
    return [record(columns, "", [answer_text(columns.text("text"), "text")])]


def prompts(columns: Columns) -> list[Record]:
    if columns.has("messages", "conversations"):
        prompt = columns.messages("messages", "conversations")
    else:
        prompt = task(columns)
    if not prompt or isinstance(prompt, str) and not prompt.strip():
        raise ValueError("the prompt is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with a turn of the assistant")
    return [record(columns, prompt, [])]


def conversation(columns: Columns) -> list[Record]:
    name = columns.name(("messages", "conversations", "conversation"))
    turns = columns.messages(name)
    system = columns.optional_text(*SYSTEMS)
    turns = said("system", system) + turns if system and turns[0]["role"] != "system" else turns
    prompt, answer = last_turn(turns, name)
    return [record(columns, prompt, [answer])]


def completion(columns: Columns) -> list[Record]:
    prompt, name = task(columns), columns.name(ANSWERS)
    answer = columns.take(name)[1]
    if is_list(prompt) or is_list(answer):
        prompt, answer = last_turn(whole(prompt, answer, name), name)
    return [record(columns, prompt, [answer_text(answer, name)])]


def tasks_with_instances(columns: Columns) -> list[Record]:
    instances = listed(columns.take("instances")[1])
    instruction = columns.text("instruction")
    if not isinstance(instances, list) or not instances:
        raise ValueError(f"instances is {shown(instances)} where a list of input and output was expected")
    found = []
    for i, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise ValueError(f"instances[{i}] is {shown(instance)} where an object was expected")
        one = Columns({"instruction": instruction, **columns.rest(), **instance}, columns.source)
        found += [record(one, task(one), [answer_text(one.text("output"), f"instances[{i}].output")])]
    return found


def preference(columns: Columns) -> list[Record]:
    if columns.has("conversations", "conversation"):
        prompt = columns.messages("conversations", "conversation")
    else:
        prompt = task(columns) if columns.has(*PROMPTS) or {*PROMPTS} & {*columns.row} else None
    one, two = (columns.take(side)[1] for side in ("chosen", "rejected"))
    prompt, answers = two_answers(prompt, one, two, ("chosen", "rejected"))
    return [record(columns, prompt, answers, pairs=(preferred(columns.row),))]


def preferred(row: dict) -> Pair:
    """The pair of chosen and rejected: its gap from strength, margin or two scores, p from the agreement of raters."""
    gap = 1.0
    if row.get("strength") is not None:
        gap = number_of(row["strength"], "strength")
    elif row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        gap = max(
            0.0, number_of(row["score_chosen"], "score_chosen") - number_of(row["score_rejected"], "score_rejected")
        )
    p = 1.0 if row.get("agreement") is None else number_of(row["agreement"], "agreement")
    if gap < 0 or not 0 <= p <= 1:
        raise ValueError(f"strength {gap} and agreement {p}: not below 0, and between 0 and 1")
    return Pair(0, 1, p=max(0.5, p), gap=gap)


TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):", re.MULTILINE)


def transcript(columns: Columns) -> list[Record]:
    """HH-RLHF: two dialogues as texts, cut at their last "Assistant:". The answers keep the space that they begin with."""
    cuts = []
    for side in ("chosen", "rejected"):
        before, header, answer = columns.text(side).rpartition("\n\nAssistant:")
        cuts.append((before + header, answer_text(answer, side)))
    if cuts[0][0] != cuts[1][0]:
        raise ValueError("chosen and rejected differ before their last turn")
    if cuts[0][1] == cuts[1][1]:
        raise ValueError("chosen and rejected are the same")
    return [record(columns, cuts[0][0], [answer for _, answer in cuts], pairs=(preferred(columns.row),))]


def transcript_messages(prompt: str) -> list[Message]:
    """The messages of a dialogue as text; a header counts at the start of a line after a blank one."""
    heads = list(TURN.finditer(prompt))
    ends = [head.start() for head in heads[1:]] + [len(prompt)]
    turns = [
        {
            "role": ROLES[{"Human": "user", "Assistant": "assistant"}[head[1]]],
            "content": prompt[head.end() : end].strip(),
        }
        for head, end in zip(heads, ends)
    ]
    return turns[:-1]  # the last is the answer's own header


def shp(columns: Columns) -> list[Record]:
    """Stanford Human Preferences: labels 1 says that A is better, 0 that B is."""
    prompt, better = columns.text("history"), truth_of(columns.take("labels")[1], "labels")
    sides = [columns.take(name)[1] for name in ("human_ref_A", "human_ref_B")]
    prompt, answers = two_answers(prompt, *sides, ("human_ref_A", "human_ref_B"))
    post = columns.row.get("post_id")
    group = group_of(str(post)) if post is not None else ""
    return [record(columns, prompt, answers, group, pairs=verdict_pair(float(better)))]


def tldr(columns: Columns) -> list[Record]:
    """OpenAI's comparisons of summaries; the prompt as their policy had it."""
    info, summaries = (listed(columns.take(name)[1]) for name in ("info", "summaries"))
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise ValueError("info and two summaries were expected")
    if not all(isinstance(summary, dict) for summary in summaries):
        raise ValueError("a summary is no object with a text")
    choice = number_of(columns.take("choice")[1], "choice")
    if choice not in (0, 1):
        raise ValueError(f"choice is {shown(choice)} where 0 or 1 was expected")
    title = text_of(info.get("title") or "", "info.title")
    if isinstance(info.get("article"), str):
        prompt = f"Title: {title}\n\nArticle: {info['article']}\n\nTL;DR:"
    else:
        post, subreddit = text_of(info.get("post"), "info.post"), text_of(info.get("subreddit") or "", "info.subreddit")
        prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
    texts = [summary.get("text") for summary in summaries]
    _, answers = two_answers(prompt, *texts, ("summaries[0].text", "summaries[1].text"))
    group = group_of(str(info["id"])) if info.get("id") is not None else ""
    columns.used -= {"info", "summaries"}  # policies and ids stay
    return [record(columns, prompt, answers, group, pairs=verdict_pair(1.0 - choice))]


def two_names(row: dict) -> tuple | None:
    return next((two for two in TWO if row.get(two[0]) is not None and row.get(two[1]) is not None), None)


def verdict(columns: Columns) -> list[Record]:
    """Two answers, and which is better by its number or name: LLMBar, AlpacaEval, PandaLM, PKU-SafeRLHF, arena, our votes."""
    one, two, *names = two_names(columns.row) or (*TWO[0][:2], 1, 2)
    if columns.has(*PROMPTS, "input"):
        prompt = task(columns) if columns.has(*PROMPTS) else columns.text("input")
    else:
        prompt = None
    sides = [columns.take(name)[1] for name in (one, two)]
    first = first_is_better(columns, names)
    prompt, answers = two_answers(prompt, *sides, (one, two))
    return [record(columns, prompt, answers, pairs=verdict_pair(first))]


def first_is_better(columns: Columns, names: Sequence) -> float:
    """Probability that the first answer is preferred: the mean over annotators, a tie is one half."""
    row = columns.row
    if row.get("winner_model_a") is not None:
        ticks = [columns.number(name) for name in ("winner_model_a", "winner_model_b")]
        return 0.5 if ticks[0] == ticks[1] else float(ticks[0] > ticks[1])
    annotators = sorted(name for name in row if re.fullmatch(r"annotator\d+", name) and row[name] is not None)
    verdicts = annotators or [columns.name(VERDICTS)]
    votes = [one_verdict(columns.take(name)[1], name, names) for name in verdicts]
    return sum(votes) / len(votes)


def one_verdict(value, name: str, names: Sequence) -> float:
    if isinstance(names[0], str):
        spelled = text_of(value, name).strip().lower()
        if spelled in TIES:
            return 0.5
        for side, truth in zip(names, (1.0, 0.0)):
            if spelled == side or spelled.endswith((f"_{side}", f" {side}")):
                return truth
        raise ValueError(f"{name} is {shown(value)}: neither {names[0]}, {names[1]} nor tie")
    if isinstance(value, str) and value.strip().lower() in TIES:
        return 0.5
    number = number_of(value, name)
    if names[0] == 1 and number == 0:  # PandaLM's tie
        return 0.5
    if not names[0] <= number <= names[1]:
        raise ValueError(f"{name} is {shown(value)}: not between {names[0]} and {names[1]}")
    return names[1] - number  # AlpacaEval: 1.5 is a draw, 1.2 says .8 for the first


def thumbs(columns: Columns) -> list[Record]:
    good = truth_of(columns.take("label")[1], "label")
    (one,) = completion(columns)
    return [replace(one, scores=(float(good),))]


def rating(columns: Columns) -> list[Record]:
    score = columns.number(*SCORES)
    if columns.has("text") and not columns.has(*ANSWERS):
        return [record(columns, "", [answer_text(columns.text("text"), "text")], scores=(score,))]
    (one,) = completion(columns)
    return [replace(one, scores=(score,))]


def responses(columns: Columns) -> list[Record]:
    """Several answers to a prompt, each with a score, in a list of its own or beside its text."""
    prompt, (name, given) = task(columns), columns.take(*RESPONSES)
    given = listed(given)
    if not isinstance(given, list) or not given:
        raise ValueError(f"{name} is {shown(given)} where a list of answers was expected")
    scores = listed(columns.take("scores")[1]) if columns.has("scores") else None
    if scores is not None and (not isinstance(scores, list) or len(scores) != len(given)):
        raise ValueError(f"scores is {shown(scores)} where {len(given)} numbers were expected, one an answer")
    answers, found = [], []
    for i, one in enumerate(given):
        where, score = f"{name}[{i}]", None if scores is None else scores[i]
        if isinstance(one, dict):
            inner = Columns(one)
            where, one = f"{where}.{inner.name(('text', *ANSWERS, 'content', 'answer'))}", inner
            score = inner.take(*SCORES)[1] if score is None else score
            one = inner.take("text", *ANSWERS, "content", "answer")[1]
        if score is None:
            raise ValueError("the answers have no scores")
        answers.append(answer_text(one, where))
        found.append(number_of(score, f"the score of {where}"))
    if any(isinstance(one, dict) for one in given):
        columns.used.discard(name)  # the models that wrote them stay
    prompt = prompt if isinstance(prompt, str) else list(prompt)
    return [record(columns, prompt, answers, scores=tuple(found), pairs=pairs_by_score(answers, found))]


# --- the table ---


@dataclass(frozen=True)
class Form:
    """A form of row. needs: its keys, each a name or one of several names."""

    name: str
    needs: tuple[str | tuple[str, ...], ...]
    read: Callable[[Columns], list[Record]]
    what: str
    when: Callable[[dict], bool] = lambda row: True  # beyond its keys

    def fits(self, row: dict) -> bool:
        return not self.missing(row) and self.when(row)

    def missing(self, row: dict) -> list[str]:
        """What the row lacks; null is lacking."""
        alternatives = ((need,) if isinstance(need, str) else need for need in self.needs)
        return [" or ".join(names) for names in alternatives if all(row.get(name) is None for name in names)]


def has_two(row: dict) -> bool:
    return two_names(row) is not None


def has_scores(row: dict) -> bool:
    inner = next((listed(row[name]) for name in RESPONSES if row.get(name) is not None), None)
    beside = isinstance(inner, list) and any(isinstance(one, dict) and {*one} & {*SCORES} for one in inner)
    return row.get("scores") is not None or beside


def is_transcript(row: dict) -> bool:
    return all(isinstance(row[side], str) and "\n\nAssistant:" in row[side] for side in ("chosen", "rejected"))


def is_whole(row: dict) -> bool:
    return all(is_list(row[side]) for side in ("chosen", "rejected"))


TABLE = (  # the first that fits
    Form("tldr", ("info", "summaries", "choice"), tldr, "comparisons of two summaries"),
    Form("shp", ("history", "human_ref_A", "human_ref_B", "labels"), shp, "comparisons of two answers to a post"),
    Form("verdict", (VERDICTS,), verdict, "two answers and which is better", has_two),
    Form(
        "sharegpt_pairs", (("conversations", "conversation"), "chosen", "rejected"), preference, "ShareGPT comparisons"
    ),
    Form("preference", (PROMPTS, "chosen", "rejected"), preference, "comparisons"),
    Form("hh", ("chosen", "rejected"), transcript, "comparisons of two dialogues as texts", is_transcript),
    Form("implicit", ("chosen", "rejected"), preference, "comparisons of two conversations", is_whole),
    Form("two_texts", ("chosen", "rejected"), preference, "comparisons of two texts"),
    Form("responses", (PROMPTS, RESPONSES), responses, "prompts with scored answers", has_scores),
    Form("thumbs", (PROMPTS, ANSWERS, "label"), thumbs, "answers that are good or not"),
    Form("rating", (PROMPTS, ANSWERS, SCORES), rating, "answers with a score"),
    Form("instances", ("instruction", "instances"), tasks_with_instances, "tasks with instances"),
    Form("messages", ("messages",), conversation, "conversations"),
    Form("sharegpt", (("conversations", "conversation"),), conversation, "ShareGPT conversations"),
    Form("alpaca", (("instruction", "question"), ("output", "response")), completion, "instructions with an answer"),
    Form("completion", (PROMPTS, ANSWERS), completion, "prompts with an answer"),
    Form("rated_text", ("text", SCORES), rating, "texts with a score"),
    Form("text", ("text",), text, "texts"),
    Form("prompts", (PROMPTS,), prompts, "prompts"),
)
FORMS = {form.name: form for form in TABLE}
KNOWN = {  # columns of all forms, by which the heading of a table is recognised
    *(name for form in TABLE for need in form.needs for name in ([need] if isinstance(need, str) else need)),
    *(name for two in TWO for name in two[:2]),
    *INPUTS,
    *SYSTEMS,
}


def recognise(row: dict) -> Form | None:
    return next((form for form in TABLE if form.fits(row)), None)


@dataclass(frozen=True)
class Reader:
    """How the rows of a file are read: as what most of its first rows are, and rows of other forms by their own keys."""

    form: str = ""  # what the file is; "" = nothing that is known
    columns: frozenset[str] = frozenset()  # of the rows of that form
    fixed: bool = False  # every row must be of this form (--format)
    rename: tuple[tuple[str, str], ...] = ()  # (key, column): read the column as this key (--map)
    chat: bool = False  # a text prompt is one message of the user
    system: str = ""  # system message of conversations that bring none
    source: str = ""  # of rows that name none

    def records(self, row: dict | Bad) -> tuple[str, list[Record]]:
        """(form, records) of a row. ValueError with the reason where it has none."""
        if isinstance(row, Bad):
            raise ValueError(row.reason)
        row = renamed(row, self.rename)
        form = FORMS.get(self.form)
        if not self.fixed and not (form and form.fits(row)):
            other = recognise(row)
            full = {name for name, value in row.items() if value is not None}
            if form and full <= self.columns:  # nothing new: it is the file's form with something missing
                raise ValueError(f"{', '.join(form.missing(row)) or 'something'} is missing for {form.name}")
            form = other
        if form is None:
            raise ValueError(f"no known form has the keys {', '.join(row)[:200] or '(none)'}; name them with --map")
        found = form.read(Columns(row, self.source))
        if self.chat:
            found = [as_chat(one, form.name) for one in found]
        if self.system:
            found = [with_system(one, self.system) for one in found]
        return form.name, found


def renamed(row: dict, rename: Iterable[tuple[str, str]]) -> dict:
    for key, column in rename:
        if column in row:
            row = {key: row[column], **{name: value for name, value in row.items() if name not in (key, column)}}
    return row


def as_chat(record: Record, form: str) -> Record:
    """A text prompt as one message of the user (a dialogue in its turns), answers without the space that joins texts."""
    if not record.prompt or not isinstance(record.prompt, str):
        return record
    prompt = transcript_messages(record.prompt) if form == "hh" else said("user", record.prompt.rstrip("\n"))
    return replace(record, prompt=prompt, answers=tuple(answer.lstrip() for answer in record.answers))


def with_system(record: Record, system: str) -> Record:
    if isinstance(record.prompt, str) or record.prompt[0]["role"] == "system":
        return record
    return replace(record, prompt=said("system", system) + record.prompt)


def reader_of(sample: Iterable[dict | Bad], rename: Iterable[tuple[str, str]] = (), **more) -> Reader:
    """The Reader of a file by its first rows."""
    found, columns = Counter(), {}
    for row in sample:
        if isinstance(row, dict) and (form := recognise(row := renamed(row, rename))):
            found[form.name] += 1
            columns.setdefault(form.name, set()).update(name for name, value in row.items() if value is not None)
    form = max(FORMS, key=lambda name: found[name]) if found else ""
    return Reader(form, frozenset(columns.get(form, ())), rename=tuple(rename), **more)
