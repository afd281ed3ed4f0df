let current = null, shownAt = 0, pending = null, votes = [], busy = false;

const CHOSEN = { left: "A is better", right: "B is better", tie: "Tie", both_bad: "Both bad", skip: "Skipped" };
const say = text => { $("compare-status").textContent = text; };

async function next(told = "") {
  const response = await call("/v1/comparison?rater=" + encodeURIComponent($("rater").value.trim()));
  current = response.status === 204 ? null : await response.json();
  if (current) {
    $("prompt").textContent = current.prompt;
    $("left").textContent = current.left.text;
    $("right").textContent = current.right.text;
    $("strength").value = "";
    shownAt = performance.now();
  }
  show("comparison", Boolean(current));
  show("after", true);
  show("more", !current);
  say(current ? told : `${told} Nothing is left to compare. Thank you!`.trim());
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

const random = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), b => b.toString(16).padStart(2, "0")).join("");

function vote(choice) {
  if (!current || pending) return;
  const sided = choice === "left" || choice === "right";
  const strength = sided && $("strength").value ? Number($("strength").value) : null;
  const body = { rater: $("rater").value.trim(), choice, strength, seconds: (performance.now() - shownAt) / 1000, nonce: random() };
  guarded(() => deliver({ path: `/v1/comparison/${encodeURIComponent(current.id)}/vote`, body }));
}

async function deliver(letter) {  // the same nonce until the server has answered: then it is stored, and once
  pending = letter;
  let stored;
  for (let attempt = 0; !stored; attempt++) {
    try {
      stored = await json(letter.path, letter.body);
    } catch (error) {
      const final = error.answered >= 400 && error.answered < 500 && error.answered !== 401 && error.answered !== 429;
      if (final) pending = null;
      if (final || error.answered === 401 || attempt === 3) throw error;
      await new Promise(done => setTimeout(done, 300 * 2 ** attempt));
    }
  }
  pending = null;
  votes.push(stored.vote);
  await next(`Stored: ${CHOSEN[letter.body.choice]}. ${votes.length} vote${votes.length > 1 ? "s" : ""} in this session.`);
}

function undo() {
  if (!votes.length) return;
  guarded(async () => {
    await json(`/v1/votes/${encodeURIComponent(votes[votes.length - 1])}/undo`, { rater: $("rater").value.trim() });
    votes.pop();
    await next("The last vote is undone.");
  });
}

$("rater-form").addEventListener("submit", event => {
  event.preventDefault();
  memory.set("rater", $("rater").value);
  guarded(async () => { await next(); if (current) $("prompt-title").focus(); });
});
$("rater").addEventListener("input", () => { current = pending = null; votes = []; show("comparison", false); show("after", false); say(""); });
for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => vote(button.dataset.choice));
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
  if (current && "123".includes(key)) $("strength").value = key;
});

addView("compare", { title: "Compare", needs: "feedback" });
