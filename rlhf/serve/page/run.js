// A run of training while it goes on. The server answers 304 until something is new, so the page may ask often.

const EVERY = 2000;  // milliseconds
const PLOT = { height: 180, left: 46, right: 12, top: 10, bottom: 24 };
let run = null, runTag = "", runTimer = 0, runSamples = "";

async function askRun() {
  const headers = runTag ? { "If-None-Match": runTag } : {};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  try {
    const response = await fetch("/v1/run", { headers, cache: "no-store", credentials: "omit" });
    if (response.ok) {
      runTag = response.headers.get("ETag") ?? "";
      run = await response.json();
      drawRun();
    } else if (response.status !== 304) {
      await call("/v1/run");  // which says what is wrong
    }
    problem();
  } catch (error) {
    problem(error);
  }
  if (run) tellState();
  clearTimeout(runTimer);
  if (view === "run") runTimer = setTimeout(askRun, EVERY);
}

function ago(seconds) {
  const [n, unit] = seconds < 90 ? [seconds, "s"] : seconds < 5400 ? [seconds / 60, "min"] : [seconds / 3600, "h"];
  return `${Math.max(0, Math.round(n))} ${unit} ago`;
}

function tellState() {
  const { name, done, total, finished, modified, problem: wrong } = run;
  const so = total ? `${done} of ${counted(total, "iteration")}` : counted(done ?? 0, "step");
  const state = finished ? `finished, ${so}` : `${so}, the last ${ago(Date.now() / 1000 - modified)}`;
  $("run-state").textContent = wrong ?? `${name}: ${done ? state : "nothing yet; numbers come with the first iteration"}`;
  show("run-progress", Boolean(total && done && !finished));
  if (total) $("run-progress").value = done / total;
}

function drawRun() {
  const { curves = [], findings = [], table = [] } = run, places = $("run-curves");
  const at = [...places.children].findIndex(figure => figure.contains(document.activeElement));
  $("run-findings").replaceChildren(...findings.map(finding));
  places.replaceChildren(...curves.map(curveFigure));
  show("run-band", curves.some(curve => curve.band));
  drawCurves();
  places.children[at]?.querySelector("svg").focus();  // who goes along a curve stays there
  drawSamples();
  show("run-all", Boolean(table.length));
  $("run-table").replaceChildren(metricsTable(table));
}

function finding(line) {
  const calm = /nothing is wrong|too short/.test(line);
  return make("p", { className: calm ? "note" : "card bad", textContent: line.replace(/^doctor: /, "Doctor: ") });
}

