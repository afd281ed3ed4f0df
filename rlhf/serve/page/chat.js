let messages = [], running = null, hasChat = true;

function bubble(role, text) {
  const names = { user: "You", assistant: "Model", text: "Text and continuation" };
  const words = make("div", { className: "text", dir: "auto", textContent: text });
  const box = make("article", { className: role }, make("h3", { textContent: names[role] }), words);
  $("log").append(box);
  return { box, words };
}

function sampling() {
  const values = { temperature: Number($("temperature").value), top_p: Number($("top_p").value), max_tokens: Number($("max_tokens").value) };
  return $("seed").value === "" ? values : { ...values, seed: Number($("seed").value) };
}

async function send() {
  const said = $("say").value;
  if (running || !said.trim() || !$("chat-form").reportValidity()) return;
  problem();
  $("say").value = "";
  const conversation = messages;  // a new one may begin before this answer has ended
  let context;
  if (hasChat) {
    bubble("user", said);
    conversation.push({ role: "user", content: said });
    context = { messages: [...conversation] };
  } else {
    context = { prompt: said };
  }
  const { box, words } = bubble(hasChat ? "assistant" : "text", hasChat ? "" : said);
  const answer = { role: "assistant", content: "" };
  running = new AbortController();
  show("stop", true);
  $("send").setAttribute("aria-disabled", "true");
  $("log").setAttribute("aria-busy", "true");  // a screen reader gets the answer when it is whole
  $("chat-status").textContent = "The model is writing";
  let end = "";
  try {
    const path = hasChat ? "/v1/chat/completions" : "/v1/completions";
    const response = await call(path, { ...context, ...sampling(), stream: true }, running.signal);
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw Object.assign(new Error(event.error.message), { answered: 200 });
      const choice = event.choices[0];
      if (!choice) continue;  // the usage, at the end
      answer.content += (hasChat ? choice.delta.content : choice.text) ?? "";
      words.textContent = (hasChat ? "" : said) + answer.content;
      end = choice.finish_reason ?? end;
    }
  } catch (error) {
    end = error.name === "AbortError" ? "stopped" : "failed";
    if (end === "failed") problem(error);
  }
  running = null;
  show("stop", false);
  $("send").removeAttribute("aria-disabled");
  $("log").setAttribute("aria-busy", "false");
  const ends = { length: "Cut off: most tokens reached", stopped: "Stopped", failed: "Broken off", stop: "" };
  $("chat-status").textContent = ends[end] ?? end;
  if (!answer.content) {
    if (end === "failed") {  // give the words back
      box.remove();
      if (hasChat) { conversation.pop(); $("log").lastElementChild?.remove(); }
      $("say").value = said;
    } else {
      words.append(make("span", { className: "note", textContent: "(empty answer)" }));
      if (hasChat) conversation.push(answer);
    }
    return;
  }
  if (hasChat) conversation.push(answer);
  const button = make("button", { className: "small", textContent: "Look at the tokens" });
  button.addEventListener("click", () => tokens({ ...context, response: answer.content }, box, button));
  box.append(make("div", { className: "row" }, button));
}

$("chat-form").addEventListener("submit", event => { event.preventDefault(); send(); });
$("say").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("stop").addEventListener("click", () => { running?.abort(); $("say").focus(); });
$("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("log").replaceChildren();
  $("chat-status").textContent = "";
  $("say").focus();
});

addView("chat", { title: "Chat" });
