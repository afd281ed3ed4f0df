"""evaluate.py report: one page that fetches nothing, runs nothing and says what is missing, whatever lies in the directory."""

import html
import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT
from tiny_browser import accessible
from tiny_run import HOSTILE, ppo_rows, sample

from evaluation import report
from evaluation.page import STEPS, Beside, Microscope, Sample, Shade, Table, Text, colour, escape_markdown
from evaluation.picture import picture
from evaluation.sources import series
from evaluation.verdict import verdict
from rlhf.infra import config

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
SPEC = importlib.util.spec_from_file_location("docs_slides", ROOT / "docs/slides.py")
talk = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(talk)
I = {"mean": 0.5, "low": 0.25, "high": 0.75}
V = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 9}


def row(judge: float, kl: float, **more) -> dict:
    return {"judge": I | {"mean": judge}, "reward": I, "kl": kl} | more


MODEL = {
    "distinct_3": 0.9,
    "length": 20.0,
    "eos_rate": 0.5,
    "perplexity_of_human_text": 50.0,
    "perplexity_for_base": 40.0,
}
POINT = {"d": 1.0, "kl": V, "proxy": V, "gold": V, "proxy_gain": V, "gold_gain": V}
FIT = {"alpha": V, "beta": V, "peak_d": V, "peak_kl": 1.0, "peak_gain": 1.0, "largest_d": 2.0, "rms_error": 0.1}
BIN = {"predicted": 0.6, "observed": V}
CALIBRATED = {"ece": V, "brier": V, "reliability": [BIN, BIN | {"predicted": 0.9}]}
PROBE = {"name": "praise", "mean_shift": 0.1, "low": 0.0, "high": 0.2, "mean_absolute_shift": 0.1, "texts": 9}
PROBE |= {"verdict": "stays", "passed": False}
FILES = {
    "ppo/run.json": {"kl_coef": 0.05, "kl_estimator": "k1", "sources": [HOSTILE], "init_sha256": "a" * 64},
    "ppo/report.json": {"seconds": 12.0},
    "ppo/metrics.jsonl": ppo_rows(),
    "ppo/samples.jsonl": [sample(1), sample(4)],
    "run.json": {"rater_noise": 0.5, "rounds": 3},
    "rm/run.json": {"pooling": "mean", "average": None, "ridge": [0.01, 0.1, 0.3, 1.0, 3.0, 10.0]},
    "rm/report.json": {"seconds": 3.0, "accuracy": {"all": 0.7, "1": 0.8}, "baselines": {"vader": {"all": 0.6, "1": 0.7}}},
    "rm/metrics.jsonl": [{"step": 1, "loss/train": 0.5}, {"step": 2, "loss/train": 0.25}],
    "rm/card.json": {
        "model": "rm", "data": "d", "texts": 9, "pairs": 9, "accuracy": {"all": V, "1": V}, "baselines": {"length": {"all": V}},
        "over_length": V, "calibration": {"temperature": 0.8, "before": CALIBRATED, "after": CALIBRATED},
        "uncertainty": {"coverage": {"100%": 0.7}}, "groups": {"film": {"all": V}}, "probes": [PROBE],
    },
    "summary.json": {
        "rows": {"base": row(0.1, 0.0, **MODEL), "tuned": row(0.4, 3.0, **MODEL), "best of 4": row(0.3, 0.64)},
        "ppo": {"judge_gain": I, "win_rate_judge": I}, "prompts": 8, "seconds": {"rm": 3.0, "lm": None, "total": 3.0},
        "pairwise": [{"a": "tuned", "b": "base", "judge_gain": I}], "elo": {"base": V, "tuned": V},
        "minimal_pairs": {"base": {"pairs": 3, "accuracy": I}}, "safety": {"base": {"refused": I, "texts": [1]}},
        "new_distribution": {"tuned": {"rm": {"pairs": 4, "accuracy": I, "ece": I}, "gain": {"old": I}}},
    },
    "samples.jsonl": [{"before": "a " + HOSTILE, "after": "b"}],
    "tokens.jsonl": [{"prompt": HOSTILE, **{name: {
        "tokens": ["a", HOSTILE, ""], "logprobs": [-1.0, -2.0, None], "ref_logprobs": [-4.5, -1.0, 0.0],
        "judge": 0.25, "reward": x}
        for name, x in (("before", None), ("after", 2.5))}}],
    "study/overoptimisation.json": {
        "rows": [{"curve": None, "name": "base"} | POINT, {"curve": "best_of_n", "name": "best of 2"} | POINT,
                 {"curve": "ppo", "name": "PPO, 4 iterations"} | POINT],
        "fits": {"best_of_n": FIT | {"peak_d": V | {"value": None}}, "ppo": FIT}, "prompts": 8,
        "options": {"proxy": "a", "gold": "b"},
    },
    "rounds.json": {
        "rater": "SIMULATED by rm", "judge": "vader",
        "rounds": [{"round": k, "votes": 9 * k, "judge": I, "judge_base": I, "gain_over_previous": I, "kl": 1.0,
                    "promoted": k == 1, "seconds": {"ppo": 2.0}, "rm": {
                        "accuracy_gap1": 0.8, "accuracy_gap1_round_0": 0.81, "on_own_samples": {"accuracy": I},
                        "on_own_samples_round_0": {"accuracy": I}, "gain_on_own_samples": I}} for k in (1, 2)],
    },
}  # fmt: skip


