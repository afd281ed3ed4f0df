"""A run while it trains, as the page shows it: what its files say, whatever they hold, and nothing from elsewhere."""

import json
import math
import os
import sys

import pytest
import tiny_server
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_browser import accessible
from tiny_run import HOSTILE, ppo_rows, sample

from rlhf.infra.healthy import HEALTHY, is_outside
from rlhf.serve.live import POINTS, Watched


def write(path, **files):
    """metrics=[...] -> metrics.jsonl, run={...} -> run.json"""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        ending = "jsonl" if isinstance(content, list) else "json"
        text = "".join(json.dumps(x) + "\n" for x in content) if ending == "jsonl" else json.dumps(content)
        (path / f"{name}.{ending}").write_text(text)
    return path


def seen(run) -> dict:
    def strict(x):
        raise ValueError(x)

    return json.loads(Watched(str(run)).seen()[1], parse_constant=strict)


def test_what_the_files_say(tmp_path):
    rows = ppo_rows(20, **{"value/explained_var": 0.0})
    rows[3]["objective/kl"] = None  # it was not finite
    for i, row in enumerate(rows):
        row["objective/entropy"] = 90.0 - 4 * i
    run = write(tmp_path / "ppo", metrics=rows, samples=[sample(1), sample(4)], run={"iterations": 50})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "objective/sco')  # half a line, as it is written
    found = seen(run)
    assert (found["name"], found["done"], found["total"], found["finished"]) == ("ppo", 20, 50, False)
    curves = {curve["name"]: curve for curve in found["curves"]}
    assert list(curves) == ["objective/scores", "objective/kl", "judge/mean", "objective/entropy"]
    kl = curves["objective/kl"]
    assert kl["band"] == [0, 10] and kl["steps"] == [*range(3), *range(4, 20)] and kl["values"][-1] == 9.5
    assert kl["look"] == "" and curves["objective/scores"]["band"] is None
    start = sum(90 - 4 * i for i in range(5)) / 5
    assert curves["objective/entropy"]["band"] == [0.5 * start, 1.25 * start]
    assert curves["objective/entropy"]["look"] == HEALTHY["objective/entropy"].outside  # it ends at 14
    assert found["samples"]["step"] == 4 and len(found["samples"]["rows"]) == 1
    tokens = found["samples"]["rows"][0]["tokens"]
    assert [token["text"] for token in tokens] == ["good", HOSTILE, ""]
    assert tokens[1]["logprob"] == -1.25 and tokens[1]["logratio"] == -0.25 and tokens[2]["logratio"] is None
    assert found["findings"][0].startswith("doctor: ")


def test_the_tag_changes_with_the_files_alone(tmp_path):
    run = write(tmp_path / "ppo", metrics=ppo_rows(5))
    watched = Watched(str(run))
    first = watched.seen()
    assert watched.seen() == first
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(ppo_rows(6)[5]) + "\n")
    tag, content = watched.seen()
    assert tag != first[0] and json.loads(content)["done"] == 6
    write(run, report={"seconds": 3.0})
    os.utime(run / "report.json", (2e9, 2e9))
    assert json.loads(watched.seen()[1])["finished"]
    os.utime(run / "metrics.jsonl", (2.1e9, 2.1e9))  # it goes on
    assert not json.loads(watched.seen()[1])["finished"]
    for done, finished in (
        (6, True),
        (5, True),
        (4, False),
    ):  # where the report says how far it came, copies may have any time
        write(run, report={"iterations": done})
        assert json.loads(watched.seen()[1])["finished"] is finished


def test_a_band_is_left_by_more_than_noise_and_not_by_a_short_run():
    def outside(*values):
        return is_outside("objective/kl", values)

    assert not outside(*[-0.4] * 10) and outside(*[-0.6] * 10) and not outside(*[50.0] * 9) and outside(*[50.0] * 10)
    assert not outside(*[50.0] * 20, *[1.0] * 5)  # it came back
    assert is_outside("policy/ratio_first", [1.0] * 9 + [1.001]) and not is_outside("objective/scores", [-9.0] * 20)


