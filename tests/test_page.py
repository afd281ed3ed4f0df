"""The page in a real browser, against the real server: it streams, it stores votes, and no text becomes markup."""

import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import tiny_browser
import tiny_server
import torch
from tiny import ROOT

from data.tokenizer import load_tokenizer
from evaluation.samples import SHADES
from rlhf.feedback.schema import VOTES
from rlhf.feedback.store import FeedbackStore
from rlhf.reward.files import load_reward_model
from rlhf.serve.api import whole_page

PAGE = ROOT / "rlhf" / "serve" / "page"
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)> & <b>bold</b>"
PAIRS = 12
VOID = ("meta", "link", "input", "br", "hr", "img")


def test_nothing_is_fetched_and_nothing_becomes_markup():
    """What a reader of the source would look for."""
    text = whole_page()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", text)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|@import|url\(""", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, and nothing to fetch
    assert not re.search(r"<[^>]+\son\w+\s*=", text.partition("<script>")[0])  # no handlers in attributes
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
    labels = set(re.findall(r'<label[^>]* for="(\w+)"', text))
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
        if tag not in VOID:
            self.open.append((tag, self.getpos()))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, (tag, self.getpos())


def test_the_files_are_one_page():
    """What the server puts together parses, every file is in it once, and what the scripts look up by id is there."""
    names = re.findall(r"\{\{([^}]*)\}\}", (PAGE / "skeleton.html").read_text(encoding="utf-8"))
    assert sorted(names) == sorted(file.name for file in PAGE.iterdir() if file.name != "skeleton.html")
    text = whole_page()
    outline = Outline(text)
    assert outline.tags.count("script") == outline.tags.count("style") == 1 and outline.tags[0] == "html"
    script = text.partition("<script>")[2].partition("</script>")[0]
    assert script.strip().endswith("start();")  # no file has ended the script early
    assert set(re.findall(r"""(?:\$|show)\("([\w-]+)\"""", script)) <= set(outline.ids)
    for name in re.findall(r"""addView\("(\w+)\"""", script):
        assert f"view-{name}" in outline.ids
    declared = re.findall(r"^(?:async )?(?:function\*? |const |class )(\w+)", script, re.MULTILINE)
    assert len(set(declared)) == len(declared), sorted(declared)  # a second function of a name would replace the first


def test_colours_mean_the_same_on_the_page_and_in_the_report():
    """Names and full colours of what both can show."""
    text = (PAGE / "microscope.js").read_text(encoding="utf-8")
    page = {
        name: (words.lower(), float(full))
        for name, words, full in re.findall(r'(\w+): \{ name: "([^"]+)", full: (\d+)', text)
    }
    report = {name: (shade.text.partition(",")[0], shade.scale) for name, shade in SHADES.items()}
    for ours, theirs in {"logratio": "logratio", "logprob": "logprobs", "value": "values"}.items():
        assert page[ours] == report[theirs]


def fill(path) -> FeedbackStore:
    store = FeedbackStore(path, repeats=0)
    for i in range(PAIRS):
        asked = f"prompt {i}" if i else [{"role": "user", "content": "prompt 0"}]
        prompt = store.add_prompt(asked)
        a = store.add_completion(prompt, store.add_model("secret-base"), f"bad {i}")
        b = store.add_completion(prompt, store.add_model("secret-tuned"), f"good {i} {HOSTILE}")
        store.make_comparison(a, b, raters=9)
    return store


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tiny_server.build(tmp_path_factory.mktemp("paged"))
    (home / "other").mkdir()
    tiny_server.build(home / "other", seed=2)
    (home / "lm" / "run.json").write_text(json.dumps({"kl_coef": 0.3, "reward": "out/rm", "data": "out/data/films"}))
    fill(home / "feedback.sqlite")
    return home


