// How far the votes can be trusted. What is not known yet is not shown.

const percent = x => `${Math.round(100 * x)}%`;
function figure(number, words, note = "") {
  const node = make("div", { className: "figure" }, make("b", { textContent: number }), make("span", { textContent: words }));
  if (note) node.append(make("small", { className: "note", textContent: note }));
  return node;
}

const NAMES = { tie: n => n === 1 ? "tie" : "ties", both_bad: () => "both bad", skip: () => "skipped" };
const castVotes = r => r.votes - (r.choices.skip ?? 0);  // a skip is no vote

function factsOf(r) {  // [name, value] of one rater, or of all
  const rows = [], { left, self_consistency: again, median_seconds: seconds } = r;
  if (left.n) rows.push(["Chose the left side", `${percent(left.share)} of ${left.n} (95%: ${percent(left.low)} to ${percent(left.high)})`]);
  if (again.n) rows.push(["Same verdict when shown again, swapped", `${percent(again.share)} of ${again.n}`]);
  if (seconds !== null) rows.push(["Median time", `${fixed(seconds, 1)} s`]);
  const rest = Object.entries(r.choices).filter(([name]) => name in NAMES).map(([name, n]) => `${n} ${NAMES[name](n)}`);
  if (rest.length) rows.push(["Beside these", rest.join(", ")]);
  return rows;
}

function rater(name, r) {
  const head = make("h3", {}, make("span", { textContent: name }), make("span", { className: "note", textContent: counted(castVotes(r), "vote") }));
  const row = ([term, value]) => make("div", {}, make("dt", { textContent: term }), make("dd", { textContent: value }));
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
      totals.push(figure(percent(s.agreement), "agreement", `of ${counted(s.pairs_with_two_raters, "pair")} that several judged${kappa}`));
    }
    $("totals").replaceChildren(...totals);
    const raters = Object.entries(s.by_rater).map(([name, r]) => rater(name, r));
    const words = raters.length ? "The left side should be chosen half of the time: sides are drawn. Where repetitions get another verdict " +
      "half of the time, the answers are too close, or nobody reads them." : "No votes yet. They are given under Compare, or blind under Side by side.";
    $("by-rater").replaceChildren(make("p", { className: "note", textContent: words }), ...raters);
  } catch (error) {
    problem(error);
  }
}
$("refresh").addEventListener("click", statistics);
addView("statistics", { title: "Statistics", needs: "feedback", enter: statistics });
