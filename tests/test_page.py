"""The page in a real browser, against the real server: it streams, it stores votes, and no text becomes markup."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import tiny_server
import torch
from tiny import ROOT

from data.tokenizer import load_tokenizer
from rlhf.feedback.schema import VOTES
from rlhf.feedback.store import FeedbackStore
from rlhf.reward.files import load_reward_model
from rlhf.serve.api import whole_page

PAGE = ROOT / "rlhf" / "serve" / "page"
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)> & <b>bold</b>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAIRS = 12


def test_nothing_is_fetched_and_nothing_becomes_markup():
    """What a reader of the source would look for."""
    text = whole_page()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", text)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|@import|url\(""", text)
    assert not re.search(r"<[^>]+\son\w+\s*=", text.partition("<script>")[0])  # no handlers in attributes
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
    labels = set(re.findall(r'<label for="(\w+)"', text))
    assert labels == set(re.findall(r'<(?:input|select|textarea) id="(\w+)"', text))


class Outline(HTMLParser):
    """Whether every tag that is opened is closed, and every id is there once."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [] and len(set(self.ids)) == len(self.ids), (self.open, sorted(self.ids))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "link", "input", "br", "hr", "img"):
            self.open.append((tag, self.getpos()))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, (tag, self.getpos())


def test_the_files_are_one_page():
    """What the server puts together parses, every file is in it, and what the scripts look up by id is there."""
    names = re.findall(r"\{\{([^}]*)\}\}", (PAGE / "skeleton.html").read_text(encoding="utf-8"))
    assert sorted(names) == sorted(file.name for file in PAGE.iterdir() if file.name != "skeleton.html")
    text = whole_page()
    outline = Outline(text)
    assert outline.tags.count("script") == outline.tags.count("style") == 1 and outline.tags[0] == "html"
    script = text.partition("<script>")[2]
    assert set(re.findall(r"""(?:\$|show)\("([\w-]+)\"""", script)) <= set(outline.ids)
    for name in re.findall(r"""addView\("(\w+)\"""", script):
        assert f"view-{name}" in outline.ids


def fill(path) -> FeedbackStore:
    store = FeedbackStore(path, repeats=0)
    for i in range(PAIRS):
        prompt = store.add_prompt(f"prompt {i}")
        a = store.add_completion(prompt, store.add_model("secret-base"), f"bad {i}")
        b = store.add_completion(prompt, store.add_model("secret-tuned"), f"good {i} {HOSTILE}")
        store.make_comparison(a, b, raters=9)
    return store


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tiny_server.build(tmp_path_factory.mktemp("paged"))
    fill(home / "feedback.sqlite")
    return home


@pytest.fixture(scope="module")
def server(home):
    options = "--max_batch=4 --cache_tokens=512 --reward=reward.py:length --reference=lm --feedback=feedback.sqlite"
    with tiny_server.serving(home, *options.split()) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no browser: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=program, args=["--no-sandbox"]
        )  # root in a container has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """An open page; afterwards it must have said nothing on the console and asked nobody but the server."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page, said, asked = context.new_page(), [], set()
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    page.on("request", lambda request: asked.add(request.url.split("/")[2]))
    page.goto(server.url)
    page.wait_for_function("document.getElementById('model').textContent === 'lm'")
    yield page
    said = [text for text in said if not text.startswith("Failed to load resource")]  # chromium's word for status 400
    assert said == [] and asked == {server.url.split("/")[2]}
    context.close()


def chat(page, text: str, tokens: int = 12) -> None:
    page.fill("#say", text)
    page.evaluate(f"max_tokens.value = {tokens}; seed.value = 1")
    page.press("#say", "Enter")