function metricsTable(rows) {
  const heads = ["metric", "first", "last", "smallest", "largest"].map(text => make("th", { scope: "col", textContent: text }));
  const body = rows.map(([name, ...values]) => make("tr", {}, make("th", { scope: "row", textContent: name }),
    ...values.map(x => make("td", { textContent: Number(x.toPrecision(4)) }))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
}

// ---- the curves

const brief = x => x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e4) ? x.toExponential(1) : fixed(x, Math.abs(x) < 10 ? 2 : 1);

function curveFigure({ words, unit, name, rule, look, values }) {
  const about = [make("b", { textContent: words }), make("b", { className: "now", textContent: brief(values.at(-1)) })];
  about.push(make("span", { textContent: unit }), make("code", { textContent: name }));
  if (rule) about.push(make("span", { className: "rule", textContent: `healthy: ${rule}` }));
  if (look) about.push(make("span", { className: "look", textContent: `look: ${look}` }));
  return make("figure", { className: "curve" }, make("figcaption", {}, ...about), make("div", { className: "plot" }));
}

function drawCurves() {
  document.querySelectorAll("#run-curves .plot").forEach((place, i) => {
    place.replaceChildren(curvePlot(run.curves[i], place.clientWidth || 320));
  });
}

const drawn = (tag, attributes, ...children) => {
  const node = named(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
  node.append(...children);
  return node;
};

function ticks(low, high, most) {  // round numbers
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(x => x * power).find(x => x >= raw), found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(Number((k * step).toPrecision(6)));
  return found;
}

// [low, high, the ends of the band between them]: an end that is further away than the curve is high is left out of sight,
// as in the report.
function rangeOf({ values, band }) {
  const low = Math.min(...values), high = Math.max(...values);
  const room = high > low ? high - low : Math.max(.1, .1 * Math.abs(low));  // one point has no height
  const ends = (band ?? []).filter(end => end !== null && end >= low - room && end <= high + room);
  const edge = high > low ? .06 * room : room;
  return [Math.min(low, ...ends) - edge, Math.max(high, ...ends) + edge, ends];
}

function curvePlot(curve, width) {
  const { height, left, top } = PLOT, right = width - PLOT.right, bottom = height - PLOT.bottom;
  const { steps, values, band, words } = curve, [low, high, ends] = rangeOf(curve);
  const first = steps[0], span = Math.max(1, steps.at(-1) - first);
  const x = step => left + (right - left) * (step - first) / span, y = value => bottom - (bottom - top) * (value - low) / (high - low);
  const across = value => ({ x1: left, x2: right, y1: y(value), y2: y(value) });
  const parts = [];
  if (band) {
    const [from, to] = band.map((end, i) => y(Math.min(high, Math.max(low, end ?? [low, high][i]))));
    parts.push(drawn("rect", { class: "healthy", x: left, y: to, width: right - left, height: from - to }));
    parts.push(...ends.map(end => drawn("line", { class: "edge", ...across(end) })));
  }
  for (const value of ticks(low, high, 4)) {
    parts.push(drawn("line", { class: "grid", ...across(value) }));
    parts.push(drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  for (const step of ticks(first, first + span, width < 400 ? 4 : 6).filter(Number.isInteger)) {
    parts.push(drawn("text", { x: x(step), y: height - 6, "text-anchor": "middle" }, String(step)));
  }
  parts.push(drawn("polyline", { class: "line", points: steps.map((step, i) => `${x(step).toFixed(1)},${y(values[i]).toFixed(1)}`).join(" ") }));
  const dot = drawn("circle", { class: "dot-now", r: 4 }), told = drawn("text", { class: "told", x: right, y: top + 4, "text-anchor": "end" });
  const node = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0 }, ...parts, dot, told);
  named(node, { "aria-label": `${words}: from ${values[0]} to ${values.at(-1)}, ${counted(steps.length, "point")}. Arrow keys go along it.` });
  let at = steps.length - 1;
  const mark = to => {
    at = Math.max(0, Math.min(steps.length - 1, to));
    named(dot, { cx: x(steps[at]), cy: y(values[at]) });
    told.textContent = `iteration ${steps[at]}: ${values[at]}`;
  };
  const end = () => { mark(steps.length - 1); told.textContent = ""; };
  node.addEventListener("pointermove", event => {
    const step = first + span * (event.offsetX - left) / (right - left);
    mark(steps.reduce((best, one, i) => Math.abs(one - step) < Math.abs(steps[best] - step) ? i : best, 0));
  });
  node.addEventListener("pointerleave", end);
  node.addEventListener("keydown", event => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    mark(to);
    $("run-point").textContent = `${words}, ${told.textContent}`;
  });
  end();
  return node;
}

// ---- what it says

function drawSamples() {
  const last = run.samples, fresh = JSON.stringify(last ?? null);
  if (fresh === runSamples) return;  // who reads them is not disturbed
  runSamples = fresh;
  show("run-last", Boolean(last));
  if (!last) return;
  $("run-step").textContent = `What it said in iteration ${last.step}`;
  const all = last.rows.flatMap(row => row.tokens), there = Object.keys(MEASURES).filter(name => all.some(token => (token[name] ?? null) !== null));
  let now = there.includes(measure) ? measure : there[0];
  $("run-samples").replaceChildren(...last.rows.map(row => sampleCard(row, there)));
  show("run-numbers", Boolean(there.length));
  $("run-numbers").replaceChildren(make("summary", { textContent: "Their numbers" }), ...last.rows.flatMap(row => numbersOf(row, there)));
  const spans = document.querySelectorAll("#run-samples .token");
  const paint = () => {
    spans.forEach((span, i) => {
      const [hue, part] = tint(all[i][now] ?? 0, MEASURES[now].full);
      span.style.setProperty("--hue", hue);
      span.style.setProperty("--part", part);
    });
    choose($("run-measure"), button => button.value === now);
    ramp($("run-legend"), MEASURES[now]);
  };
  $("run-measure").replaceChildren(...there.map(name => {
    const button = make("button", { type: "button", value: name, textContent: MEASURES[name].name, title: MEASURES[name].says });
    button.addEventListener("click", () => { measure = now = name; disk.set("measure", name); paint(); });
    return button;
  }));
  show("run-colours", Boolean(there.length));
  if (there.length) paint();
}

function sampleCard({ prompt, tokens, score, kl }, there) {
  const badges = Object.entries({ score, KL: kl }).filter(([, x]) => x !== null).map(([name, x]) => badge(name, fixed(x)));
  const said = tokens.map(token => make("span", {
    className: "token", textContent: token.text, title: there.map(name => `${MEASURES[name].name} ${fixed(token[name], 3)}`).join(" \u00b7 "),
  }));
  const text = make("p", { className: "text tokens", dir: "auto" }, make("b", { textContent: prompt }), ...said);
  return make("article", { className: "card" }, make("p", { className: "row" }, ...badges), text);
}

function numbersOf({ prompt, tokens }, there) {
  const table = asTable(tokens, there);
  table.firstChild.textContent = prompt;
  return [table];
}

addEventListener("resize", () => { if (view === "run" && run?.curves) drawCurves(); });
addView("run", { title: "Training", needs: "run", enter: askRun, leave: () => clearTimeout(runTimer) });
