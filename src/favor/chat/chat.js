// Asks both models, shows their answers as they come, and sends votes.
const $ = (id) => document.getElementById(id);
const numbers = [1, 2];
const names = { before: "before training", after: "after training" };
// what was said before this question; the two answers to it; the question that can be voted on
let talk = [];
let prompt = null;
let texts = ["", ""];
let asked = null;
let reading = null;

function say(text) {
  $("status").textContent = "";
  requestAnimationFrame(() => { $("status").textContent = text; });
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text || "";
}

async function post(path, value, signal) {
  const body = JSON.stringify(value);
  return fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
}

// a question

function question() {
  const said = $("prompt").value;
  // a first question is plain text, as in a row of preferences; what follows needs turns
  return talk.length ? [...talk, { role: "user", content: said }] : said;
}

async function ask(what) {
  if (reading) return;
  prompt = what;
  begin();
  reading = new AbortController();
  try {
    const sample = { temperature: $("temperature").valueAsNumber, max_new_tokens: $("most").valueAsNumber };
    const value = { prompt, sample, seed: $("seed").valueAsNumber, blind: $("blind").checked };
    const reply = await post("/ask", value, reading.signal);
    if (reply.ok) await read(reply.body.pipeThrough(new TextDecoderStream()).getReader());
    else failed(await reply.text());
  } catch (error) {
    if (error.name === "AbortError") say("Stopped. What came so far cannot be voted on.");
    else failed("The server does not answer. Start it again, and open the address that it shows.");
  } finally {
    reading = null;
    working(false);
  }
}

function begin() {
  problem("");
  asked = null;
  texts = ["", ""];
  $("both").hidden = false;
  for (const n of numbers) {
    $("name-" + n).textContent = "Answer " + n + ($("blind").checked ? "" : n === 1 ? ": before training" : ": after training");
    for (const part of ["text-", "value-", "reward-", "rows-"]) $(part + n).replaceChildren();
    for (const part of ["cut-", "on-", "table-"]) $(part + n).hidden = true;
    $("text-" + n).removeAttribute("role");
  }
  working(true);
  say("Both are answering.");
}

function working(on) {
  for (const n of numbers) $("text-" + n).setAttribute("aria-busy", String(on));
  $("send").disabled = on;
  $("stop").disabled = !on;
  $("again").disabled = on || prompt === null;
  $("fresh").disabled = on || !talk.length;
  for (const button of $("vote").querySelectorAll("button")) button.disabled = on || asked === null;
}

function failed(text) {
  say("");
  problem(text);
}

async function read(lines) {
  let rest = "";
  for (;;) {
    const { value, done } = await lines.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) line(JSON.parse(part));
  }
  if (asked === null && $("problem").hidden) failed("The answers ended early; the terminal may say why.");
}

function line(found) {
  if (found.problem) return failed(found.problem);
  if (found.done === undefined) {
    texts[found.place] += found.add;
    $("text-" + (found.place + 1)).append(found.add);
    return;
  }
  asked = found.done;
  found.texts.forEach((answer, place) => {
    texts[place] = answer.text;
    $("text-" + (place + 1)).textContent = answer.text;
    $("cut-" + (place + 1)).hidden = answer.ended;
    $("on-" + (place + 1)).hidden = false;
  });
  if (found.revealed) reveal(found.revealed);
  say("Both answers are there. Vote: 1, 2, T as good, X both bad.");
  if (document.activeElement !== $("prompt") || !$("prompt").value) $("name-1").scrollIntoView({ block: "nearest" });
}

// what the models think of the tokens

function reveal(answers) {
  answers.forEach((answer, place) => {
    const n = place + 1;
    $("name-" + n).textContent = "Answer " + n + ": " + names[answer.side];
    $("reward-" + n).textContent = "Implicit reward " + signed(answer.reward);
    $("text-" + n).replaceChildren(...answer.pieces.map((piece, at) => token(n, piece, at)));
    $("text-" + n).setAttribute("role", "group");
    $("text-" + n).setAttribute("aria-labelledby", "name-" + n);
    $("rows-" + n).replaceChildren(...answer.pieces.map(row));
    $("table-" + n).hidden = false;
  });
}

function signed(value) {
  return (value < 0 ? "-" : "+") + Math.abs(value).toFixed(3);
}

function shade(ratio) {
  const size = Math.abs(ratio);
  if (size <= 0.1) return "z0";
  return (ratio < 0 ? "n" : "p") + (size > 2 ? 3 : size > 0.5 ? 2 : 1);
}

