"""The rewards in rewards/: what is right, what is wrong, and a judge that is busy, away or talkative."""

import json
import threading
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import llm_judge, style, verify


@pytest.mark.parametrize(
    "response, answer, right",
    [
        ("The answer is 42.", "42", 1),
        ("#### 1,234", "Natalia sold 1234 clips.\n#### 1234", 1),
        ("It costs $18.00 in all", "#### 18", 1),
        ("7 + 5 = 12, so 13", "12", 0),
        ("\\boxed{3/4} of 100", "0.75", 1),
        ("<answer>-5</answer> and 6", "-5", 1),
        ("I do not know", "3", 0),
        ("", "3", 0),
        ("1/0", "3", 0),
        (".5", "1/2", 1),
        ("about 1.234.567", "567", 0),
        ("10", 10, 1),
        ("7-5", "5", 1),
        ("(-5)", "-5", 1),
    ],
)
def test_numbers(response, answer, right):
    assert verify.number([response], [answer]) == [right]


@given(st.fractions(max_denominator=999), st.text(alphabet="abc .,\n", max_size=20))
def test_any_number_is_found_behind_any_words(value, words):
    assert verify.final_number(f"{words} {value}") == value
    assert verify.final_number(f"9 8 7 #### {value}") == value


@given(st.integers(-(10**12), 10**12))
def test_thousands_may_have_commas(value):
    assert verify.final_number(f"{value:,}") == Fraction(value) == verify.final_number(f"it is {value}.")


def test_an_answer_without_a_number_is_an_error_that_shows_it():
    with pytest.raises(ValueError, match="'seven' has no number"):
        verify.number(["7"], ["seven"])


def test_texts():
    assert verify.exact(["  Paris. ", "paris", "Paris, France"], ["Paris"] * 3) == [1, 1, 0]
    assert verify.contains(["It is Paris.", "Parisian", "", "x"], ["paris", "Paris", "Paris", ""]) == [1, 0, 0, 0]
    assert verify.regex(["a1", "b"], [r"\d", r"\d"]) == [1, 0]


@given(st.lists(st.sampled_from("the cat sat on a mat".split()), max_size=40))
def test_penalties_are_bounded_and_zero_for_short_or_fresh_texts(words):
    (repeated,) = style.repetition([" ".join(words)])
    assert -1 <= repeated <= 0
    assert style.repetition([" ".join(map(str, range(len(words))))]) == [0]
    assert style.brief([" ".join(words)]) == [0]


def test_form():
    assert style.brief(["w " * 60, "w " * 90, "w " * 500]) == [0, -0.5, -1]
    assert style.repetition(["a b c a b c"]) == [3 / 4 - 1]
    good = "<think>so</think>\n<answer>4</answer>"
    assert style.reasoned([good, "x" + good, good + good, "<think></think><answer>4</answer>", ""]) == [1, 0, 0, 0, 0]


@contextmanager
def server(monkeypatch, *replies):
    """A judge that gives these (status, content) one after the other, the last one for ever; yields what it was asked."""
    asked, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            with lock:
                status, content = replies[min(len(asked), len(replies) - 1)]
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": content}}]}).encode())

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{http.server_port}/v1")
    monkeypatch.setenv("JUDGE_MODEL", "m")
    try:
        yield asked
    finally:
        http.shutdown()
        http.server_close()


def test_the_judge_grades_every_response(monkeypatch):
    with server(monkeypatch, (200, "7")) as asked:
        assert llm_judge.judge(["p"] * 20, [f"r{i}" for i in range(20)]) == [0.7] * 20
    assert {f"r{i}" in json.dumps(asked) for i in range(20)} == {True} and asked[0]["temperature"] == 0


def test_a_busy_judge_is_asked_again(monkeypatch):
    with server(monkeypatch, (503, ""), (200, "Grade: 10")) as asked:
        assert llm_judge.judge(["p"], ["r"]) == [1.0] and len(asked) == 2


@pytest.mark.parametrize(
    "reply, error, said",
    [
        ((400, ""), OSError, "400"),
        ((200, "splendid"), ValueError, "splendid"),
        ((200, "11"), ValueError, "from 0 to 10"),
    ],
)
def test_a_judge_that_cannot_be_used_is_named(monkeypatch, reply, error, said):
    with server(monkeypatch, reply) as asked, pytest.raises(error, match=said):
        llm_judge.judge(["p"], ["r"])
    assert len(asked) == 1


def test_a_judge_that_is_away(monkeypatch):
    with server(monkeypatch, (200, "1")):
        pass  # its port is free again
    monkeypatch.setenv("JUDGE_SECONDS", "0.5")
    with pytest.raises(OSError, match="did not answer"):
        llm_judge.judge(["p"], ["r"])
    monkeypatch.delenv("JUDGE_MODEL")
    with pytest.raises(ValueError, match="set both"):
        llm_judge.judge(["p"], ["r"])