def accessible(page) -> list:
    """What axe-core finds wrong; skips where it is not installed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    return [(v["id"], [n["html"] for n in v["nodes"]]) for v in axe.Axe().run(page).response["violations"]]


@pytest.mark.slow
def test_chat_streams_and_shows_its_tokens(page, server):
    assert page.title() == "Chat – plain-rlhf"
    chat(page, "a good film " + HOSTILE)
    page.wait_for_selector("text=Look at the tokens")
    user, answer = page.query_selector_all("#log .text")
    assert user.text_content() == "a good film " + HOSTILE
    body = {"messages": [{"role": "user", "content": user.text_content()}], "max_tokens": 12, "seed": 1}
    assert answer.text_content() == server.request("/v1/chat/completions", body)[2]["choices"][0]["message"]["content"]
    assert page.get_attribute("#log", "aria-busy") == "false"

    page.click("text=Look at the tokens")
    page.wait_for_selector(".token")
    spans = page.query_selector_all(".token")
    assert "".join(span.text_content() for span in spans) == answer.text_content()
    page.focus(".token")
    page.keyboard.press("ArrowRight")
    assert "token 2 of" in page.text_content(".microscope [role=status]")
    page.select_option(".microscope select", "reward")
    assert spans[-1].evaluate("span => getComputedStyle(span).getPropertyValue('--part')") == "60%"
    assert (
        spans[-1].evaluate("span => span.style.getPropertyValue('--hue')") == "var(--warm)"
    )  # above 0, as in the report
    assert len(page.query_selector_all(".microscope tbody tr")) == len(spans)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert accessible(page) == []


@pytest.mark.slow
def test_a_streamed_answer_with_a_script_stays_text(page):
    """The tiny model never says it, so the browser is handed the server's words."""
    events = [
        {"choices": [{"delta": {"content": part}, "finish_reason": None}]} for part in (HOSTILE[:20], HOSTILE[20:])
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    chat(page, "hello")
    page.wait_for_selector("text=Look at the tokens")
    assert page.query_selector_all("#log .text")[1].text_content() == HOSTILE
    assert page.query_selector("#log script, #log img, #log b") is None and page.title() == "Chat – plain-rlhf"


@pytest.mark.slow
def test_stop_and_errors(page, server):
    chat(page, "a good film", tokens=10_000)
    page.wait_for_selector("#problem:visible")  # more than the server gives
    assert "max_tokens" in page.text_content("#problem") and page.input_value("#say") == "a good film"
    page.evaluate("max_tokens.value = 100; seed.value = ''")
    page.press("#say", "Enter")
    page.wait_for_selector("#stop:visible")
    page.evaluate("document.getElementById('stop').click()")  # may come too late: the model is tiny
    page.wait_for_selector("#stop", state="hidden")
    assert page.text_content("#chat-status") in ("Stopped", "", "Cut off: most tokens reached")


@pytest.mark.slow
def test_an_answer_that_is_broken_off_is_no_part_of_the_next_conversation(page):
    page.fill("#say", "a bad film")
    with page.expect_request("**/v1/chat/completions"):
        page.evaluate("document.getElementById('send').click(); document.getElementById('clear').click()")
    page.wait_for_selector("#stop", state="hidden")
    with page.expect_request("**/v1/chat/completions") as sent:
        chat(page, "a good film")
    page.wait_for_selector("text=Look at the tokens")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "a good film"}]


def standing(home, rater: str) -> list[dict]:
    return [dict(row) for row in FeedbackStore(home / "feedback.sqlite")._read(VOTES) if row["rater"] == rater]


def press(page, key: str, says: str) -> None:
    page.keyboard.press(key)
    page.wait_for_function("says => document.getElementById('compare-status').textContent.includes(says)", arg=says)


@pytest.mark.slow
def test_comparisons_by_keyboard(page, home):
    page.click("text=Compare")
    page.fill("#rater", "ana")
    page.press("#rater", "Enter")
    page.wait_for_selector("#comparison:visible")
    assert "secret" not in page.content()
    seen = [(page.text_content("#left"), page.text_content("#right"))]
    assert (
        any(HOSTILE in text for text in seen[0]) and page.query_selector("#comparison script, #comparison img") is None
    )
    assert accessible(page) == []
    for number, key in enumerate(["2", "a", "ArrowRight", "t", "x", "s"]):
        if key == "2":
            page.keyboard.press(key)  # clearly
        else:
            press(page, key, f"{number} vote")
            seen.append((page.text_content("#left"), page.text_content("#right")))
    votes = standing(home, "ana")
    assert [vote["choice"] for vote in votes] == ["left", "right", "tie", "both_bad", "skip"]
    assert [(vote["left"], vote["right"]) for vote in votes] == seen[:5]
    assert [vote["strength"] for vote in votes] == [2, None, None, None, None]
    assert all(0 <= vote["seconds"] < 600 for vote in votes)
    press(page, "u", "undone")
    assert len(standing(home, "ana")) == 4 and (page.text_content("#left"), page.text_content("#right")) == seen[4]


