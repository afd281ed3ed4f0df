"""A language model as the judge, behind any OpenAI-compatible server: `--reward=rewards/llm_judge.py:judge`.

    JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=name [JUDGE_KEY=...] python train_ppo.py --reward=...

It asks for a grade from 0 to 10 of every response, JUDGE_WORKERS (8) requests at a time, each tried 3 times and given up after
JUDGE_SECONDS (60) in all; what stays unanswered stops the run, naming the response. Greedy, so that the same text gets the
same grade from a server that keeps its promises. Copy the file to ask another question.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

TRIES = 3
QUESTION = """Rate the answer to the request on a scale from 0 (useless) to 10 (could not be better).

Request:
{prompt}

Answer:
{response}

Reply with the number alone."""


def judge(prompts: list[str], responses: list[str]) -> list[float]:
    """Grades from 0 to 1, one a response."""
    texts = [QUESTION.format(prompt=prompt, response=response) for prompt, response in zip(prompts, responses)]
    with ThreadPoolExecutor(int(os.environ.get("JUDGE_WORKERS", "8"))) as pool:
        return list(pool.map(grade, texts))


def grade(text: str) -> float:
    """The number that the judge answers, over 10. ValueError where it answers none; OSError where it does not answer."""
    reply = ask([{"role": "user", "content": text}])
    found = re.search(r"\d+(?:\.\d+)?", reply)
    if not found or not 0 <= float(found[0]) <= 10:
        raise ValueError(f"the judge was asked for a number from 0 to 10 and said {reply[:80]!r} of {text[:200]!r}")
    return float(found[0]) / 10


def ask(messages: list[dict]) -> str:
    """One chat completion of the server in JUDGE_URL, tried again where it is busy or away."""
    url, model = (os.environ.get(name, "") for name in ("JUDGE_URL", "JUDGE_MODEL"))
    if not url.startswith(("http://", "https://")) or not model:
        raise ValueError(
            f"JUDGE_URL={url!r} and JUDGE_MODEL={model!r}: set both, e.g. http://127.0.0.1:8000/v1 and a name"
        )
    body = json.dumps({"model": model, "messages": messages, "temperature": 0, "max_tokens": 8}).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("JUDGE_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url.rstrip("/") + "/chat/completions", body, headers)
    seconds = float(os.environ.get("JUDGE_SECONDS", "60"))
    end = time.monotonic() + seconds
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=max(0.1, end - time.monotonic())) as answer:
                return json.load(answer)["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
            if error.code not in (408, 429, 500, 502, 503, 504):
                break  # asking again would not help
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:  # away, or no such answer
            problem = f"{type(error).__name__}: {error}"
        pause = min(2.0**attempt, end - time.monotonic())
        if pause <= 0:
            break
        time.sleep(pause)
    raise OSError(f"the judge at {url} did not answer within {TRIES} tries and {seconds:g} s: {problem}")
