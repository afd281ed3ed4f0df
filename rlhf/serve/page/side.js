// One prompt, one seed, two models: the one that was tuned and the one that it came from, as they write.

const duels = [];

async function duel(text) {
  const how = sampling(), context = mode === "chat" ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const votes = facts.has.includes("feedback"), blind = votes && $("blind").checked;
  const order = votes && Math.random() < .5 ? [1, 0] : [0, 1];  // or the votes would be for a side
  const sides = order.map((which, place) => {
    const model = facts.models[which], name = make("span", { textContent: blind ? `Answer ${"AB"[place]}` : model });
    const dot = make("span", { className: blind ? "dot hollow" : which ? "dot" : "dot tuned" });
    const words = make("div", { className: mode === "chat" ? "words rich" : "words text", dir: "auto", ariaBusy: "true" });
    const body = make("div", { className: "body", tabIndex: 0 }, words), tools = make("div", { className: "tools" });
    group(`Answer ${"AB"[place]} to prompt ${duels.length + 1}`, body);
    const node = make("article", {}, make("h3", { className: "who" }, dot, name), body, tools);
    return { model, which, name, dot, words, tools, node, body, text: "", place };
  });
  const again = tool("again", "Once more, with another seed", () => {
    if (running) return;
    $("seed").value = "";
    tellSampling();
    duel(text);
  }, true);
  const note = make("div", { className: "row note" }, `seed ${how.seed}, temperature ${how.temperature}`, again);
  const ballot = make("div", { className: "ballot" });
  const node = make("div", { className: "duel" }, make("div", { className: "said", dir: "auto", textContent: text }),
    make("div", { className: "sides" }, ...sides.map(side => side.node)), ballot, note);
  const round = { text, context, how, sides, blind, ballot, voted: !blind, shown: performance.now() };
  if (!duels.length) $("duels").replaceChildren();
  duels.push(round);
  $("duels").append(node);
  follow(true);
  announce("Both models are writing");
  await writing(signal => Promise.all(sides.map(side => writeSide(round, side, signal))));
  announce("Both answers are there");
  round.shown = performance.now();
  if (blind) askVote(round);
  follow();
}

function sayWords(round, side) {
  if (mode === "chat" || round.context.messages) side.words.replaceChildren(markdown(side.text));
  else side.words.replaceChildren(make("span", { className: "given", textContent: round.text }), side.text);
  side.body.scrollTop = side.body.scrollHeight;
}

async function writeSide(round, side, signal) {
  let due = 0;
  delete side.error;
  side.text = "";
  side.words.classList.add("writing");
  side.tools.replaceChildren();
  try {
    await write({ model: side.model, ...round.context }, round.how, signal, piece => {
      side.text += piece;
      due ||= requestAnimationFrame(() => { due = 0; sayWords(round, side); follow(); });
    });
  } catch (error) {
    if (error.name !== "AbortError") side.error = said(error);
  }
  cancelAnimationFrame(due);
  side.words.classList.remove("writing");
  side.words.setAttribute("aria-busy", "false");
  sayWords(round, side);
  side.body.scrollTop = 0;
  if (side.error) {
    const retry = press("Retry", async () => {
      if (running) return;
      wrong.remove();
      await writing(again => writeSide(round, side, again));
      if (!round.voted) askVote(round);
    });
    const wrong = card("No answer", side.error, retry);
    side.body.append(wrong);
    return;
  }
  if (round.voted) tellSide(round, side);
}

async function tellSide(round, side) {  // the name, the numbers, and what can be done with the answer
  side.name.textContent = side.model;
  side.dot.className = side.which ? "dot" : "dot tuned";
  const copier = tool("copy", "Copy", () => copy(side.text, copier)), facts = make("span", { className: "badges" });
  side.tools.replaceChildren(copier, facts);
  if (!side.text) { side.words.append(make("p", { className: "note", textContent: "The model said nothing." })); return; }
  try {
    const { tokens, score, kl } = await measured({ model: side.model, ...round.context }, side.text);
    const looker = tool("tokens", "Tokens", () => {
      const old = side.body.querySelector(".microscope");
      looker.setAttribute("aria-pressed", String(!old));
      side.words.hidden = !old;
      if (old) old.remove();
      else side.words.after(tokenView(tokens));
    }, true);
    looker.setAttribute("aria-pressed", "false");
    copier.after(looker);
    facts.replaceChildren(...badges({ score, kl }), badge("", counted(tokens.length, "token")));
  } catch (error) {
    facts.replaceChildren(make("span", { className: "note", textContent: said(error) }));
  }
}