@pytest.fixture(scope="module")
def server(home):
    options = (
        "--max_batch=4 --cache_tokens=512 --reward=reward.py:length --reference=other/lm --feedback=feedback.sqlite"
    )
    with tiny_server.serving(home, *options.split()) as server:
        yield server


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
    page.wait_for_selector("#model:has-text('lm')")
    yield page
    said = [text for text in said if not text.startswith("Failed to load resource")]  # chromium's word for status 400
    assert said == [] and asked - {""} == {server.url.split("/")[2]}  # "": a file that it offers
    context.close()


DONE = "#log article.assistant:last-child button:has-text('Tokens')"  # the last answer is whole


def chat(page, text: str, tokens: int = 12) -> None:
    page.fill("#say", text)
    page.evaluate(f"max_tokens.value = {tokens}; seed.value = 1")
    page.press("#say", "Enter")


def kept(page) -> list[dict]:
    """The conversations that the browser keeps, newest first."""
    return page.evaluate("JSON.parse(localStorage.getItem('plain-rlhf talks') ?? '[]')")


def said(page) -> str:
    turn = kept(page)[0]["turns"][-1]
    return turn["answers"][turn["at"]]["text"]


SMALL = """() => [...document.querySelectorAll("a, button, input, select, textarea, summary")].filter(node =>
  node.offsetParent && !node.matches(".skip") && (node.closest("label") ?? node).getBoundingClientRect().height < 40
).map(node => node.outerHTML)"""


def accessible(page) -> None:
    """axe-core finds nothing wrong, nothing is wider than the window, and on a phone every control is 40 pixels high.

    Of the six looks (three widths, dark and light) three: rules on structure differ by width alone, on contrast by theme.
    """
    size = page.viewport_size
    for width, scheme in ((360, "dark"), (768, "light"), (1440, "dark")):
        page.set_viewport_size({"width": width, "height": 740})
        page.emulate_media(color_scheme=scheme)
        assert tiny_browser.accessible(page) == [], (width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 360:
            assert page.evaluate(SMALL) == []
    page.set_viewport_size(size)


def streamed(page, text: str, *more: dict) -> None:
    """The next answers are these words, and more events: the tiny model never says them."""
    parts = [text[:20], text[20:]]
    events = [{"choices": [{"delta": {"content": part}, "finish_reason": None}]} for part in parts]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in [*events, *more]) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))


@pytest.mark.slow
def test_chat_streams_and_shows_its_tokens(page, server):
    assert page.title() == "Chat – plain-rlhf" and page.input_value("#temperature") == "0.7"
    assert "films" in page.text_content(".welcome") and not page.is_visible("#key-box")
    accessible(page)
    chat(page, "a good film " + HOSTILE)
    page.wait_for_selector(DONE)
    asked = page.text_content("#log article.user .text")
    assert asked == "a good film " + HOSTILE
    body = {"messages": [{"role": "user", "content": asked}], "max_tokens": 12, "seed": 1, "temperature": 0.7}
    answer = server.request("/v1/chat/completions", body)[2]["choices"][0]["message"]["content"]
    assert said(page) == answer and page.get_attribute("#log", "aria-busy") == "false"
    tokens = server.request("/v1/tokens", {"messages": body["messages"], "response": answer, "top": 5})[2]["tokens"]
    page.wait_for_selector(".badge")
    assert page.locator(".badge b").all_text_contents() == [
        f"+{len(answer):.2f}",
        f"{sum(t['kl'] for t in tokens):.1f} nats",
    ]

    page.click(DONE)
    page.wait_for_selector(".token")
    assert not page.is_visible(".words")  # in the place of the text, not beside it
    spans = page.query_selector_all(".token")
    assert [span.text_content() for span in spans] == [token["text"] for token in tokens]
    page.focus(".token")
    page.keyboard.press("ArrowRight")
    told = page.text_content(".microscope [role=status]")
    assert f"Log-ratio {minus(tokens[1]['logratio'])} " in told
    assert "marked" in spans[1].get_attribute("class")
    for token, span in zip(tokens, spans):  # 60% of the hue is the full colour, at 3 nats
        part = span.evaluate("span => span.style.getPropertyValue('--part')")
        assert part == f"{int(60 * min(1, abs(token['logratio']) / 3) + 0.5)}%"
        warm = span.evaluate("span => span.style.getPropertyValue('--hue')") == "var(--warm)"  # as in the report
        assert warm == (token["logratio"] >= 0)
    page.keyboard.press("Enter")
    others = page.locator(".alternatives li").all()
    assert [other.locator(".share").first.text_content() for other in others] == [
        percent(t["logprob"]) for t in tokens[1]["top"]
    ]
    accessible(page)
    page.keyboard.press("Escape")
    assert not page.is_visible(".alternatives")
    page.click("text=As a table")
    assert page.locator(".microscope tbody tr").count() == len(tokens)
    page.click(DONE)
    assert page.is_visible(".words") and page.query_selector(".token") is None


