const percent = x => x === null || x === undefined ? "\u2013" : `${Math.round(100 * x)}%`;
const decimal = x => x === null || x === undefined ? "\u2013" : x.toFixed(2);

async function statistics() {
  try {
    const s = await json("/v1/feedback/statistics");
    problem();
    $("statistics-text").textContent =
      `${s.votes} votes of ${s.raters} raters on ${s.pairs} of ${s.queued_pairs} pairs. ${s.pairs_with_two_raters} pairs have two raters or more: ` +
      `they agree on ${percent(s.agreement)} (Fleiss\u2019 kappa ${decimal(s.fleiss_kappa)}).`;
    const row = (name, r) => make("tr", {}, ...[
      name, r.votes, `${percent(r.left.share)} [${percent(r.left.low)}, ${percent(r.left.high)}]`,
      `${percent(r.self_consistency.share)} of ${r.self_consistency.n}`, decimal(r.median_seconds),
    ].map((text, i) => make(i ? "td" : "th", { textContent: text, ...(i ? {} : { scope: "row" }) })));
    const heads = ["rater", "votes", "left, of votes for a side", "same again when swapped", "median seconds"];
    $("statistics-table").replaceChildren(make("table", {},
      make("caption", { textContent: "Left should be half: the sides are drawn. Intervals are 95%." }),
      make("thead", {}, make("tr", {}, ...heads.map(text => make("th", { scope: "col", textContent: text })))),
      make("tbody", {}, ...Object.entries(s.by_rater).map(([name, r]) => row(name, r)), row("all", s))));
  } catch (error) {
    problem(error);
  }
}
$("refresh").addEventListener("click", statistics);
addView("statistics", { title: "Statistics", needs: "feedback", enter: statistics });