def test_before_the_first_iteration_and_of_other_trainers(tmp_path):
    assert seen(write(tmp_path / "new"))["curves"] == [] and seen(tmp_path / "new")["samples"] is None
    one = seen(write(tmp_path / "one", metrics=ppo_rows(1)))
    assert [curve["name"] for curve in one["curves"]][:2] == ["objective/scores", "objective/kl"]
    rm = [{"step": i, "loss/train": 0.5 / (1 + i), "lr": 0.1 - 0.01 * i, "time/total": 1.0 * i} for i in range(4)]
    assert [curve["name"] for curve in seen(write(tmp_path / "rm", metrics=rm))["curves"]] == ["loss/train", "lr"]
    with pytest.raises(ValueError, match="--run=.*nowhere is not a directory"):
        Watched(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is no run but holds one, rm: --run=.*/one"):
        Watched(str(tmp_path))


@pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 5 * POINTS + 7])
def test_a_long_curve_is_thinned_and_keeps_its_ends(tmp_path, count):
    found = seen(write(tmp_path / "ppo", metrics=ppo_rows(count)))
    kl = next(curve for curve in found["curves"] if curve["name"] == "objective/kl")
    assert kl["steps"][0] == 0 and kl["steps"][-1] == count - 1 and len(kl["steps"]) <= POINTS + 1
    assert kl["values"] == [0.5 * step for step in kl["steps"]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["step", "objective/kl", "objective/scores", "response", "tokens", "logprobs", "score", "iterations"]
)
ROWS = st.lists(st.dictionaries(NAMES, JSON | st.integers(0, 3), max_size=6), max_size=8)


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS, st.dictionaries(NAMES, JSON, max_size=3))
def test_nothing_that_files_hold_breaks_it(tmp_path_factory, metrics, samples, options):
    run = write(tmp_path_factory.mktemp("strange"), metrics=metrics, samples=samples, run=options)
    found = seen(run)
    for curve in found.get("curves", []):
        assert all(math.isfinite(x) for x in curve["values"])


def test_only_files_of_the_run_are_read(tmp_path):
    """A link out of the directory, a pipe, a directory in the place of a file."""
    secret = write(tmp_path / "elsewhere", samples=[sample(3, "secret")], metrics=ppo_rows(9))
    run = write(tmp_path / "ppo", metrics=ppo_rows(2))
    (run / "samples.jsonl").symlink_to(secret / "samples.jsonl")
    found = seen(run)
    assert found["samples"] is None and found["done"] == 2 and "secret" not in json.dumps(found)
    (run / "samples.jsonl").unlink()
    os.mkfifo(run / "samples.jsonl")
    assert "not a regular file" in seen(run)["problem"]
    (run / "samples.jsonl").unlink()
    (run / "run.json").mkdir()
    assert seen(run)["problem"]


def test_a_number_that_rounding_makes_infinite_is_a_problem_said(tmp_path):
    largest = sys.float_info.max
    assert seen(write(tmp_path / "ppo", metrics=[{"step": 0, "objective/kl": largest}]))["problem"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("live")
    return write(home / "ppo", metrics=ppo_rows(9), samples=[sample(4)], run={"iterations": 20})


@pytest.fixture(scope="module")
def server(run):
    with tiny_server.serving(run.parent, "--run=ppo", "--queue=0", init=None) as server:
        yield server


def test_over_http(server, run):
    """No model is there and none is needed; asking again costs nothing; who may not use the server sees nothing of the run."""
    assert server.first_line.startswith("showing ppo at http://127.0.0.1:")
    status, _, health = server.request("/health")
    assert status == 200 and health == {"status": "ok", "model": "ppo", "models": [], "has": ["run"]}
    status, headers, first = server.request("/v1/run")
    assert status == 200 and first["done"] == 9 and first["curves"]
    assert server.request("/v1/run", If_None_Match=headers["ETag"])[0] == 304
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(ppo_rows(10)[9]) + "\n")
    assert server.request("/v1/run", If_None_Match=headers["ETag"])[2]["done"] == 10
    assert server.request("/v1/run", Host="evil.example")[0] == 403
    assert server.request("/v1/run", Sec_Fetch_Site="cross-site")[0] == 403
    assert server.request("/v1/run", method="POST")[0] == 405
    assert server.request("/v1/chat/completions", {"messages": []})[0] == 404
    assert server.request("/v1/run/../../etc/passwd")[0] == 404


@pytest.mark.slow
def test_the_page_follows_the_run(browser, server, run):
    """Curves in front of their bands, tokens with their colours, and all of it newer when the files are; by keyboard too."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector(".curve")
    assert page.title() == "Training \u2013 plain-rlhf" and page.locator("nav a:visible").count() == 1
    assert page.locator(".curve:visible").count() == 4 and page.locator("rect.healthy").count() >= 1
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert f"{done} of 20 iterations" in page.text_content("#run-state")
    assert HOSTILE.replace("\x00", "\ufffd")[:40] in page.text_content("#run-samples")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    before = page.eval_on_selector("#run-samples .token", "x => getComputedStyle(x).backgroundColor")
    page.click("#run-measure button[value=advantage]")
    assert page.eval_on_selector("#run-samples .token", "x => getComputedStyle(x).backgroundColor") != before
    page.focus(".curve svg")
    page.keyboard.press("Home")
    assert page.text_content("#run-point").endswith("iteration 0: 0")
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert accessible(page) == [] and page.evaluate("document.documentElement.scrollWidth") == 360
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(ppo_rows(done + 1)[done]) + "\n")
    page.wait_for_selector(f"#run-state:has-text('{done + 1} of 20')")
    assert page.evaluate("document.activeElement.closest('.curve') !== null")  # who goes along a curve stays there
    assert said == []
    context.close()