def minus(x: float) -> str:
    return f"{x:.3f}".replace("-", "\u2212")


def percent(logprob: float) -> str:
    share = 100 * 2.718281828459045**logprob
    return f"{share:.{1 if share < 10 else 0}f}%" if share >= 0.05 else "< 0.1%"


@pytest.mark.slow
def test_answers_are_regenerated_continued_edited_and_kept(page, server):
    chat(page, "a good film")
    page.wait_for_selector(DONE)
    first = said(page)
    page.evaluate("seed.value = 2")
    page.click("[aria-label=Regenerate]")
    page.wait_for_selector("text=2 / 2")
    assert said(page) != first
    page.click("[aria-label='Previous answer']")
    page.wait_for_selector("text=1 / 2")
    assert said(page) == first
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click(".tools >> text=Continue")
    assert sent.value.post_data_json["messages"][-1] == {"role": "assistant", "content": first}
    page.wait_for_selector(DONE)
    longer = said(page)
    assert longer.startswith(first) and len(longer) > len(first)
    chat(page, "and then")
    page.wait_for_selector("[data-turn='3'] button:has-text('Tokens')")
    page.click("[data-turn='0'] [aria-label=Edit]")
    page.fill("#log form textarea", "a bad film")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click("text=Ask again")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "a bad film"}]
    page.wait_for_selector(DONE)
    (one,) = kept(page)
    assert len(one["turns"]) == 2

    page.reload()
    page.click("#open-history")
    page.click("#talks .open")
    page.wait_for_selector(DONE)
    assert page.text_content("#log article.user .text") == "a bad film"
    page.click("#open-history")
    with page.expect_download() as offered:
        page.click("#export")
    (line,) = [json.loads(line) for line in offered.value.path().read_text(encoding="utf-8").splitlines()]
    answer = one["turns"][1]["answers"][0]
    assert line["messages"] == [
        {"role": "user", "content": "a bad film"},
        {"role": "assistant", "content": answer["text"]},
    ]
    again = {
        "messages": line["messages"][:1],
        "max_tokens": 12,
        **{name: answer[name] for name in ("seed", "temperature")},
    }
    assert server.request("/v1/chat/completions", again)[2]["choices"][0]["message"]["content"] == answer["text"]
    accessible(page)
    page.click("[aria-label='Delete this conversation']")
    assert kept(page) == []


@pytest.mark.slow
def test_a_text_is_continued(page, server):
    page.click("[data-mode=text]")
    chat(page, "the story is")
    page.wait_for_selector(DONE)
    body = {"prompt": "the story is", "max_tokens": 12, "seed": 1, "temperature": 0.7}
    text = server.request("/v1/completions", body)[2]["choices"][0]["text"]
    assert page.text_content(".words") == "the story is" + text


