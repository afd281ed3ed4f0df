// Tokens in the place of the text. What a colour means is one thing on this page and in the report: warm above 0, cold below,
// full at the same number everywhere, so that two answers can be compared by eye.

const MEASURES = {
  logprob: { name: "Log-prob", full: 6, low: true, says: "how likely the model found the token, nats" },
  logratio: { name: "Log-ratio", full: 3, low: true, high: true, says: "log-prob here less that of the reference, nats" },
  kl: { name: "KL", full: 2, high: true, says: "exact KL to the reference before this token, over the whole vocabulary, nats" },
  value: { name: "Value", full: 2, low: true, high: true, says: "the score that the critic expects here" },
  advantage: { name: "Advantage", full: 2, low: true, high: true, says: "how much better it went than the critic expected" },
};
const sign = c => c === "\n" ? "\u21b5" : c === "\t" ? "\u21e5" : String.fromCharCode(0x2400 + c.charCodeAt());
const spelled = text => text.replace(/[\0-\x1f]/g, sign) || "\u2205";
const tint = (x, full) => [x < 0 ? "var(--cold)" : "var(--warm)", `${Math.round(60 * Math.min(1, Math.abs(x) / full))}%`];
let measure = disk.get("measure") || "logratio";

// {score, kl, tokens} of an answer. Whether they are there depends on what the server was started with.
async function measured(context, response) {
  const { tokens } = await json("/v1/tokens", { ...context, response, top: 5 });
  const kls = tokens.map(token => token.kl), kl = kls.includes(null) || !kls.length ? null : kls.reduce((sum, x) => sum + x);
  return { tokens, score: tokens.at(-1)?.reward ?? null, kl };
}

function tokenView(tokens) {
  const there = Object.keys(MEASURES).filter(name => tokens.some(token => (token[name] ?? null) !== null));
  let now = there.includes(measure) ? measure : there[0];
  const keys = "Tokens: arrow keys go through them, Enter shows what else was likely";
  const field = group(keys, make("div", { className: "tokens text", dir: "auto" }));
  const told = named(make("p", { className: "note status" }), { role: "status" });
  const choice = group("Colour by", make("div", { className: "choice" }));
  const legend = make("div", { className: "legend" }, make("span"), make("span", { className: "ramp" }), make("span"));
  const beside = make("div", { className: "alternatives", hidden: true });
  let marked = null, opened = null;

  const facts = token => there.map(name => `${MEASURES[name].name} ${fixed(token[name], 3)}`).join(" \u00b7 ");
  const mark = i => {
    marked?.classList.remove("marked");
    marked = spans[i];
    marked.classList.add("marked");
    told.textContent = `\u201c${spelled(tokens[i].text)}\u201d  ${facts(tokens[i])}`;
  };
  const open = i => {
    if (opened) opened.setAttribute("aria-expanded", "false");
    opened = opened === spans[i] ? null : spans[i];
    opened?.setAttribute("aria-expanded", "true");
    beside.hidden = !opened;
    if (!opened) return;
    beside.replaceChildren(...alternatives(tokens[i]));
    const line = [...opened.getClientRects()].at(-1), frame = node.getBoundingClientRect();
    beside.style.top = `${line.bottom - frame.top + 6}px`;
    beside.style.setProperty("--left", `${line.left - frame.left}px`);
  };
  const spans = tokens.map((token, i) => {
    const span = named(make("span", { className: "token", textContent: token.text, tabIndex: i ? -1 : 0 }), {
      role: "button", "aria-label": `${spelled(token.text)}: ${facts(token)}`, "aria-expanded": "false",
    });
    span.addEventListener("focus", () => mark(i));
    span.addEventListener("mouseenter", () => mark(i));
    span.addEventListener("click", () => open(i));
    return span;
  });
  field.append(...spans);
  field.addEventListener("keydown", event => {
    const at = spans.indexOf(document.activeElement);
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return open(at); }
    if (event.key === "Escape" && opened) { event.stopPropagation(); return open(spans.indexOf(opened)); }
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    spans[at].tabIndex = -1;
    spans[to].tabIndex = 0;
    spans[to].focus();
  });

  const paint = () => {
    const { full, says } = MEASURES[now];
    tokens.forEach((token, i) => {
      const [hue, part] = tint(token[now] ?? 0, full);
      spans[i].style.setProperty("--hue", hue);
      spans[i].style.setProperty("--part", part);
    });
    choose(choice, button => button.value === now);
    ramp(legend, MEASURES[now]);
    told.textContent = `${MEASURES[now].name}: ${says}. A click on a token shows what else was likely.`;
  };
  for (const name of there) {
    const button = make("button", { type: "button", value: name, textContent: MEASURES[name].name, title: MEASURES[name].says });
    button.addEventListener("click", () => { measure = now = name; disk.set("measure", name); paint(); });
    choice.append(button);
  }
  const lens = make("div", { className: "lens" }, make("div", { className: "row" }, choice, legend), told);
  const node = make("div", { className: "microscope" }, lens, field, beside, asTable(tokens, there));
  paint();
  return node;
}

function ramp(legend, { full, low, high, says }) {
  const [start, , end] = legend.children, end60 = hue => `color-mix(in srgb, var(--${hue}) 60%, transparent)`;
  start.textContent = low ? `\u2264 \u2212${full}` : "0";
  end.textContent = high ? `\u2265 ${full}` : "0";
  legend.title = says;
  const stops = [low && end60("cold"), "transparent", high && end60("warm")].filter(Boolean).join(", ");
  legend.children[1].style.background = `linear-gradient(to right, ${stops})`;
}

function alternatives(token) {
  const both = token.top.some(one => one.ref_logprob !== null);
  const most = Math.exp(Math.max(...token.top.flatMap(one => both ? [one.logprob, one.ref_logprob] : [one.logprob])));
  const rows = token.top.map(one => {
    const bar = (logprob, kind) => {
      const share = Math.exp(logprob);
      const line = make("span", { className: `share ${kind}`, textContent: share < .0005 ? "< 0.1%" : `${(100 * share).toFixed(share < .1 ? 1 : 0)}%` });
      line.style.setProperty("--share", `${(100 * share / most).toFixed(1)}%`);
      return line;
    };
    const bars = make("span", { className: "shares" }, bar(one.logprob, "tuned"));
    if (both) bars.append(bar(one.ref_logprob, "base"));
    return make("li", { className: one.chosen ? "taken" : "" }, make("code", { textContent: spelled(one.text) }), bars);
  });
  const key = make("p", { className: "row note", textContent: "Most likely here" });
  if (both) key.append(make("span", { className: "dot tuned" }), "this model", make("span", { className: "dot" }), "reference");
  return [key, make("ol", {}, ...rows)];
}

function asTable(tokens, there) {
  const heads = ["token", ...there.map(name => MEASURES[name].name)].map(name => make("th", { scope: "col", textContent: name }));
  const cells = token => [spelled(token.text), ...there.map(name => fixed(token[name], 3))];
  const rows = tokens.map(token => make("tr", {}, ...cells(token).map(text => worded("td", text))));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  const scroll = group("Tokens as a table", make("div", { className: "scroll", tabIndex: 0 }, table));
  return make("details", {}, make("summary", { textContent: "As a table" }), scroll);
}
