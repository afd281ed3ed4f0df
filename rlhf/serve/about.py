"""What a run's files say of its model to people who talk to it: what it was tuned for, and prompts of that kind."""

from pathlib import Path

from data.chat import Chat
from data.tokenizer import Tokenizer
from rlhf.infra.checkpoint import read_json
from rlhf.infra.files import read_lines

NOTHING = {"tuned": None, "prompts": []}
EXAMPLES = 3
METHODS = {
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "reinforce++": "REINFORCE++",
}  # of estimators; else PPO
LONGEST = 300  # characters of an example


def about(init: str | Path, tokenizer: Tokenizer, chat: Chat | None) -> dict:
    """{"tuned": a sentence or None, "prompts": at most 3 texts}, of the run that `init` is, or lies in.

    A model without a run beside it has neither. ValueError where the run's files are damaged.
    """
    places = (Path(init), Path(init).parent) if Path(init).is_dir() else ()  # a name or a file has no run
    run = next((path for path in places if (path / "run.json").is_file()), None)
    if run is None:
        return NOTHING
    rows = read_lines(run / "samples.jsonl")
    asked = dict.fromkeys(said(row.get("prompt"), tokenizer, chat) for row in rows)  # each once, in their order
    prompts = [text for text in asked if text and len(text) <= LONGEST]
    return {"tuned": sentence(read_json(run / "run.json")), "prompts": prompts[:EXAMPLES]}


def sentence(options: dict) -> str | None:
    """What the options of run.json mean, in words; None where they are no training's of ours."""
    data = f"“{Path(str(options.get('data'))).name}”"
    if "kl_coef" in options:
        reward = ", ".join(
            part.rpartition("/")[2] for part in str(options.get("reward")).split(",")
        )  # no paths of ours
        near = ", and held near the model it came from" if options["kl_coef"] else ""
        method = METHODS.get(str(options.get("estimator")), "PPO")
        return f"Tuned with {method} to please “{reward}”, on prompts of {data}{near}."
    if "beta" in options:
        return f"Tuned with {str(options.get('loss', 'dpo')).upper()} on the preferences in {data}."
    if "data" in options:
        return f"{'Fine-tuned' if options.get('init') else 'Trained'} on the texts of {data}."
    return None


def said(prompt, tokenizer: Tokenizer, chat: Chat | None) -> str:
    """The prompt of a sample as a person would type it: of a chat, what its one message says; "" where it is another."""
    if not isinstance(prompt, str):
        return ""
    if chat is None:
        return prompt.strip()
    mark = "\u2603"
    shown = tokenizer.decode(chat.render([{"role": "user", "content": mark}], add_generation_prompt=True))
    before, found, after = shown.partition(mark)
    if not (found and prompt.startswith(before) and prompt.endswith(after)):
        return ""
    words = prompt[len(before) : len(prompt) - len(after)]
    return "" if after.strip() and after.rstrip() in words else words.strip()  # else there is an answer in it
