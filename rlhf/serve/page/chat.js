// A conversation is {id, created, mode, turns}; a turn {text} of the reader's, or {answers, at} of the model's, `at` the one that
// is shown and goes on. In the mode "text" the model continues the turn before as it stands.

let talk = null, tuned = { prompts: [] };  // what the model was tuned for, prompts of that kind, and the mode that they are for
const numbers = new WeakMap();  // answer -> what `measured` says of it
const fresh = () => ({ id: random(), created: new Date().toISOString(), mode, turns: [] });
const chosen = turn => turn.answers?.[turn.at];

// ---- what the model is asked

function contextOf(here, k, begun = "") {  // for the answer of turn k
  const model = $("pick").value ? { model: $("pick").value } : {};
  if (here.mode === "text") return { ...model, prompt: here.turns[k - 1].text + begun };
  const messages = [...messagesOf(here.turns.slice(0, k - 1)), { role: "user", content: here.turns[k - 1].text }];
  if (begun) messages.push({ role: "assistant", content: begun });
  return { ...model, messages };
}

function messagesOf(turns) {  // what failed was not said
  const messages = [];
  for (let i = 0; i < turns.length; i += 2) {
    const text = chosen(turns[i + 1])?.text;
    if (text) messages.push({ role: "user", content: turns[i].text }, { role: "assistant", content: text });
  }
  return messages;
}

async function ask(k, begun = null) {  // a new answer of turn k, or `begun` goes on
  if (running) return;
  const here = talk, turn = here.turns[k], { usual, max_tokens, ...how } = sampling();
  const answer = begun ?? { text: "", ...how, model: $("pick").value || facts.model };
  if (!begun) turn.at = turn.answers.push(answer) - 1;
  const context = contextOf(here, k, answer.text);
  delete answer.error;
  answer.finish = "";
  $("log").setAttribute("aria-busy", "true");  // a screen reader gets the answer when it is whole
  await writing(async signal => {
    drawTurn(here, k);
    follow();
    announce("The model is writing");
    let due = 0;
    const grow = piece => {
      answer.text += piece;
      due ||= requestAnimationFrame(() => { due = 0; if (talk === here) { sayAnswer(here, k); follow(); } });
    };
    try {
      const { finish, usage } = await write(context, { usual, max_tokens, ...how }, signal, grow);
      answer.finish = finish;
      here.used = usage?.total_tokens;
    } catch (error) {
      if (error.name === "AbortError") answer.finish = "stopped";
      else answer.error = { message: said(error), code: error.code ?? "" };
    }
    cancelAnimationFrame(due);
  });
  keep(here);
  $("log").setAttribute("aria-busy", "false");
  if (talk !== here) return;
  drawTurn(here, k);
  tellRoom();
  follow();
  if (answer.text && (facts.has.includes("reward") || facts.has.includes("reference"))) tellNumbers(here, k, answer);
}

async function tellNumbers(here, k, answer) {
  try {
    const { score, kl } = await lookAt(here, k, answer);
    Object.assign(answer, { score, kl });
    keep(here);
    if (talk === here && chosen(here.turns[k]) === answer) nodeOf(k)?.querySelector(".badges")?.replaceChildren(...badges(answer));
  } catch { /* the answer stands without them, and its tokens say why */ }
}

async function lookAt(here, k, answer) {
  if (numbers.get(answer)?.text !== answer.text) {
    const { model, ...context } = contextOf(here, k);
    const by = facts.models.includes(answer.model) ? { model: answer.model } : {};  // a kept one may be of another server
    numbers.set(answer, { text: answer.text, ...await measured({ ...by, ...context }, answer.text) });
  }
  return numbers.get(answer);
}

const known = x => (x ?? null) !== null;
const badges = ({ score, kl }) => [
  ...(known(score) ? [badge("score", signed(score), "of the reward model")] : []),
  ...(known(kl) ? [badge("KL", `${fixed(kl, 1)} nats`, "to the reference, exact, summed over the tokens")] : []),
];