function token(n, [text, before, after], at) {
  const span = document.createElement("span");
  span.className = "t " + shade(after - before) + (text ? "" : " end");
  span.textContent = text || "end";
  span.tabIndex = at === 0 ? 0 : -1;
  const words = (text ? JSON.stringify(text) : "end of the turn") + ": log-ratio " + signed(after - before);
  const tell = () => { $("value-" + n).textContent = words + " (after " + after.toFixed(3) + ", before " + before.toFixed(3) + ")"; };
  span.addEventListener("focus", tell);
  span.addEventListener("mouseenter", tell);
  return span;
}

function row([text, before, after]) {
  const tr = document.createElement("tr");
  for (const value of [text || "(end)", signed(after - before), before.toFixed(3), after.toFixed(3)]) {
    const td = document.createElement("td");
    td.textContent = value;
    tr.append(td);
  }
  return tr;
}

function step(span, key) {
  const all = [...span.parentElement.children];
  const at = all.indexOf(span);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[key];
  if (to === undefined) return false;
  const next = all[Math.max(0, Math.min(all.length - 1, to))];
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  return true;
}

// votes

async function send(path, value) {
  try {
    const reply = await post(path, value);
    const found = reply.ok ? await reply.json() : { problem: await reply.text() };
    if (!found.problem) return found;
    failed(found.problem);
  } catch {
    failed("Not saved: the server does not answer. Start it again, and open the address that it shows.");
  }
  return null;
}

const said = { first: "answer 1 is better", second: "answer 2 is better", tie: "as good", both_bad: "both bad" };

async function vote(answer) {
  if (asked === null || reading) return;
  const mine = asked;
  const found = await send("/vote", { ask: mine, answer });
  if (!found || mine !== asked) return;
  reveal(found.revealed);
  count(found.tally);
  problem("");
  const sides = found.revealed.map((one, place) => place + 1 + " was " + names[one.side]).join(", ");
  say((found.saved ? "Saved: " + said[answer] : "You have voted on these two answers before, and that vote stands") + ". " + sides + ".");
}

async function undo() {
  const found = await send("/undo", {});
  if (!found) return;
  count(found.tally);
  say("Taken back. These answers can be voted on again.");
}

function count(tally) {
  for (const [name, value] of Object.entries(tally)) $("tally-" + name).textContent = value;
  $("undo").disabled = !Object.values(tally).some(Boolean);
}

// conversations

function goOn(n) {
  const asked = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
  talk = [...asked, { role: "assistant", content: texts[n - 1] }];
  shown();
  $("prompt").value = "";
  $("prompt").focus();
  say("Both go on from answer " + n + ".");
}

function shown() {
  $("talk").replaceChildren(...talk.map(({ role, content }) => {
    const li = document.createElement("li");
    const who = document.createElement("b");
    who.textContent = role === "user" ? "You" : "Answer";
    li.append(who, content);
    return li;
  }));
  $("fresh").disabled = !talk.length;
}

function again() {
  if (reading || prompt === null) return;
  $("seed").value = $("seed").valueAsNumber + 1;
  ask(prompt);
}

// keys

const votes = { 1: "first", 2: "second", t: "tie", x: "both_bad" };

function pressed(event) {
  if (event.key === "Escape") return reading ? reading.abort() : leave(event);
  if (event.target === $("prompt")) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    return $("ask").requestSubmit();
  }
  if (event.target.matches(".t") && step(event.target, event.key)) return event.preventDefault();
  if (event.target.matches("input:not([type=checkbox])") || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (event.repeat || event.shiftKey || !keysOn()) return;
  if (key in votes) vote(votes[key]);
  else if (key === "n") again();
  else if (key === "u") { if (!$("undo").disabled) undo(); }
  else return;
  event.preventDefault();
}

function leave(event) {
  if (event.target.matches("textarea, input")) {
    event.target.blur();
    document.querySelector("h1").focus({ preventScroll: true });
  }
}

function keysOn() {
  return localStorage.getItem("favor-keys") !== "off";
}

document.addEventListener("keydown", pressed);
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!$("prompt").value.trim()) return;
  const what = question();
  $("prompt").blur();
  document.querySelector("h1").focus({ preventScroll: true });
  ask(what);
});
$("keys").addEventListener("change", () => localStorage.setItem("favor-keys", $("keys").checked ? "on" : "off"));
$("again").addEventListener("click", again);
$("stop").addEventListener("click", () => reading && reading.abort());
$("fresh").addEventListener("click", () => { talk = []; shown(); $("prompt").focus(); });
$("undo").addEventListener("click", undo);
$("vote").addEventListener("click", (event) => { if (event.target.closest("button")) vote(event.target.closest("button").value); });
for (const n of numbers) $("on-" + n).addEventListener("click", () => goOn(n));
$("keys").checked = keysOn();
$("undo").disabled = !["after", "before", "tie", "both_bad"].some((name) => Number($("tally-" + name).textContent));
working(false);