@pytest.mark.slow
def test_a_lost_answer_is_asked_for_again_and_counts_once(page, home):
    """The vote arrives, the answer does not: the page sends it again with the same nonce."""
    page.click("text=Compare")
    page.fill("#rater", "ben")
    page.press("#rater", "Enter")
    page.wait_for_selector("#comparison:visible")
    lost = []

    def lose_the_first(route):
        response = route.fetch()
        if lost:
            return route.fulfill(response=response)
        lost.append(response.json()["vote"])
        return route.abort()

    page.route("**/vote", lose_the_first)
    press(page, "b", "1 vote")
    (vote,) = standing(home, "ben")
    assert str(vote["vote"]) == lost[0] and vote["choice"] == "right"


@pytest.mark.slow
def test_forty_votes_change_what_the_reward_model_prefers(world, browser):
    """Thirty on the page, ten in the terminal, an export, train_rm.py: what was voted for now wins on new prompts.

    The votes are for the answer that the old reward model likes less, so the ratings alone would say the opposite.
    """
    old = preferred(world, "rm")
    voted, other = (" a mess.", " a joy.") if old < 0.5 else (" a joy.", " a mess.")
    assert old in (0.0, 1.0)  # it is sure, of every prompt
    path = world.path / "forty.sqlite"
    store = FeedbackStore(path, repeats=0)
    for i in range(41):  # one may lie open before the first rater when the second begins
        prompt = store.add_prompt(f"the film number {i} is")
        sides = (store.add_completion(prompt, store.add_model("lm"), text) for text in (voted, other))
        store.make_comparison(*sides)
    with tiny_server.serving(world.path, "--feedback=forty.sqlite", says="no chat: ") as server:
        page = browser.new_page()
        page.goto(server.url + "/#compare")
        page.fill("#rater", "eve")
        page.press("#rater", "Enter")
        page.wait_for_selector("#comparison:visible")
        for number in range(1, 31):
            side = "b" if page.text_content("#right") == voted else "a"
            press(page, side, f"Stored: {side.upper()} is better. {number} vote")
        page.close()
    terminal = subprocess.Popen(
        [sys.executable, "-m", "rlhf.feedback", f"--store={path}", "--rater=dan"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for _ in range(10):  # reads what is shown, as a person would
        shown, side = {}, ""
        while len(shown) < 2:
            assert (line := terminal.stdout.readline()), shown  # it has more to ask
            if head := re.match("--- ([AB]) ", line):
                side = head[1].lower()
            elif side and side not in shown:
                shown[side] = line.strip()
        terminal.stdin.write(next(key for key, text in shown.items() if text == voted.strip()))
        terminal.stdin.flush()
    out, err = terminal.communicate("q", timeout=120)
    assert (terminal.returncode, err) == (0, "") and "10 votes" in out
    rows = [dict(row) for row in store._read(VOTES)]
    assert [sum(row["rater"] == name for row in rows) for name in ("eve", "dan")] == [30, 10]
    store.export_jsonl(world.path / "forty.jsonl")
    command = ["data.prepare", "forty.jsonl", "--tokenizer=data", "--out=forty"]
    done = world.start(command).wait()
    assert (done.code, done.err) == (0, ""), done
    world.ok("train_rm.py", out="rm_forty", preferences="forty", preference_coef=5, epochs=2)
    new = preferred(world, "rm_forty")
    assert (new if voted == " a joy." else 1 - new) > 0.9


def preferred(world, rm: str) -> float:
    """Share of twenty prompts, none of them voted on, where the reward model prefers joy to a mess."""
    tokenizer = load_tokenizer(world.path / "data")
    model = load_reward_model(str(world.path / rm), tokenizer.fingerprint)
    margins = []
    for i in range(100, 120):
        texts = [tokenizer.encode(f"the film number {i} is a {word}.") for word in ("joy", "mess")]
        rows = [torch.tensor([[tokenizer.start, *ids, tokenizer.eos]]) for ids in texts]
        joy, mess = (model.score(r, torch.tensor([r.shape[1]]), torch.ones_like(r, dtype=torch.bool)) for r in rows)
        margins.append(float(joy - mess))
    return sum(margin > 0 for margin in margins) / len(margins)


@pytest.mark.slow
def test_statistics(page, home):
    store = FeedbackStore(home / "feedback.sqlite")
    for _ in range(4):
        store.vote((shown := store.next_comparison("cleo")).id, "cleo", "tie", seconds=3, nonce=f"cleo {shown.id:08}")
    page.click("text=Statistics")
    page.wait_for_selector("#statistics-table table")
    row = page.text_content("#statistics-table tr:has-text('cleo')")
    assert row.startswith("cleo4") and row.endswith("3.00")
    assert accessible(page) == []