def lay_out(path: Path, files: dict) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(x) + "\n" for x in content) if name.endswith("l") else json.dumps(content)
        (path / name).write_text(text)
    return path


def make(monkeypatch, run: Path, *options: str) -> tuple[str, str]:
    """The page and the summary, by the command."""
    monkeypatch.setattr("sys.argv", ["report", f"--run={run}", *options])
    report.main()
    return tuple((run / f"report.{ending}").read_text(encoding="utf-8") for ending in ("html", "md"))


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """A run with every file, and its report: drawing takes seconds."""
    run = lay_out(tmp_path_factory.mktemp("everything") / "all", FILES)
    with pytest.MonkeyPatch.context() as patch:
        make(patch, run)
    return run


class Reader(HTMLParser):
    """What a browser would see: tags, attributes, texts of the sections' headings."""

    VOID = {"meta", "link", "input", "img", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.open, self.headings, self.text = [], [], [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def check_page(page: str, scripts: int = 0) -> Reader:
    """Well nested, no script, nothing that leaves the file, every id once."""
    seen = Reader(page)
    assert (
        seen.open == []
        and seen.tags.count("script") == scripts
        and not {"img", "iframe", "object", "embed", "form", "base"} & {*seen.tags}
    )
    leaving = [value for name, value in seen.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert [x for x in leaving if not x.startswith("#") and x != "data:,"] == []
    assert [name for name, _ in seen.attributes if name.startswith("on")] == []
    assert not re.search(r"url\((?!#)|@import", page)
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len({*ids})
    assert {x[1:] for x in leaving if x.startswith("#") and len(x) > 1} <= {*ids}
    assert len(seen.headings) == len({*seen.headings})
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)
    return seen


def test_everything(everything, monkeypatch, capsys):
    """All sections, each once; hostile texts stay texts; the same files give the same bytes."""
    page, text = ((everything / f"report.{ending}").read_text(encoding="utf-8") for ending in ("html", "md"))
    seen = check_page(page)
    assert seen.headings == list(report.SECTIONS) and "Left out" not in page  # nothing missing, nothing misunderstood
    shown = "\n".join(line for line in text.splitlines() if not line.startswith("    "))  # those are commands, literal
    assert "alert(1)" in seen.text and "<script" not in shown and "<img" not in shown
    assert (
        seen.tags.count("svg")
        == sum(name == "aria-label" for name, _ in seen.attributes) - page.count('class="scroll"') - 1
    )
    for found in (
        "The judge rose by +.50 [.25, .75] at 3.0 nats; tuned answers win 50%.",
        "0.400 [0.250, 0.750]",
        "judge .25, reward 2.50",
        "SIMULATED by rm",
        "refused",
        "<= 0.64",
        "--kl_coef=0.05",
        "--rater_noise=0.5",
        "2 finished",
        "gap > 1",
    ):
        assert found in seen.text
        assert escape_markdown(found) in text or found in text
    assert "--kl_estimator" not in page and "--ridge" not in page  # at their defaults
    assert "Constant: objective/kl_coef 0.3, policy/ratio_first 1." in page
    assert make(monkeypatch, everything) == (page, text)
    assert "The report of 4 directories, 11 sections: " in capsys.readouterr().out


@pytest.fixture
def undrawn(monkeypatch):
    """Without the plots, which take most of the time: test_everything draws them."""
    monkeypatch.setattr("evaluation.plots.svg", lambda name, alt, *a: f'<svg aria-label="{html.escape(alt)}"></svg>')


def test_each_file_alone(tmp_path, monkeypatch, undrawn):
    """What is there is shown, what is not is named."""
    for i, name in enumerate(FILES):
        run = lay_out(tmp_path / str(i), {Path(name).name: FILES[name]})
        page, _ = make(monkeypatch, run)
        assert check_page(page).headings[-1] == "What is missing" and "Left out" not in page, name


def test_a_run_that_is_not_finished(tmp_path, monkeypatch, undrawn):
    run = lay_out(tmp_path / "ppo", {"run.json": FILES["ppo/run.json"], "metrics.jsonl": ppo_rows(3)})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "objective/sco')  # as a kill leaves it
    page, _ = make(monkeypatch, run)
    assert "not finished, 3 lines of metrics" in page and "Left out" not in page


@pytest.mark.parametrize(
    "damage", ['{"rows": ', "[1, 2]", "3", '{"rows": 3}', '{"rows": {"base": {"judge": "high"}}}', ""]
)
def test_damaged_files_are_left_out_with_a_line(tmp_path, monkeypatch, undrawn, damage):
    run = lay_out(tmp_path / "r", {"ppo/metrics.jsonl": ppo_rows()})
    (run / "summary.json").write_text(damage)
    page, text = make(monkeypatch, run)
    assert "Left out, r/summary.json" in page and "Left out, r/summary.json" in text and "All curves" in page
    check_page(page)


def strange(value):
    """JSON of about the right shape: some part of it replaced."""
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.just([]), st.just({})
    )

    def changed(x, path, new):
        if not path:
            return new
        if isinstance(x, dict) and x:
            name = sorted(x)[path[0] % len(x)]
            return x | {name: changed(x[name], path[1:], new)}
        if isinstance(x, list) and x:
            i = path[0] % len(x)
            return [*x[:i], changed(x[i], path[1:], new), *x[i + 1 :]]
        return new

    paths = st.lists(st.integers(0, 7), min_size=1, max_size=6)
    return st.builds(lambda new, path: changed(value, path, new), anything, paths)


@settings(max_examples=40)
@given(
    st.sampled_from([name for name in FILES if name.endswith(".json")]).flatmap(
        lambda n: st.tuples(st.just(n), strange(FILES[n]))
    )
)
def test_no_file_gives_a_traceback(tmp_path_factory, case):
    """The sections are built, without plots, from files of which some part is something else."""
    name, content = case
    path = tmp_path_factory.mktemp("strange")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "evaluation.plots.svg", lambda *a: "<svg/>"
        )  # drawing is tested above; here it would take minutes
        sources = report.find(lay_out(path, {name: content, "metrics.jsonl": ppo_rows()}))
        sections, _ = report.build(sources)
    if said := verdict(sources):
        said.html(), said.markdown()
    for section in sections.values():
        for block in section.blocks:
            block.html(), block.markdown()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run=nothing"], "nothing is not a directory"),
        (["--run=empty"], "holds no run"),
        (["--run=ppo", "--out=page.txt"], "must end in .html"),
        (["--run=ppo", "--picture=p.png"], "must end in .svg"),
        (["--run=ppo", "--picture=p.svg"], "has no summary.json and samples.jsonl"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, options, said):
    lay_out(tmp_path, {"ppo/run.json": FILES["ppo/run.json"], "ppo/metrics.jsonl": ppo_rows()})
    (tmp_path / "empty/sub/step_000001").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report", *options])
    with pytest.raises(SystemExit) as end:
        config.run(report.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.count("\n") == 1


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["report", f"--run={tmp_path}"])
    with pytest.raises(ValueError, match=r"not installed: pip install -e '\.\[plot\]'"):
        report.main()