@pytest.mark.slow
def test_errors_stand_where_the_answer_would(page, server):
    chat(page, "a good film", tokens=10_000)
    page.wait_for_selector("#log .card.bad")  # more than the server gives
    assert "max_tokens" in page.text_content("#log .card.bad")
    accessible(page)
    page.evaluate("max_tokens.value = ''")  # now the page's own length, which the context cuts
    page.click("text=Retry")
    page.wait_for_selector(DONE)
    assert page.query_selector("#log .card.bad") is None and len(kept(page)[0]["turns"]) == 2

    def asked(n, **more):
        body = {"messages": [{"role": "user", "content": "a film " * n}], "temperature": 0.7, **more}
        return server.request("/v1/chat/completions", body)[2]

    n = next(n for n in range(10, 60) if asked(n, max_tokens=1)["usage"]["prompt_tokens"] > 115)
    seed = next(seed for seed in range(99) if asked(n, seed=seed)["choices"][0]["finish_reason"] == "length")
    page.click("#clear")
    page.fill("#say", "a film " * n)
    page.evaluate(f"seed.value = {seed}")
    page.press("#say", "Enter")
    page.wait_for_selector(
        "text=fills what the model can read"
    )  # the page's length did not fit: what is left was taken
    page.click("#log .card >> text=New conversation")
    page.fill("#say", "a film " * 200)
    page.press("#say", "Enter")
    page.wait_for_selector("text=The model cannot read any more")
    page.click("#log .card.bad >> text=New conversation")
    assert page.is_visible(".welcome")

    page.route("**/v1/chat/completions", lambda route: route.abort())
    chat(page, "a good film")
    page.wait_for_selector("text=the server cannot be reached")
    page.unroute("**/v1/chat/completions")
    streamed(page, "It began well", {"error": {"message": "the server stops", "code": None}})
    page.click("text=Retry")
    page.wait_for_selector("text=The answer broke off")
    assert page.text_content(".words") == said(page) == "It began well"
    page.unroute("**/v1/chat/completions")
    page.click("text=Retry")
    page.wait_for_selector("text=2 / 2")

    def keyed(route):
        if route.request.headers.get("authorization") == "Bearer sesame":
            return route.continue_()
        error = {"error": {"message": "a key is needed", "code": "invalid_api_key"}}
        return route.fulfill(status=401, json=error)

    page.route("**/v1/**", keyed)
    page.fill("#say", "and then")
    page.press("#say", "Enter")
    page.wait_for_selector("#key-box:visible")
    page.fill("#key", "sesame")
    page.press("#key", "Enter")
    page.click("text=Retry")
    page.wait_for_selector("[data-turn='3'] button:has-text('Tokens')")
    assert not page.is_visible("#key-box")


@pytest.mark.slow
def test_the_page_follows_what_is_written_unless_its_reader_went_up(page):
    streamed(page, "line\n\n" * 60)
    chat(page, "hello")
    page.wait_for_selector(DONE)
    below = "document.documentElement.scrollHeight - innerHeight - scrollY"
    assert page.evaluate(below) < 2
    page.mouse.move(180, 300)
    page.mouse.wheel(0, -500)
    page.wait_for_selector("#latest:visible")
    there = page.evaluate("scrollY")
    page.evaluate("$('log').append('more'); follow()")
    assert page.evaluate("scrollY") == there
    page.click("#latest")
    assert page.evaluate(below) < 2


@pytest.mark.slow
def test_stop_and_a_new_conversation(page):
    """An answer that is broken off is no part of what comes next."""
    page.fill("#say", "a bad film")
    with page.expect_request("**/v1/chat/completions"):
        page.evaluate("document.getElementById('send').click(); document.getElementById('stop').click()")
    page.wait_for_selector("#stop", state="hidden")
    with page.expect_request("**/v1/chat/completions"):
        page.evaluate("$('say').value = 'another'; $('send').click(); $('clear').click()")
    page.wait_for_selector("#stop", state="hidden")
    with page.expect_request("**/v1/chat/completions") as sent:
        chat(page, "a good film")
    page.wait_for_selector(DONE)
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "a good film"}]


# ---- markdown