// ---- how it looks

const nodeOf = k => $("log").querySelector(`[data-turn="${k}"]`);

function draw() {
  const turns = talk.turns.map((_, k) => turnNode(talk, k)).filter(Boolean);
  $("log").replaceChildren(...(turns.length ? turns : [welcome()]));
  tellRoom();
  listTalks();
  if (turns.length) follow(true);
  else scrollTo(0, 0);
}

function drawTurn(here, k) {
  if (talk !== here) return;
  const old = nodeOf(k), node = turnNode(here, k);
  if (old) old.replaceWith(node);
  else $("log").append(node);
  for (const node of $("log").querySelectorAll("[data-turn]")) {  // only the last answer can still be another one
    if (Number(node.dataset.turn) < here.turns.length - 1) for (const tool of node.querySelectorAll(".last-only")) tool.remove();
  }
}

function turnNode(here, k) {
  const turn = here.turns[k];
  const node = !turn.answers ? here.mode === "text" ? null : asked(here, k) : answered(here, k);
  if (node) node.dataset.turn = k;
  return node;
}

function asked(here, k) {
  const { text } = here.turns[k], words = make("div", { className: "text", dir: "auto", textContent: text });
  const copier = tool("copy", "Copy", () => copy(text, copier));
  const tools = make("div", { className: "tools" }, copier, tool("edit", "Edit", () => edit(here, k)));
  return make("article", { className: "user" }, make("h3", { className: "unseen", textContent: "You" }), words, tools);
}

function edit(here, k) {  // and ask again; what followed is replaced
  if (running) return;
  const node = nodeOf(here.mode === "text" ? k + 1 : k), id = `edit-${random()}`;
  const field = make("textarea", { id, value: here.turns[k].text, rows: 3 });
  const words = here.turns.length > k + 2 ? "Your text; what followed it will be replaced" : "Your text";
  const ends = make("div", { className: "row end" }, tool("shut", "Cancel", draw, true), worded("button", "Ask again", "main"));
  const form = make("form", {}, make("label", { htmlFor: id, textContent: words }), field, ends);
  form.addEventListener("submit", event => {
    event.preventDefault();
    if (!field.value.trim()) return;
    here.turns.length = k;
    draw();
    put(field.value);
  });
  form.addEventListener("keydown", event => { if (event.key === "Escape") draw(); });
  node.replaceChildren(form);
  field.focus();
}

function answered(here, k) {
  const turn = here.turns[k], answer = chosen(turn), last = k === here.turns.length - 1;
  const node = make("article", { className: "assistant" }), who = make("h3", { className: "who" });
  who.append(worded("span", "", answer.model === facts.model ? "dot tuned" : "dot"), answer.model ?? "Model");
  const words = make("div", { className: here.mode === "text" ? "words text" : "words rich", dir: "auto" });
  node.append(who, words);
  fill(words, here, k);
  const writes = running && !answer.finish && !answer.error;
  words.classList.toggle("writing", Boolean(writes));
  if (writes) return node;
  if (answer.error) node.append(failure(here, k));
  else if (!answer.text) words.append(worded("p", answer.finish === "stopped" ? "Stopped before the first word." : NOTHING, "note"));

  const tools = make("div", { className: "tools" }), copier = tool("copy", "Copy", () => copy(answer.text, copier));
  const again = tool("again", "Regenerate", () => ask(k));
  const on = tool("more", "Continue", () => ask(k, answer), answer.finish === "length" || answer.finish === "stopped");
  const looker = tool("tokens", "Tokens", () => look(here, k, node, looker), true);
  looker.setAttribute("aria-pressed", "false");
  if (answer.text) tools.append(copier);
  if (here.mode === "text") tools.append(tool("edit", "Edit", () => edit(here, k - 1)));
  if (last && !answer.error) tools.append(lastOnly(again));
  const filled = last && answer.finish === "length" && here.used >= facts.max_length - 1;
  if (last && answer.text && answer.finish !== "stop" && !filled) tools.append(lastOnly(on));
  if (answer.text) tools.append(looker);
  if (last && turn.answers.length > 1) tools.append(lastOnly(flip(here, k)));
  tools.append(make("span", { className: "badges" }, ...badges(answer)));
  if (tools.children.length > 1) node.append(tools);
  if (filled) node.append(lastOnly(full(here)));
  return node;
}

