"""What a run's files say of its model to people who talk to it: what it was tuned for, prompts of that kind, and their mode."""

import contextlib
import os
from pathlib import Path

from data.chat import Chat
from data.tokenizer import Tokenizer
from rlhf.infra.checkpoint import read_json
from rlhf.infra.files import read_lines

NOTHING = {"tuned": None, "prompts": [], "mode": None}
EXAMPLES = 3
METHODS = {
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "reinforce++": "REINFORCE++",
}  # of estimators; else PPO
LONGEST = 300  # characters of an example


def about(init: str | Path, tokenizer: Tokenizer, chat: Chat | None) -> dict:
    """{"tuned": a sentence or None, "prompts": at most 3 texts, "mode": "chat", "text" or None}, of the run that `init` is,
    or lies in.

    mode: what the run's samples are: answers in a chat, or continuations of texts, which a model with a chat template can be
    tuned on as well. A model without a run beside it has none of the three. ValueError where the run's files are damaged.
    """
    places = (Path(init), Path(init).parent) if Path(init).is_dir() else ()  # a name or a file has no run
    run = next((path for path in places if (path / "run.json").is_file()), None)
    if run is None:
        return NOTHING
    rows = read_lines(run / "samples.jsonl")
    given = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
    frame = frame_of(tokenizer, chat) if chat else None
    is_chat = frame is not None and any(text.endswith(frame[1]) for text in given)
    asked = dict.fromkeys(said(text, frame) if is_chat else text.strip() for text in given)  # each once, in their order
    prompts = [text for text in asked if text and len(text) <= LONGEST]
    mode = ("chat" if is_chat else "text") if given else None
    return {"tuned": sentence(read_json(run / "run.json")), "prompts": prompts[:EXAMPLES], "mode": mode}


def sentence(options: dict) -> str | None:
    """What the options of run.json mean, in words; None where they are no training's of ours."""
    data, sources = f"“{Path(str(options.get('data'))).name}”", options.get("sources")
    if "kl_coef" in options:
        reward = ", ".join(
            part.rpartition("/")[2] for part in str(options.get("reward")).split(",")
        )  # no paths of ours
        near = ", and held near the model it came from" if options["kl_coef"] else ""
        method = METHODS.get(str(options.get("estimator")), "PPO")
        kind = f"“{', '.join(map(str, sources))}” " if sources and isinstance(sources, list) else ""
        return f"Tuned with {method} to please the reward “{reward}”, on {kind}prompts of {data}{near}."
    if "beta" in options:
        return f"Tuned with {str(options.get('loss', 'dpo')).upper()} on the preferences in {data}."
    if "data" in options:
        return f"{'Fine-tuned' if options.get('init') else 'Trained'} on the texts of {data}."
    return None


def frame_of(tokenizer: Tokenizer, chat: Chat) -> tuple[str, str] | None:
    """What the template writes before a user's first message, whatever system message stands there, and after it; None where
    it does not show the message."""
    mark = "\u2603"

    def around(*messages: tuple[str, str]) -> tuple[str, str, str]:
        said = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.decode(chat.render(said, add_generation_prompt=True)).partition(mark)

    before, found, after = around(("user", mark))
    if not found:
        return None
    with contextlib.suppress(ValueError):  # a template may refuse a system message
        other = around(("system", "\u2604"), ("user", mark))[0]
        if (same := os.path.commonprefix([before[::-1], other[::-1]])[::-1]).strip():
            before = same
    return before, after


def said(prompt: str, frame: tuple[str, str]) -> str:
    """The prompt of a chat's sample as a person would type it: what its one message says; "" where it is another."""
    before, after = frame
    words = prompt.removesuffix(after).partition(before)[2]
    if not prompt.endswith(after) or after.strip() and after.rstrip() in words:  # no chat, or there is an answer in it
        return ""
    return words.strip()