WRITTEN = [
    "One *two* **three** ***four*** `five * six` and snake_case_names, 2 * 3 * 4.",
    "# Title\n\nText under it\nin two lines.\n\n## Part\n\n#### Deeper\n\n---\n\nEnd",
    "- a\n- b\n  - c\n  - d\n- e **f**\n\nafter",
    "1. one\n2. two\n   - inside\n   - more\n3. three",
    "3) third\n4) fourth",
    "```python\ndef f(x):\n    return x * 2  # **no**\n\n```\nafter",
    "~~~\n<b>&amp;\n~~~",
    "> quoted *words*\n> more\n\nnot",
    "| a | b |\n|---|:-:|\n| 1 | **2** |\n| 3 | `4` |\n\nafter",
    "a \\*b\\* c **not closed and *neither this",
    "Steps:\n\n1. first\n\n   more of it\n\n2. second",
    HOSTILE,
    "``a ` b`` and `",
    "**bold *inside* it** and *em **strong** em*",
]


class Tree(HTMLParser):
    """HTML as nested lists of names and texts; what the page leaves out of Markdown's HTML is left out."""

    def __init__(self, html: str):
        super().__init__()
        self.root = self.at = ["root"]
        self.stack = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        tag = re.sub("h[1-6]", "h", tag)
        if tag == "div":
            return
        node = [tag]
        self.at.append(node)
        if tag not in VOID:
            self.stack.append(self.at)
            self.at = node

    def handle_endtag(self, tag):
        if tag not in ("div", *VOID):
            self.at = self.stack.pop()

    def handle_data(self, text):
        if self.at[0] == "code" and len(self.stack) > 1 and self.stack[-1][0] == "pre":
            text = text.rstrip("\n")
        elif self.at[0] not in ("code", "p", "em", "strong", "li", "h", "td", "th"):
            text = text.strip()
        if text.strip("\n"):
            self.at.append(text)


def tidy(node):
    """Texts joined; a paragraph that is alone in its item is the item."""
    if isinstance(node, str):
        return node
    children = []
    for child in map(tidy, node[1:]):
        if isinstance(child, str) and children and isinstance(children[-1], str):
            children[-1] += child
        else:
            children.append(child)
    children = [child for child in children if not isinstance(child, str) or child.strip()]
    if node[0] == "li":
        children = [x for child in children for x in (child[1:] if child[0] == "p" else [child])]
    return [
        node[0],
        *(child.strip() if isinstance(child, str) and node[0] in ("li", "td", "th") else child for child in children),
    ]


def rendered(page, texts: list[str]) -> list[str]:
    return page.evaluate(
        "texts => texts.map(text => { const node = make('div'); node.append(markdown(text)); return node.innerHTML; })",
        texts,
    )


@pytest.mark.slow
def test_markdown_is_read_as_others_read_it(page):
    """markdown-it without HTML, links and images; whatever is written, only these tags come of it, and no word is lost."""
    other = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    oracle = other.MarkdownIt("commonmark", {"html": False}).enable("table")
    oracle.disable(
        ["link", "image", "autolink", "entity", "html_inline", "html_block", "reference", "lheading", "code"]
    )
    for text, ours in zip(WRITTEN, rendered(page, WRITTEN)):
        assert tidy(Tree(ours).root) == tidy(Tree(oracle.render(text)).root), text

    draw = random.Random(1)
    marks = ["a", "b", " ", "\n", "*", "_", "`", "#", ">", "-", "|", "1.", "\\", "<", "&", "**", "  - ", "|-|\n"]
    texts = ["".join(draw.choices(marks, k=draw.randint(1, 60))).replace("```", "") for _ in range(500)]
    texts += [mark * 20_000 for mark in ("*", "`", "_a", "a_", "> ", "- ", "|", "**a ", "`a``")]  # takes no time either
    allowed = {"p", "h", "em", "strong", "code", "pre", "ul", "ol", "li", "blockquote", "hr", "root"}
    allowed |= {"table", "thead", "tbody", "tr", "th", "td"}
    for text, html in zip(texts, rendered(page, texts)):
        tree = Tree(html).root
        assert names(tree) <= allowed
        assert re.sub("[^ab]", "", "".join(words(tree))) == re.sub("[^ab]", "", text)