def test_the_picture(tmp_path):
    summary = {"judge_before": 0.5, "judge_after": 0.5, "win_rate_judge": {"mean": 0.75}}
    summary = FILES["summary.json"] | {"ppo": FILES["summary.json"]["ppo"] | summary}
    files = {name: FILES[name] for name in ("ppo/run.json", "ppo/metrics.jsonl", "samples.jsonl")}
    texts = [{"before": "a", "after": "b"}, {"before": "the film is " + HOSTILE, "after": "the film is good & loved"}]
    run = lay_out(tmp_path / "r", files | {"summary.json": summary, "samples.jsonl": texts})
    text = picture(report.find(run), "r", 2)
    seen = check_page(text)
    assert seen.tags[0] == "svg" and {*seen.tags} <= {"svg", "style", "rect", "text", "tspan", "line", "polyline"}
    assert "Score from 0.00 to 0.40, KL from 0.0 to 2.0 nats" in text and "75%" in seen.text and len(text) < 10_000
    assert '<tspan class="new">good &amp; loved</tspan>' in text and "the film is <tspan" in text
    with pytest.raises(ValueError, match="--picture_prompt=3: r has answers to 2 prompts"):
        picture(report.find(run), "r", 3)


@pytest.mark.parametrize("script", [script for script, _ in report.KINDS.values()])
def test_defaults_are_those_of_the_scripts(script):
    module = importlib.import_module(script.removesuffix(".py"))
    assert report.defaults(script) == vars(module.Config())
    telling = {option for _, option in report.KINDS.values()} & vars(module.Config()).keys()
    assert report.Source("run", {"run.json": dict.fromkeys(telling)}).kind in report.KINDS and len(telling) == 1


