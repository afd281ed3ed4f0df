function go() {
  const wanted = location.hash.slice(1);
  if (wanted === "main") return;
  const last = view;
  view = VIEWS.has(wanted) ? wanted : "chat";
  if (last !== view) VIEWS.get(last)?.leave?.();
  for (const [name, { link }] of VIEWS) {
    show(`view-${name}`, name === view);
    if (name === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${VIEWS.get(view).title} \u2013 plain-rlhf`;
  problem();
  VIEWS.get(view).enter?.();
}
addEventListener("hashchange", go);
$("key").value = memory.get("key");
$("key-form").addEventListener("submit", event => { event.preventDefault(); begin(); });
$("key").addEventListener("change", () => { memory.set("key", $("key").value); problem(); });
$("rater").value = memory.get("rater");

async function begin() {
  go();
  try {
    facts = await json("/health");
    $("model").textContent = facts.model;
    hasChat = facts.has.includes("chat");
    if (!hasChat) {
      $("chat-title").textContent = VIEWS.get("chat").link.textContent = "Continue a text";
      $("say-label").textContent = "Text that the model continues";
      $("send").textContent = "Continue";
      $("clear").textContent = "Clear";
    }
    for (const { link, needs } of VIEWS.values()) link.hidden = Boolean(needs) && !facts.has.includes(needs);
  } catch (error) {
    problem(error);
  }
}
begin();