def names(node) -> set[str]:
    return {node[0]}.union(*(names(child) for child in node[1:] if not isinstance(child, str)))


def words(node):
    for child in node[1:]:
        yield from [child] if isinstance(child, str) else words(child)


@pytest.mark.slow
def test_a_streamed_answer_is_formatted_and_a_script_stays_text(page):
    streamed(page, f"**{HOSTILE}**\n\n- one\n- two\n\n```\n{HOSTILE}\n```")
    chat(page, "hello")
    page.wait_for_selector(DONE)
    assert page.text_content(".words strong") == page.text_content(".words pre") == HOSTILE
    assert page.locator(".words li").count() == 2
    assert page.query_selector("#log script, #log img, #log b") is None and page.title() == "Chat – plain-rlhf"
    page.unroute("**/v1/chat/completions")
    long = "x" * 300  # nothing is so wide that the page is
    streamed(page, f"# {long}\n\n{long}\n\n- {long}\n\n|{'a|' * 40}\n|{'-|' * 40}\n|{'b|' * 40}\n\n```\n{long}\n```")
    chat(page, long)
    page.wait_for_selector(".words td")
    accessible(page)


# ---- votes


def standing(home, rater: str) -> list[dict]:
    return [dict(row) for row in FeedbackStore(home / "feedback.sqlite")._read(VOTES) if row["rater"] == rater]


@pytest.mark.slow
def test_side_by_side(page, home, server):
    page.click("text=Side by side")
    accessible(page)
    page.set_viewport_size({"width": 1000, "height": 740})
    chat(page, "a good film")
    page.wait_for_selector(".duel .votes")
    assert "reference" not in page.text_content(".duel") and page.query_selector(".duel .badge") is None  # blind
    accessible(page)
    messages = [{"role": "user", "content": "a good film"}]
    body = {"messages": messages, "max_tokens": 12, "seed": 1, "temperature": 0.7}
    answers = {}
    for model in ("lm", "lm:reference"):
        answers[model] = server.request("/v1/chat/completions", body | {"model": model})[2]["choices"][0]["message"][
            "content"
        ]
    page.fill(".voter input", "dora")
    page.click(".duel >> text=B is better")
    page.wait_for_selector(".verdict")
    (vote,) = standing(home, "dora")
    assert {vote[f"{side}_model"]: vote[side] for side in ("left", "right")} == answers
    assert vote["choice"] == "right" and json.loads(vote["prompt"]) == messages
    assert page.locator(".duel .who").all_text_contents() == [vote["left_model"], vote["right_model"]]
    assert f"you prefer {vote['right_model']}" in page.text_content(".verdict")
    page.wait_for_function("() => document.querySelectorAll('.duel .badge').length === 6")  # score, KL, length
    for column in page.locator(".duel .sides article").all():
        model, (score, kl, _) = column.locator(".who").text_content(), column.locator(".badge b").all_text_contents()
        asked = {"model": model, "messages": messages, "response": answers[model]}
        tokens = server.request("/v1/tokens", asked)[2]["tokens"]
        assert (score, kl) == (f"+{len(answers[model]):.2f}", f"{sum(t['kl'] for t in tokens):.1f} nats")
    page.uncheck("#blind")
    chat(page, "a bad film")
    page.wait_for_function("() => document.querySelectorAll('.duel .badge').length === 12")
    assert page.query_selector(".duel:last-child .votes") is None  # a vote is taken blind, or not at all


