// The field for what is asked, below every view that has compose(text).

let mode = "chat", running = null;  // chat or text; the AbortController of what is being written

function sampling() {
  const value = id => $(id).value === "" ? null : Number($(id).value), longest = value("max_tokens");
  const drawn = crypto.getRandomValues(new Uint32Array(1))[0];
  return {
    temperature: value("temperature") ?? 1, top_p: value("top_p") ?? 1, seed: value("seed") ?? drawn,
    ...(longest ? { max_tokens: longest } : { usual: Math.min(256, facts.max_tokens, facts.max_length >> 1) }),
  };
}

function fit() {  // as high as its text
  $("say").style.height = "auto";
  $("say").style.height = `${$("say").scrollHeight + 2}px`;
  follow();
}

// Runs work(signal) while the composer says that something is written.
async function writing(work) {
  const focused = document.activeElement;
  running = new AbortController();
  show("stop", true);
  if (focused === $("send")) $("stop").focus();
  show("send", false);
  try {
    const done = work(running.signal);
    if (!focused.isConnected) $("stop").focus();  // it was a button of what is written anew
    await done;
  } finally {
    running = null;
    show("send", true);
    if (document.activeElement === $("stop")) $("send").focus();
    show("stop", false);
  }
}

function setMode(wanted) {
  mode = facts.has.includes("chat") || !facts.model ? wanted : "text";
  choose($("mode"), button => button.dataset.mode === mode);
  const words = mode === "chat" ? "Message" : "Text that the model continues";
  $("say-label").textContent = words;
  $("say").placeholder = mode === "chat" ? `Ask ${facts.model ?? ""}` : "Begin a text, and the model goes on";
}

function tellSampling() {
  const seed = $("seed").value, words = `Temperature ${Number($("temperature").value)}`;
  $("sampling-now").textContent = seed === "" ? words : `${words}, seed ${seed}`;
}

async function submit() {
  const text = $("say").value;
  if (running || !text.trim()) return;
  if (!$("composer-form").checkValidity()) { openSampling(true); $("composer-form").reportValidity(); return; }
  problem();
  $("say").value = "";
  fit();
  VIEWS.get(view).compose(text);
}

function openSampling(on) {
  show("sampling", on);
  $("open-sampling").setAttribute("aria-expanded", String(on));
  follow();
}

$("composer-form").addEventListener("submit", event => { event.preventDefault(); submit(); });
$("say").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
$("say").addEventListener("input", fit);
$("sampling").addEventListener("input", tellSampling);
$("open-sampling").addEventListener("click", () => openSampling($("sampling").hidden));
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", event => { if (event.key === "Escape" && running) running.abort(); });

// ---- the page follows what is written, unless its reader has scrolled up

let follows = true, lastY = 0;
const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 60;
function follow(always = false) {
  if (always) follows = true;
  if (!follows) return;
  scrollTo(0, document.documentElement.scrollHeight);
  show("latest", false);
}
addEventListener("scroll", () => {
  if (atEnd()) follows = true;
  else if (scrollY < lastY) follows = false;  // text that comes makes the page longer, but only a reader goes up
  lastY = scrollY;
  show("latest", !follows);
}, { passive: true });
$("latest").addEventListener("click", () => { follow(true); $("say").focus(); });