const NOTHING = "The model said nothing.";
const lastOnly = node => { node.classList.add("last-only"); return node; };

function flip(here, k) {
  const turn = here.turns[k], node = make("span", { className: "flip" });
  const go = (by, name) => () => {
    turn.at = (turn.at + by + turn.answers.length) % turn.answers.length;
    keep(here);
    drawTurn(here, k);
    nodeOf(k).querySelector(`[aria-label="${name}"]`).focus();
    announce(`Answer ${turn.at + 1} of ${turn.answers.length}`);
  };
  const [before, after] = ["Previous answer", "Next answer"];
  node.append(tool("left", before, go(-1, before)), `${turn.at + 1} / ${turn.answers.length}`, tool("right", after, go(1, after)));
  return node;
}

function fill(words, here, k) {
  const { text } = chosen(here.turns[k]);
  if (here.mode === "text") words.replaceChildren(make("span", { className: "given", textContent: here.turns[k - 1].text }), text);
  else words.replaceChildren(markdown(text));
}

function sayAnswer(here, k) {
  const words = nodeOf(k)?.querySelector(".words");
  if (words) fill(words, here, k);
}

async function look(here, k, node, button) {  // the tokens in the place of the words, and back
  const words = node.querySelector(".words"), old = node.querySelector(".microscope"), on = !old;
  button.setAttribute("aria-pressed", String(on));
  if (old) { old.remove(); words.hidden = false; return; }
  try {
    const { tokens } = await lookAt(here, k, chosen(here.turns[k]));
    if (button.getAttribute("aria-pressed") === "false" || node.querySelector(".microscope")) return;
    words.hidden = true;
    words.after(tokenView(tokens));
  } catch (error) {
    button.setAttribute("aria-pressed", "false");
    node.append(card("The tokens cannot be shown", said(error)));
  }
}

function failure(here, k) {
  const turn = here.turns[k], { error, text } = chosen(turn);
  const retry = press("Retry", () => { if (!text) { turn.answers.splice(turn.at, 1); turn.at = 0; } ask(k); });
  if (error.code !== "context_length_exceeded") return card(text ? "The answer broke off" : "No answer", error.message, retry);
  const last = press("Begin anew with this message", () => { const again = here.turns[k - 1].text; begin(); put(again); });
  return card("The model cannot read any more", error.message, press("New conversation", () => begin()), last);
}

function full(here) {
  const words = `${counted(facts.max_length, "token")}, the answer with them.`;
  const node = card("The conversation fills what the model can read", words, press("New conversation", () => begin()));
  node.classList.remove("bad");
  return node;
}

const EXAMPLES = {  // where the run beside the model has none
  chat: ["Name three fruits that are red.", "Write a haiku about rain.", "Explain what a mirror does."],
  text: ["Once upon a time", "The film was", "The best thing about"],
};

function welcome() {
  const name = facts.model ?? "the model", unknown = "What this model was tuned for is not known here: it has no run beside it.";
  return greeting(mode === "chat" ? `Talk to ${name}` : `Let ${name} continue a text`, tuned.tuned ?? unknown, put);
}

function greeting(title, about, use) {  // before anything is asked
  const own = tuned.prompts.length && tuned.mode === mode ? tuned.prompts : EXAMPLES[mode];
  const examples = make("div", { className: "examples" }, ...own.map(text => press(text, () => { if (!running) use(text); })));
  return make("div", { className: "welcome" }, worded("h3", title), worded("p", about, "about"), group("Examples", examples));
}

function tellRoom() {
  $("room").textContent = talk.used ? `${talk.used.toLocaleString("en")} of ${counted(facts.max_length, "token")}` : "";
}

