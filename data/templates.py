"""Chat templates, which are programs of strangers: rendered apart, within bounds, and followed character by character.

Apart: one child process per process of ours renders, with a limit on its memory and on its CPU time per request. No loop,
power, doubled string or format width of a template can then do more than end in a ValueError.

Followed: a template is rendered twice. First as HF's `apply_chat_template` does it: that text is what comes out, always.
Then with every message in a private alphabet, in which none of the characters of control tokens occur: so it is known
which characters of the text are the template's and which are a message's. Where a template looks into a message (`in`,
split, title, tojson ...) it is shown the text itself, and its result is put into the private alphabet again. If the second
text does not read as the first, the template did something that could not be followed, and that is a ValueError.

Remembered: what most templates make of a conversation depends on its roles alone, so the next one with the same roles is
filled in without asking (data/skeletons.py).
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data.following import Alphabet, compile_template, follow, written
from data.skeletons import Rendered, Skeletons, shape_of, trace

SECONDS = 2  # of CPU time for a request; a conversation takes a millisecond
MEMORY = 2**30  # bytes of address space of the process that renders
MOST_SKELETONS = 1000  # that are remembered
SPACE = re.compile(r"\s")


# --- from outside ---


def render(
    source: str,
    control: Sequence[str],
    special: dict[str, str],
    messages: Sequence[dict],
    views: Sequence[tuple[int, bool]],
) -> list[Rendered]:
    """What the template makes of the first n messages, with or without the prompt of an answer, for each (n, prompt).

    control: the tokens that only the template may write. special: bos_token, eos_token ... as the template knows them.
    messages: [{"role": ..., "content": ...}, ...]. All views are of one time of the clock.
    ValueError, in one line, for a template that does not compile, fails, needs more than its share of time or memory,
    or takes messages apart in a way that cannot be followed.
    """
    roles = shape_of(messages)
    key = (source, tuple(control), tuple(special.items()), roles, tuple(views))
    known = _skeletons.get(key) if roles else None
    if known and (found := known.fill(messages)):
        return found
    request = {"source": source, "control": list(control), "special": special, "messages": list(messages)}
    roles = None if key in _skeletons or any(map(SPACE.search, control)) else roles  # to trace
    try:
        request = json.dumps(request | {"views": list(views), "roles": roles}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the messages hold what JSON has no form for: {error!s:.100}") from None
    answer = renderer().ask(request)
    if "error" in answer:
        raise ValueError(answer["error"])
    found = [Rendered(text, [tuple(span) for span in spans]) for text, spans in answer["rendered"]]
    if roles:
        keep(key, answer["traced"], spelling(control), messages, found)
    return found


def keep(key: tuple, traced: dict | None, spelled: re.Pattern, messages: Sequence[dict], found: list[Rendered]) -> None:
    """Remembers the skeletons of this shape, or that it has none, if they make of these messages what the template does."""
    skeletons = None
    if traced:
        views = [
            [(p, [match.span() for match in spelled.finditer(p)]) if isinstance(p, str) else tuple(p) for p in parts]
            for parts in traced["views"]
        ]
        skeletons = Skeletons(views, traced["clock"])
        filled = skeletons.fill(messages)
        if filled is None:
            return  # another conversation will tell
        skeletons = skeletons if filled == found else None
    if len(_skeletons) >= MOST_SKELETONS:
        _skeletons.clear()
    _skeletons[key] = skeletons


def spelling(control: Sequence[str]) -> re.Pattern:
    """Finds control tokens, of several the longest."""
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


_skeletons: dict[tuple, Skeletons | None] = {}  # by template, tokens, roles and views


class Renderer:
    """The child process. One request at a time; one that ended is started again."""

    def __init__(self):
        self.pid, self.lock, self.child = os.getpid(), threading.Lock(), None

    def ask(self, request: bytes) -> dict:
        with self.lock:
            if self.child is None:
                home = str(Path(__file__).resolve().parent.parent)
                code = f"import sys; sys.path.insert(0, {home!r}); from data.templates import serve; serve()"
                self.child = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            try:
                write_message(self.child.stdin, request)
                answer = read_message(self.child.stdout)
            except BrokenPipeError:
                answer = None
            except BaseException:  # Ctrl-C, half way through an answer
                self.end()
                raise
            if answer is None:
                code = self.end()
                slow = code == -signal.SIGPROF
                why = "takes too long" if slow else f"ends the process that renders it ({code})"
                raise ValueError(f"the chat template {why}: its time is {seconds_for(request):.0f} s")
        return json.loads(answer.decode("utf-8", "surrogatepass"))

    def end(self) -> int | None:
        """Ends the child, and says how it ended."""
        if self.child is None or os.getpid() != self.pid:
            return None
        child, self.child = self.child, None
        with suppress(BrokenPipeError):  # what a dead child did not read is still in the buffer
            child.stdin.close()
        child.stdout.close()
        try:
            return child.wait(1)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()


def seconds_for(request: bytes) -> float:
    """CPU time that a request may take: two seconds, and one more for each megabyte of messages."""
    return SECONDS + len(request) / 2**20


def renderer() -> Renderer:
    """This process's own: a forked one must not share its parent's pipe."""
    global _renderer
    if _renderer is None or _renderer.pid != os.getpid():
        _renderer = Renderer()
        atexit.register(_renderer.end)
    return _renderer


_renderer: Renderer | None = None


def write_message(file, message: bytes) -> None:
    file.write(struct.pack("<Q", len(message)) + message)
    file.flush()


def read_message(file) -> bytes | None:
    """None at the end."""
    head = file.read(8)
    if len(head) < 8:
        return None
    size = struct.unpack("<Q", head)[0]
    message = file.read(size)
    return message if len(message) == size else None


# --- inside ---


def serve() -> None:
    """The child: a request in, an answer out, until its parent closes the pipe."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, out = sys.stdin.buffer, sys.stdout.buffer
    while (message := read_message(source)) is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds_for(message))  # its signal ends the process, whatever it is doing
        try:
            answer = answer_to(**json.loads(message))
            answer = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except MemoryError:
            answer = json.dumps({"error": f"the chat template needs more than {MEMORY >> 20} MB of memory"}).encode()
        except ValueError as error:
            answer = json.dumps({"error": str(error)}).encode()
        except RecursionError:
            answer = json.dumps({"error": "the chat template or its messages are nested too deeply"}).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_message(out, answer)