def test_blocks():
    table = Table(["a", "b|c"], [["<x>", "1\n2"]])
    assert table.markdown() == "| a | b\\|c |\n| --- | --- |\n| &lt;x&gt; | 1↵2 |"
    assert Text("rm -rf `x` <b>", "command").markdown() == "    rm -rf `x` <b>"  # an indented block is literal
    assert escape_markdown("a_b _c_ [x](y) *z*") == "a_b \\_c\\_ [x]\\(y) \\*z\\*"
    shown = Microscope([Sample("p", ["a", ""], "head", {"kl": [0.5, None]})], [Shade("kl", "KL", 1.0)]).html()
    assert "∅" in shown and 'title="KL +0.500"' in shown and 'title="KL -"' in shown
    pair = [Sample("p", ["<x>", "y"], "", {"kl": [2.0, -0.5]}), Sample("p", ["z"], "", {})]
    columns = Beside(["base", "tuned"], [pair], Shade("kl", "KL", 1.0, "less", "more")).html()
    assert f"--kl: var(--w{STEPS})" in columns and f"--kl: var(--c{STEPS // 2})" in columns and "&lt;x&gt;" in columns
    assert '<span class="t">z</span>' in columns and "-1 less" in columns and "+1 more" in columns


@given(st.floats(-10, 10), st.floats(0.01, 10))
def test_colours_have_a_sign_and_end_somewhere(x, scale):
    found = re.fullmatch(r"none|var\(--([wc])(\d+)\)", colour(x, scale))
    letter, step = found.groups() if found[1] else ("", 0)
    assert (
        letter in ("w" if x > 0 else "c", "") and abs(int(step) / STEPS - min(1, abs(x) / scale)) <= 0.5 / STEPS + 1e-9
    )
    assert colour(None, scale) == "none"


