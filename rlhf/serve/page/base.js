// Text of models and users enters the page as textContent and in no other way.
const $ = id => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};
const show = (id, on) => { $(id).hidden = !on; };
const named = (node, attributes) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

const ICONS = {  // lines on a ground of 16 by 16
  again: "M13 8a5 5 0 1 1-1.6-3.7M13 2v3h-3",
  bin: "M3 4.5h10M6 4.5V3h4v1.5M4.5 4.5l.6 8.5h5.8l.6-8.5",
  copy: "M6 6h7v7H6zM3 10V3h7",
  dials: "M3 5h6M12 5h1M3 11h1M7 11h6M10.5 3.5v3M5.5 9.5v3",
  down: "M8 3v10M3.5 8.5 8 13l4.5-4.5",
  edit: "M3 13l.6-2.8L10.5 3.3l2.2 2.2-6.9 6.9z",
  left: "M10 3 5 8l5 5",
  list: "M3 4.5h10M3 8h10M3 11.5h6",
  more: "M3 8h9M8.5 4.5 12 8l-3.5 3.5",
  plus: "M8 3v10M3 8h10",
  right: "M6 3l5 5-5 5",
  save: "M8 3v7M5 7.5l3 3 3-3M3 13h10",
  send: "M8 13V3M3.5 7.5 8 3l4.5 4.5",
  shut: "M4 4l8 8M12 4l-8 8",
  stop: "M4 4h8v8H4z",
  tokens: "M2 5h5v6H2zM9 5h5v6H9z",
};
function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS(svg.namespaceURI, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return named(svg, { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" });
}
// A small button with a sign; where `label` is not to be seen it is still its name.
function tool(sign, label, press, seen = false) {
  const button = make("button", { type: "button", className: "quiet" }, icon(sign));
  if (seen) button.append(make("span", { textContent: label }));
  else { button.title = label; button.setAttribute("aria-label", label); }
  button.addEventListener("click", press);
  return button;
}
function press(label, act, className = "") {
  const button = make("button", { type: "button", textContent: label, className });
  button.addEventListener("click", act);
  return button;
}
// A message as a sentence; the name of an option at its beginning stays as it is.
const sentence = words => words.replace(/^[a-z](?=[a-z]* )/, first => first.toUpperCase());
function card(title, words, ...buttons) {  // of what went wrong, where it was expected
  const node = named(make("div", { className: "card bad" }), { role: "alert" });
  node.append(make("p", {}, make("b", { textContent: title })), make("p", { textContent: sentence(words) }));
  if (buttons.length) node.append(make("div", { className: "row" }, ...buttons));
  return node;
}
for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));

const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), b => b.toString(16).padStart(2, "0")).join("");
const fixed = (x, digits = 2) => x === null || x === undefined ? "\u2013" : Number(x).toFixed(digits).replace("-", "\u2212");
const signed = (x, digits = 2) => (x > 0 ? "+" : "") + fixed(x, digits);
const counted = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const worded = (tag, words, className = "") => make(tag, { className, textContent: words });
const group = (name, node) => named(node, { role: "group", "aria-label": name });  // what scrolls, too, for the keyboard
const badge = (name, value, title = "") => make("span", { className: "badge", title }, name && `${name} `, worded("b", value));
const choose = (group, pressed) => {  // of buttons of which one is pressed
  for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(pressed(button)));
};

// ---- what the browser keeps

const kept = store => ({  // a browser may refuse even that
  get: name => { try { return store().getItem(`plain-rlhf ${name}`) || ""; } catch { return ""; } },
  set: (name, value) => { try { store().setItem(`plain-rlhf ${name}`, value); return true; } catch { return false; } },
});
const memory = kept(() => sessionStorage);  // until the tab is closed
const disk = kept(() => localStorage);

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // only pages of https and of this machine have a clipboard
    const field = make("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  announce("Copied");
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1200);
}

function download(name, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const announce = text => { $("announced").textContent = text; };  // for screen readers

// ---- requests

async function call(path, body, signal) {
  const headers = {};
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store", credentials: "omit" };
  const response = await fetch(path, body ? { ...options, body: JSON.stringify(body) } : options);
  if (response.ok) return response;
  if (response.status === 401) { show("key-box", true); $("key").focus(); }
  const content = await response.json().catch(() => ({}));
  const { message, code } = content.error ?? {};
  throw Object.assign(new Error(message || `the server answered ${response.status}`), { answered: response.status, code });
}
const json = async (path, body) => (await call(path, body)).json();

const said = error => error.answered ? error.message : `the server cannot be reached (${error.message})`;
function problem(error) {
  show("problem", Boolean(error));
  $("problem").textContent = error ? sentence(said(error)) : "";
}

async function* events(response) {  // the data of server-sent events
  const reader = response.body.getReader(), decoder = new TextDecoder();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const lines = rest.split(/\r?\n/);
    rest = done ? "" : lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    if (done) return;
  }
}

// Streams an answer: grow(piece) is called with every piece of text. -> {finish, usage}
// context: {messages} or {prompt}. sampling.usual: a length that is shortened where the model has no room for it.
async function write(context, { usual, ...sampling }, signal, grow) {
  const isChat = "messages" in context, path = isChat ? "/v1/chat/completions" : "/v1/completions";
  const whole = { ...context, ...sampling, stream: true, stream_options: { include_usage: true } };
  const ask = length => call(path, length ? { ...whole, max_tokens: length } : whole, signal);
  const response = await ask(usual).catch(error => {
    const [, has, width] = error.message.match(/^(\d+) tokens of the prompt and \d+ of the answer exceed the (\d+)/) ?? [];
    if (!usual || !(width - has > 0)) throw error;
    return ask(width - has);
  });
  let finish = "", usage = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const event = JSON.parse(data);
    if (event.error) throw Object.assign(new Error(event.error.message), { answered: 200, code: event.error.code });
    usage = event.usage ?? usage;
    const choice = event.choices[0];
    if (!choice) continue;
    grow((isChat ? choice.delta.content : choice.text) ?? "");
    finish = choice.finish_reason ?? finish;
  }
  return { finish, usage };
}

// ---- views

let view = "", facts = { has: [], models: [] };  // the name of the view that is seen; what /health says
const VIEWS = new Map();

// A view of the page: its section is #view-NAME.
// title: of the link to it. needs: "model", or what "has" in /health must name; else the link stays hidden.
// enter(), leave(): called whenever it comes into sight and goes out of it, e.g. to begin and end asking the server.
// compose(text): the view has the composer below it, and this is called with what is sent.
function addView(name, { title, needs, enter, leave, compose }) {
  const link = make("a", { href: `#${name}`, textContent: title, hidden: Boolean(needs) });
  VIEWS.set(name, { title, needs, enter, leave, compose, link });
  $("views").append(link);
}
