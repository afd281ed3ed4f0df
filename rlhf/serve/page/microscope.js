const MEASURES = {
  logprob: "Log-probability, nats", kl: "KL to the reference, nats", value: "Value", reward: "Reward",
};
const number = x => x === null || x === undefined ? "none" : Number(x).toFixed(3);
const spelled = text => text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";
let opened = 0;

async function tokens(request, box, button) {
  const old = box.querySelector(".microscope");
  if (old) { old.remove(); button.textContent = "Look at the tokens"; return; }
  if (button.getAttribute("aria-disabled")) return;
  button.setAttribute("aria-disabled", "true");
  let list;
  try {
    list = (await json("/v1/tokens", request)).tokens;
    problem();
  } catch (error) {
    return problem(error);
  } finally {
    button.removeAttribute("aria-disabled");
  }
  button.textContent = "Hide the tokens";
  const there = Object.keys(MEASURES).filter(name => list.some(token => token[name] !== null));
  const id = `measure-${opened++}`;
  const choose = make("select", { id }, ...there.map(name => make("option", { value: name, textContent: MEASURES[name] })));
  const legend = make("div", { className: "legend" }, make("span"), make("span"), make("span"));
  const told = make("p", { className: "note status" });
  told.setAttribute("role", "status");
  const field = make("div", { className: "tokens text", dir: "auto" });
  field.setAttribute("role", "group");
  field.setAttribute("aria-label", "Tokens; the arrow keys go through them");
  const spans = list.map((token, i) => {
    const span = make("span", { className: "token", textContent: token.text, tabIndex: i ? -1 : 0 });
    const tell = () => {
      const facts = there.map(name => `${MEASURES[name].split(",")[0].toLowerCase()} ${number(token[name])}`);
      told.textContent = `\u201c${spelled(token.text)}\u201d, token ${i + 1} of ${list.length}: ${facts.join(", ")}`;
    };
    span.setAttribute("role", "img");
    span.setAttribute("aria-label", `${spelled(token.text)}: ${there.map(name => `${name} ${number(token[name])}`).join(", ")}`);
    span.addEventListener("focus", tell);
    span.addEventListener("mouseenter", tell);
    return span;
  });
  field.append(...spans);
  field.addEventListener("keydown", event => {
    const at = spans.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    spans[at].tabIndex = -1;
    spans[to].tabIndex = 0;
    spans[to].focus();
  });
  const paint = () => {
    const name = choose.value, known = list.map(token => token[name]).filter(x => x !== null);
    const most = Math.max(...known.map(Math.abs), 1e-9);
    list.forEach((token, i) => {
      const x = token[name] ?? 0;
      spans[i].style.setProperty("--hue", x < 0 ? "var(--cold)" : "var(--warm)");
      spans[i].style.setProperty("--part", `${Math.round(60 * Math.abs(x) / most)}%`);
    });
    const low = known.some(x => x < 0), high = known.some(x => x > 0);
    const tint = hue => `color-mix(in srgb, var(--${hue}) 60%, var(--panel))`;
    legend.children[0].textContent = low ? number(-most) : "0";
    legend.children[1].style.background =
      `linear-gradient(to right, ${[low && tint("cold"), "var(--panel)", high && tint("warm")].filter(Boolean).join(", ")}${low || high ? "" : ", var(--panel)"})`;
    legend.children[2].textContent = high ? number(most) : "0";
  };
  choose.addEventListener("change", paint);
  paint();
  const heads = ["token", ...there].map(name => make("th", { scope: "col", textContent: name }));
  const rows = list.map(token => make("tr", {}, make("td", { textContent: spelled(token.text) }), ...there.map(name => make("td", { textContent: number(token[name]) }))));
  const table = make("table", {}, make("caption", { textContent: "One row per token" }), make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  const scroll = make("div", { className: "scroll", tabIndex: 0 }, table);
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Tokens as a table");
  box.append(make("div", { className: "microscope" },
    make("p", { className: "note", textContent: there.length < 4 ? `Not known to this server: ${Object.keys(MEASURES).filter(n => !there.includes(n)).join(", ")}` : "" }),
    make("label", { htmlFor: id, textContent: "Colour by" }), choose, legend, field, told,
    make("details", {}, make("summary", { textContent: "As a table" }), scroll)));
}