def test_answers_of_several_models_stand_beside_each_other(tmp_path):
    texts = [{"prompt": "p", "before": "a", "out/one": "b", "out/two": "<c>"}]
    run = lay_out(
        tmp_path / "r", {name: FILES[name] for name in ("summary.json", "tokens.jsonl")} | {"samples.jsonl": texts}
    )
    _, columns = report.before_after(report.find(run))
    assert (
        columns.names == ["base", "out/one", "out/two"]
        and "&lt;c&gt;" in columns.html()
        and "--logratio" not in columns.html()
    )


def evaluated(what: str, mean: float, low: float, high: float, **more) -> dict:
    rows = {name: {what: {"mean": x}, "kl": kl} for name, x, kl in (("base", 0.25, 0.0), ("tuned", 0.25 + mean, 6.96))}
    rows["best of 2"] = {what: {"mean": 0.3125}, "kl": 0.19}
    gains = {f"{what}_gain": {"mean": mean, "low": low, "high": high}, f"win_rate_{what}": I}
    return {"summary.json": {"rows": rows, "ppo": gains, "prompts": 9} | more}


@pytest.mark.parametrize(
    "files, said, note",
    [
        (evaluated("judge", 0.348, 0.283, 0.412), "The judge rose by +.35 [.28, .41] at 7.0 nats; tuned answers", ".06"),
        (evaluated("judge", -0.2, -0.3, -0.1), "The judge fell by .20 [.10, .30] at 7.0 nats; tuned answers win 50%.", ""),
        (evaluated("judge", 0.01, -0.1, 0.12), "The judge did not move beyond chance, +.01 [-.10, .12], at 7.0 nats; ", ""),
        (evaluated("reward", 1.0, 0.5, 12.5), "The reward rose by +1.00 [.50, 12.5] at 7.0 nats; ", "No judge was asked"),
        (
            evaluated("reward", 0.5, 0.4, 0.6, verifiable={"reward": {}}),
            "The share of right answers rose by +.50 [.40, .60] at 7.0 nats.",
            "Without any training, the best of 2 samples",
        ),
        ({"rounds.json": FILES["rounds.json"]}, "In 2 rounds the judge went from .50 to .50 [.25, .75].", ""),
        ({"report.json": FILES["rm/report.json"]}, "The reward model ranks 70% of held-out pairs right.", ""),
        ({"summary.json": {"rows": 3}, "report.json": FILES["rm/report.json"]}, "The reward model ranks 70%", ""),
        (
            {"run.json": FILES["ppo/run.json"], "metrics.jsonl": ppo_rows(12)},
            "The reward went from .20 to .90 at 4.5 nats so far; no judge has seen it yet.",
            "evaluate.py",
        ),
    ],
)  # fmt: skip
def test_the_verdict(files, said, note):
    found = verdict([report.Source("r", files)])
    assert found.sentence.startswith(said) and note in found.note and found.facts
    assert verdict([report.Source("r", {"samples.jsonl": [{}]})]) is None


def test_the_verdict_of_several_runs():
    runs = [report.Source(name, evaluated("judge", x, x - 0.1, x + 0.1)) for name, x in (("a", 0.35), ("b", 0.05))]
    found = verdict(runs)
    assert found.sentence == "The judge rose beyond chance in 1 of 2 runs, by +.05 to +.35."
    assert [fact.words for fact in found.facts] == ["a; 95%: [.25, .45]", "b; 95%: [-.05, .15]"]
    assert verdict([*runs[:1], report.Source("b", {"summary.json": {"ppo": {}}})]).sentence.startswith(
        "The judge rose by +.35"
    )


