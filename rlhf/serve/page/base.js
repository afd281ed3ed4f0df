// Text of models and users enters the page as textContent and in no other way.
const $ = id => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};
const show = (id, on) => { $(id).hidden = !on; };

// ---- requests

const memory = {  // survives a reload of this tab; a browser may refuse even that
  get: name => { try { return sessionStorage.getItem(name) || ""; } catch { return ""; } },
  set: (name, value) => { try { sessionStorage.setItem(name, value); } catch { /* only forgotten sooner */ } },
};

async function call(path, body, signal) {
  const headers = {};
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store", credentials: "omit" };
  const response = await fetch(path, body ? { ...options, body: JSON.stringify(body) } : options);
  if (response.ok) return response;
  if (response.status === 401) $("key-box").open = true;
  const content = await response.json().catch(() => ({}));
  const error = new Error(content.error?.message || `the server answered ${response.status}`);
  error.answered = response.status;
  throw error;
}
const json = async (path, body) => (await call(path, body)).json();

function problem(error) {
  show("problem", Boolean(error));
  $("problem").textContent = !error ? "" : error.answered ? error.message : `the server cannot be reached (${error.message})`;
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

// ---- views

let view = "", facts = { has: [] };  // the name of the view that is seen; what /health says
const VIEWS = new Map();

// A view of the page: its section is #view-NAME.
// title: of the link to it. needs: what "has" in /health must name, or the link stays hidden.
// enter(), leave(): called whenever it comes into sight and goes out of it, e.g. to begin and end asking the server.
function addView(name, { title, needs, enter, leave }) {
  const link = make("a", { href: `#${name}`, textContent: title, hidden: Boolean(needs) });
  VIEWS.set(name, { title, needs, enter, leave, link });
  $("views").append(link);
}