def press(page, key: str, says: str, place: str = "") -> None:
    """A key, until the page says that it has worked and shows which comparison comes next."""
    page.keyboard.press(key)
    page.wait_for_function(
        "([says, place]) => $('compare-status').textContent.includes(says) && $('progress-text').textContent.startsWith(place)",
        arg=[says, place],
    )


def begin(page, rater: str) -> None:
    page.click("nav >> text=Compare")
    page.fill("#rater", rater)
    page.press("#rater", "Enter")
    page.wait_for_selector("#comparison:visible")


def sides(page) -> tuple[str, str]:
    return page.text_content("#left"), page.text_content("#right")


@pytest.mark.slow
def test_comparisons_by_keyboard(page, home):
    begin(page, "ana")
    total = len(FeedbackStore(home / "feedback.sqlite")._read("SELECT 1 FROM pair WHERE raters = 9"))
    assert page.text_content("#progress-text") == f"1 of {total}" and "secret" not in page.content()
    seen = [sides(page)]
    assert any(HOSTILE in text for text in seen[0])
    assert page.query_selector("#comparison script, #comparison img") is None
    assert page.text_content("#prompt .said").endswith("prompt 0")
    accessible(page)
    page.evaluate("$('left').textContent = 'word '.repeat(3000)")  # the answer scrolls, the vote stays in sight
    assert page.evaluate("$('left').scrollHeight > $('left').clientHeight && scrollY === 0")
    assert page.evaluate("$('votes').getBoundingClientRect().bottom <= innerHeight")
    page.keyboard.press("2")  # clearly
    assert page.get_attribute("#strength [data-strength='2']", "aria-pressed") == "true"
    for number, key in enumerate(["a", "ArrowRight", "t", "x", "s"], start=2):
        press(page, key, "Skipped" if key == "s" else "Stored", f"{number} of")
        seen.append(sides(page))
    votes = standing(home, "ana")
    assert [vote["choice"] for vote in votes] == ["left", "right", "tie", "both_bad", "skip"]
    assert [(vote["left"], vote["right"]) for vote in votes] == seen[:5]
    assert [vote["strength"] for vote in votes] == [2, None, None, None, None]
    assert all(0 <= vote["seconds"] < 600 for vote in votes)
    press(page, "u", "undone", "5 of")
    assert len(standing(home, "ana")) == 4 and sides(page) == seen[4]

    page.click("text=Statistics")
    page.wait_for_selector("#by-rater article")
    ana = page.text_content("#by-rater article:has-text('ana')")
    assert "4 votes" in ana and "1 both bad" in ana and "\u2013" not in ana
    accessible(page)


@pytest.mark.slow
def test_a_lost_answer_is_asked_for_again_and_counts_once(page, home):
    """The vote arrives, the answer does not: the page sends it again with the same nonce."""
    begin(page, "ben")
    lost = []

    def lose_the_first(route):
        response = route.fetch()
        if lost:
            return route.fulfill(response=response)
        lost.append(response.json()["vote"])
        return route.abort()

    page.route("**/vote", lose_the_first)
    press(page, "b", "Stored")
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
    for i in range(41):  # one lies open before the second rater while the first one votes
        prompt = store.add_prompt(f"the film number {i} is")
        sides = (store.add_completion(prompt, store.add_model("lm"), text) for text in (voted, other))
        store.make_comparison(*sides)
    terminal = subprocess.Popen(
        [sys.executable, "-m", "rlhf.feedback", f"--store={path}", "--rater=dan"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with tiny_server.serving(world.path, "--feedback=forty.sqlite", says="no chat: ") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#model:has-text('lm')")
        assert not page.is_visible("#mode")  # there is no template: it can but continue texts
        chat(page, "the film is")
        page.wait_for_selector(DONE)
        assert page.text_content(".words") == "the film is" + said(page)
        begin(page, "eve")
        for number in range(1, 31):
            side = "b" if page.text_content("#right") == voted else "a"
            press(page, side, f"Stored: {side.upper()} is better", f"{number + 1} of")
        page.close()
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
