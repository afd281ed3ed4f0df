// What is seen, and what the server has.

function go() {
  const wanted = location.hash.slice(1), last = view;
  if (wanted === "main") return;
  const open = [...VIEWS].filter(([, { link }]) => !link.hidden).map(([name]) => name);
  view = open.includes(wanted) ? wanted : open[0] ?? "chat";
  if (last !== view) VIEWS.get(last)?.leave?.();
  for (const [name, { link }] of VIEWS) {
    show(`view-${name}`, name === view);
    if (name === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  VIEWS.get(view).link.scrollIntoView({ block: "nearest", inline: "nearest" });  // on a phone the links may be more than fit
  const { title, compose, enter } = VIEWS.get(view);
  document.title = `${title} \u2013 plain-rlhf`;
  document.body.dataset.view = view;
  show("composer", Boolean(compose));
  show("pick", view === "chat" && facts.models.length > 1);
  problem();
  enter?.();
  if (last === view) return;
  const begun = compose && !document.querySelector(`#view-${view} .welcome`);
  if (begun) follow(true);
  else scrollTo(0, 0);
  show("latest", false);
}

async function start() {
  let failed = null;
  try {
    facts = await json("/health");
    $("model").textContent = facts.model;
    if (facts.models.length) facts.has.push("model");
    show("mode", facts.has.includes("chat"));
    for (const { link, needs } of VIEWS.values()) link.hidden = Boolean(needs) && !facts.has.includes(needs);
    $("pick").replaceChildren(...facts.models.map(name => make("option", { value: name, textContent: name })));
    setMode(mode);
    if (facts.models.length) tuned = await json("/v1/about");
    if (tuned.mode && !talk?.turns.length) setMode(tuned.mode);
  } catch (error) {
    failed = error.answered === 401 ? null : error;  // then it asks for the key
  }
  talk ??= fresh();
  if (!talk.turns.length) { talk.mode = mode; draw(); }
  go();
  problem(failed);
}

$("key").value = memory.get("key");
$("key-form").addEventListener("submit", event => {
  event.preventDefault();
  memory.set("key", $("key").value);
  show("key-box", false);
  start();
});
$("rater").value = memory.get("rater");
tellSampling();
addEventListener("hashchange", go);
start();