// ---- votes

function askVote(round) {
  const [left, right] = round.sides;
  round.voter ??= make("input", { id: `voter-${random()}`, value: memory.get("rater"), maxLength: 100, required: true });
  round.voter.autocomplete = "nickname";
  const open = press("Show the names without a vote", () => reveal(round, ""), "quiet");
  if (left.error || right.error) { round.ballot.replaceChildren(open); return; }
  if (!left.text && !right.text) { reveal(round, ""); return; }
  if (left.text === right.text) { reveal(round, "Both say the same: there is nothing to vote on."); return; }
  const labels = { left: "A is better", tie: "Tie", both_bad: "Both bad", right: "B is better" };
  const buttons = Object.entries(labels).map(([choice, label]) => {
    const button = press(label, () => cast(round, choice), choice in { left: 1, right: 1 } ? "side" : "");
    button.dataset.choice = choice;
    return button;
  });
  const name = make("label", { htmlFor: round.voter.id, textContent: "Your name, kept with your votes" });
  round.ballot.replaceChildren(named(make("div", { className: "votes" }, ...buttons), { role: "group", "aria-label": "Your vote" }),
    make("div", { className: "row voter" }, name, round.voter, open));
  follow();
}

async function cast(round, choice) {
  const rater = round.voter.value.trim();
  if (!rater) { round.voter.focus(); round.voter.reportValidity(); return; }
  if (round.casting) return;
  round.casting = true;
  memory.set("rater", rater);
  if (round.rater !== rater) Object.assign(round, { rater, comparison: undefined, nonce: undefined });  // both are one rater's
  round.nonce ??= random();  // the same until the server has answered: then the vote is stored, and once
  try {
    const { seed, temperature, top_p } = round.how;
    const [left, right] = round.sides.map(side => ({ text: side.text, model: side.model, sampling: { seed, temperature, top_p } }));
    round.comparison ??= (await json("/v1/comparison", { ...round.context, left, right, rater })).id;
    const body = { rater, choice, strength: null, seconds: (performance.now() - round.shown) / 1000, nonce: round.nonce };
    const { vote } = await json(`/v1/comparison/${encodeURIComponent(round.comparison)}/vote`, body);
    const winner = { left: left.model, right: right.model }[choice];
    const takeBack = async () => {
      try {
        await json(`/v1/votes/${encodeURIComponent(vote)}/undo`, { rater });
        reveal(round, "The vote is taken back.");
      } catch (error) {
        problem(error);
      }
    };
    reveal(round, `Stored: ${winner ? `you prefer ${winner}` : CHOSEN[choice]}.`, press("Take it back", takeBack, "quiet"));
  } catch (error) {
    round.ballot.querySelector(".card")?.remove();
    round.ballot.append(card("The vote is not stored", said(error), press("Send it again", () => cast(round, choice))));
    follow();
  } finally {
    round.casting = false;
  }
}

function reveal(round, words, ...more) {
  round.voted = true;
  round.ballot.replaceChildren(make("div", { className: "row" }, worded("p", words, "verdict"), ...more));
  announce(words);
  if (!round.told) for (const side of round.sides) tellSide(round, side);
  round.told = true;
  follow();
}

addView("side", {
  title: "Side by side", needs: "reference", compose: duel,
  enter() {
    show("blind-label", facts.has.includes("feedback"));
    if (!duels.length) {
      const words = `One prompt and one seed go to ${facts.models.join(" and ")}. ${tuned.tuned ?? ""}`;
      $("duels").replaceChildren(greeting("What did the tuning change?", words, duel));
    }
  },
});
