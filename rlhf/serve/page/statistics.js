// How far the votes can be trusted. What is not known yet is not shown.

const HOW = "The left side should be chosen half of the time: sides are drawn. Where repetitions get another verdict half of " +
  "the time, the answers are too close, or nobody reads them.";
const NONE = "No votes yet. They are given under Compare, or blind under Side by side.";

const percent = x => `${Math.round(100 * x)}%`;
function figure(number, words, note = "") {
  const node = make("div", { className: "figure" }, worded("b", number), worded("span", words));
  if (note) node.append(worded("small", note, "note"));
  return node;
}

const NAMES = { tie: n => n === 1 ? "tie" : "ties", both_bad: () => "both bad", skip: () => "skipped" };
const castVotes = r => r.votes - (r.choices.skip ?? 0);  // a skip is no vote

function factsOf(r) {  // [name, value] of one rater, or of all
  const rows = [], { left, self_consistency: again, median_seconds: seconds } = r;
  const interval = `95%: ${percent(left.low)} to ${percent(left.high)}`;
  if (left.n) rows.push(["Chose the left side", `${percent(left.share)} of ${left.n} (${interval})`]);
  if (again.n) rows.push(["Same verdict when shown again, swapped", `${percent(again.share)} of ${again.n}`]);
  if (seconds !== null) rows.push(["Median time", `${fixed(seconds, 1)} s`]);
  const rest = Object.entries(r.choices).filter(([name]) => name in NAMES).map(([name, n]) => `${n} ${NAMES[name](n)}`);
  if (rest.length) rows.push(["Beside these", rest.join(", ")]);
  return rows;
}

function rater(name, r) {
  const head = make("h3", {}, worded("span", name), worded("span", counted(castVotes(r), "vote"), "note"));
  const row = ([term, value]) => make("div", {}, worded("dt", term), worded("dd", value));
  return make("article", { className: "card" }, head, make("dl", {}, ...factsOf(r).map(row)));
}

async function statistics() {
  try {
    const s = await json("/v1/feedback/statistics");
    problem();
    const totals = [
      figure(castVotes(s).toLocaleString("en"), castVotes(s) === 1 ? "vote" : "votes"),
      figure(`${s.pairs} of ${s.queued_pairs}`, "pairs judged"), figure(s.raters, s.raters === 1 ? "rater" : "raters"),
    ];
    if (s.agreement !== null) {
      const kappa = s.fleiss_kappa === null ? "" : `; Fleiss\u2019 kappa ${fixed(s.fleiss_kappa)}`;
      const of = counted(s.pairs_with_two_raters, "pair");
      totals.push(figure(percent(s.agreement), "agreement", `of ${of} that several judged${kappa}`));
    }
    $("totals").replaceChildren(...totals);
    const raters = Object.entries(s.by_rater).map(([name, r]) => rater(name, r));
    $("by-rater").replaceChildren(worded("p", raters.length ? HOW : NONE, "note"), ...raters);
  } catch (error) {
    problem(error);
  }
}
$("refresh").addEventListener("click", statistics);
addView("statistics", { title: "Statistics", needs: "feedback", enter: statistics });
