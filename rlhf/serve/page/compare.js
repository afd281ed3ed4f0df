// Two answers to one prompt, blind: who votes sees no names, and the store has drawn the sides.

let current = null, shownAt = 0, pending = null, votes = [], busy = false, strength = null;

const CHOSEN = { left: "A is better", right: "B is better", tie: "a tie", both_bad: "both bad", skip: "skipped" };
const ROLES = { user: "Prompt", assistant: "Answer before", system: "Instruction" };
const DONE = "Nothing is left to compare. Thank you!";
const EMPTY = "There is nothing to compare for you: whoever runs this server fills the store with pairs of answers.";
const LIVE = "Under Side by side, both models answer a prompt of yours, and you vote on that.";
const tell = text => { $("compare-status").textContent = text; };

function bubbles({ prompt, messages }) {
  const turns = messages ?? [{ role: "user", content: prompt }];
  return turns.map(({ role, content }) => {
    const name = make("span", { className: "unseen", textContent: `${ROLES[role] ?? role}: ` });
    const words = role === "assistant" ? make("div", { className: "rich" }, markdown(content)) : content;
    return make("div", { className: `said ${role}`, dir: "auto" }, name, words);
  });
}

async function next(told = "") {
  const response = await call("/v1/comparison?rater=" + encodeURIComponent($("rater").value.trim()));
  current = response.status === 204 ? null : await response.json();
  if (current) {
    $("prompt").replaceChildren(...bubbles(current));
    for (const side of ["left", "right"]) {
      $(side).className = current.messages ? "body rich" : "body text";
      $(side).replaceChildren(current.messages ? markdown(current[side].text) : current[side].text);
      $(side).scrollTop = 0;
    }
    strong(null);
    shownAt = performance.now();
    const { done, of } = current.progress;
    $("progress-text").textContent = `${done + 1} of ${of}`;
    $("progress-bar").value = done / of;
  } else {
    $("progress-text").textContent = "all done";
    $("progress-bar").value = 1;
    $("finished-text").textContent = shownAt ? DONE : facts.has.includes("reference") ? `${EMPTY} ${LIVE}` : EMPTY;
  }
  for (const id of ["comparison", "votes", "strengths", "skip"]) show(id, Boolean(current));
  show("rater-form", false);
  show("progress", shownAt > 0);
  show("ballot", shownAt > 0);
  show("finished", !current);
  tell(told);
}

function strong(value) {
  strength = value;
  choose($("strength"), button => Number(button.dataset.strength) === value);
}

async function guarded(work) {  // one thing at a time: a key that repeats is no second vote
  if (busy) return;
  busy = true;
  problem();
  try {
    await work();
  } catch (error) {
    problem(error);
  } finally {
    busy = false;
    show("retry", Boolean(pending));
    $("undo").setAttribute("aria-disabled", String(!votes.length));
  }
}

function vote(choice) {
  if (!current || pending) return;
  const sided = choice === "left" || choice === "right";
  const seconds = (performance.now() - shownAt) / 1000, rater = $("rater").value.trim();
  const body = { rater, choice, strength: sided ? strength : null, seconds, nonce: random() };
  guarded(() => deliver({ path: `/v1/comparison/${encodeURIComponent(current.id)}/vote`, body }));
}

async function stored(letter) {  // the same nonce until the server has answered: then it is stored, and once
  for (let attempt = 0; ; attempt++) {
    try {
      return await json(letter.path, letter.body);
    } catch (error) {
      const waits = !error.answered || error.answered >= 500 || error.answered === 429;
      if (!waits || attempt === 3) throw error;
      await new Promise(done => setTimeout(done, 300 * 2 ** attempt));
    }
  }
}

async function deliver(letter) {
  pending = letter;
  try {
    votes.push((await stored(letter)).vote);
  } catch (error) {
    const final = error.answered >= 400 && error.answered < 500 && error.answered !== 401 && error.answered !== 429;
    if (final) pending = null;  // it never will be stored
    throw error;
  }
  pending = null;
  await next(letter.body.choice === "skip" ? "Skipped." : `Stored: ${CHOSEN[letter.body.choice]}.`);
}

function undo() {
  if (!votes.length) return;
  guarded(async () => {
    await json(`/v1/votes/${encodeURIComponent(votes.at(-1))}/undo`, { rater: $("rater").value.trim() });
    votes.pop();
    await next("The last vote is undone.");
  });
}

$("rater-form").addEventListener("submit", event => {
  event.preventDefault();
  memory.set("rater", $("rater").value);
  guarded(async () => { await next(); if (current) $("prompt-title").focus(); });
});
for (const button of document.querySelectorAll("#ballot [data-choice]")) {
  button.addEventListener("click", () => vote(button.dataset.choice));
}
for (const button of $("strength").children) {
  const value = Number(button.dataset.strength);
  button.addEventListener("click", () => strong(strength === value ? null : value));
}
$("undo").addEventListener("click", undo);
$("more").addEventListener("click", () => guarded(() => next()));
$("retry").addEventListener("click", () => guarded(() => deliver(pending)));

const KEYS = { a: "left", ArrowLeft: "left", b: "right", ArrowRight: "right", t: "tie", x: "both_bad", s: "skip" };
document.addEventListener("keydown", event => {
  if (view !== "compare" || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("input, select, textarea, summary")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (KEYS[key] && current) { event.preventDefault(); vote(KEYS[key]); }
  if (key === "u") undo();
  if (current && "123".includes(key)) strong(Number(key));
});

addView("compare", { title: "Compare", needs: "feedback" });