def answer_to(source: str, control: list[str], special: dict, messages: list, views: list, roles: list | None) -> dict:
    """The answer to one request. roles: those of the messages, where the template is to be traced."""
    now = datetime.datetime.now()
    plain = compile_template(source, now)
    if not views:
        return {"rendered": []}
    messages = [known(message) for message in messages]
    size, given = len(str(messages)), json.dumps([source, special, messages], ensure_ascii=False)
    alphabet, spelled = Alphabet.apart(tuple(control), given), spelling(control)
    following, held, found = follow(source, now, alphabet), alphabet.messages(messages), []
    for n, prompt in views:
        variables = special | {"add_generation_prompt": prompt, "tools": None, "documents": None}
        text = written(plain, variables | {"messages": messages[:n]}, size)
        followed = written(following, variables | {"messages": held[:n]}, size)
        if alphabet.real(followed) != text:
            raise ValueError("the chat template takes messages apart in a way that cannot be followed")
        found.append(Rendered(text, [match.span() for match in spelled.finditer(followed)]))
    return {"rendered": found, "traced": roles and trace(source, special, roles, views, now)}


def known(message: dict) -> dict:
    """The message as HF's code passes it on: without what is null, and thoughts under the names that templates look for."""
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = [message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message]
    return {"thinking": thoughts[0], **message, "reasoning_content": thoughts[0]} if thoughts else message