// ---- what is kept

const MOST_TALKS = 100;
const gone = new Set();  // ids of what was deleted, and may still be being written
function talks() {
  try {
    const all = JSON.parse(disk.get("talks") || "[]");
    return Array.isArray(all) ? all.filter(one => Array.isArray(one?.turns) && one.turns.length) : [];
  } catch {
    return [];
  }
}

function keep(here) {
  if (!here.turns.length || gone.has(here.id)) return;
  let all = [here, ...talks().filter(one => one.id !== here.id)].slice(0, MOST_TALKS);
  while (!disk.set("talks", JSON.stringify(all)) && all.length > 1) all = all.slice(0, Math.floor(all.length / 2));  // it is full
  listTalks();
}

function listTalks() {
  const items = talks().map(one => {
    const day = new Date(one.created).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    const opener = make("button", { type: "button", className: "quiet open" });
    opener.append(worded("span", one.turns[0].text), worded("small", one.mode === "text" ? `${day} \u00b7 text` : day));
    if (one.id === talk.id) opener.setAttribute("aria-current", "true");
    opener.addEventListener("click", () => {
      openHistory(false);
      if (one.id === talk.id) return;
      running?.abort();
      setMode(one.mode);
      talk = one;
      draw();
    });
    const remove = tool("bin", "Delete this conversation", () => {
      gone.add(one.id);
      disk.set("talks", JSON.stringify(talks().filter(other => other.id !== one.id)));
      if (one.id === talk.id) begin(); else listTalks();
    });
    return make("li", {}, opener, remove);
  });
  $("talks").replaceChildren(...items);
  show("export", items.length > 0);
}

function exported() {  // one line a conversation: messages as data.prepare reads them, or a prompt and what continues it
  return talks().filter(one => messagesOf(one.turns).length).map(({ turns, ...about }) => {
    const answered = turns.filter(turn => chosen(turn)), answers = answered.map(chosen);
    const alternatives = answered.flatMap(turn => turn.answers.filter(answer => answer !== chosen(turn)));
    const texts = about.mode === "text" ? { prompt: turns[0].text, completion: answers[0].text } : { messages: messagesOf(turns) };
    return `${JSON.stringify({ ...texts, ...about, answers, alternatives })}\n`;
  }).join("");
}

function openHistory(on) {
  const was = $("history").classList.contains("shown");
  $("history").classList.toggle("shown", on);
  $("open-history").setAttribute("aria-expanded", String(on));
  if (on) $("shut-history").focus();
  else if (was) $("open-history").focus();
}

// ---- begin and go on

function begin() {
  running?.abort();
  talk = fresh();
  draw();
  $("say").focus();
}

function put(text) {
  if (running) return;
  if (talk.mode === "text" && talk.turns.length) talk = fresh();  // every text is one of its own
  if (!talk.turns.length) { talk.mode = mode; $("log").replaceChildren(); }
  talk.turns.push({ text }, { answers: [], at: 0 });
  const k = talk.turns.length - 1, question = turnNode(talk, k - 1);
  if (question) $("log").append(question);
  follow(true);
  ask(k);
}

$("clear").addEventListener("click", begin);
$("export").addEventListener("click", () => download("conversations.jsonl", exported()));
$("open-history").addEventListener("click", () => openHistory(!$("history").classList.contains("shown")));
$("shut-history").addEventListener("click", () => openHistory(false));
document.addEventListener("click", ({ target }) => {
  if (!target.isConnected || target.closest("#history, #open-history")) return;
  $("history").classList.remove("shown");
  $("open-history").setAttribute("aria-expanded", "false");
});
$("history").addEventListener("keydown", event => { if (event.key === "Escape") openHistory(false); });
for (const button of $("mode").querySelectorAll("button")) button.addEventListener("click", () => {
  if (button.dataset.mode === mode) return;
  setMode(button.dataset.mode);
  begin();
});

addView("chat", { title: "Chat", needs: "model", compose: put });