def test_series_keep_finite_numbers():
    rows = [{"step": 0, "a": 1.0, "b": None}, {"step": 1, "a": True, "b": "x"}, {"a": 3.0}, {"step": 2, "a": 2}]
    found = series(rows, lambda name: True)
    assert found.keys() == {"a"} and np.array_equal(found["a"], [[0, 2], [1, 2]])


def docs(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_picture_of_the_docs():
    text = docs("picture.svg")
    check_page(text)
    assert len(text) < 40_000


def the_slides(path: Path) -> str:
    texts = [{"before": "the film is " + HOSTILE, "after": "the film is good & loved"}]
    names = ("ppo/run.json", "ppo/metrics.jsonl", "summary.json")
    run = lay_out(path / "r", {name: FILES[name] for name in names} | {"samples.jsonl": texts})
    return talk.slides(report.find(run), "r")


def test_the_slides(tmp_path):
    """The template's, with the run's sentences and curves; each has its notes; they leave the file nowhere either."""
    page = the_slides(tmp_path)
    seen = check_page(page, scripts=1)
    count = seen.tags.count("section")
    assert count >= 15 and count == seen.tags.count("h1") == seen.tags.count("aside") and "{{" not in page
    assert (
        "The judge rose by +.50 [.25, .75] at 3.0 nats" in seen.text and "the film is <b>good</b> <b>&amp;</b>" in page
    )
    with pytest.raises(ValueError, match="--run=r has no held-out prompt 2"):
        talk.slides(report.find(tmp_path / "r"), "r", 2)


def opened(browser, file: Path, **kwargs):
    """The page, and a list of what it says on the console and asks for."""
    page, said = browser.new_page(**kwargs), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(file.as_uri())
    return page, said


@pytest.mark.slow
def test_report_in_a_browser(browser, everything):
    """No word on the console, no request, no sideways scrolling, nothing that axe finds wrong; the colours can be chosen."""
    file = everything / "report.html"
    for width, scheme in ((1200, "light"), (360, "dark")):
        view = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
        page, said = opened(browser, file, **view)
        assert page.locator(".plots.large figure").count() >= 2 and page.locator("details[open]").count() == 0
        page.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        shown = ".microscope .t"
        before = page.eval_on_selector(shown, "x => getComputedStyle(x).backgroundColor")
        page.check("#shade-advantages")
        assert page.eval_on_selector(shown, "x => getComputedStyle(x).backgroundColor") != before
        assert page.locator(".microscope .scale:visible").count() == 1
        assert accessible(page) == [] and said == [file.as_uri()]


@pytest.mark.slow
def test_slides_by_keyboard(browser, tmp_path):
    file = tmp_path / "slides.html"
    file.write_text(the_slides(tmp_path), encoding="utf-8")
    page, said = opened(browser, file, viewport={"width": 1280, "height": 720}, color_scheme="dark")
    count = page.locator("section").count()
    for i in range(count):
        assert page.locator("section:visible").count() == 1 and page.text_content("#place") == f"{i + 1} / {count}"
        high, wide = page.evaluate("[document.documentElement.scrollHeight, document.documentElement.scrollWidth]")
        assert high <= 720 and wide <= 1280, i + 1
        page.keyboard.press("ArrowRight" if i % 2 else " ")
    page.keyboard.press("Home")
    assert page.locator("aside:visible").count() == 0
    page.keyboard.press("n")
    assert page.locator("aside:visible").count() == 1 and page.get_attribute("#notes", "aria-pressed") == "true"
    page.evaluate("document.body.classList.remove('js')")  # all of them, as a browser without scripts shows them
    assert page.locator("section:visible").count() == count and accessible(page) == []
    page.emulate_media(media="print")
    assert page.locator("section:visible").count() == count
    assert said == [file.as_uri()]
