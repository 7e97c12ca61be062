// The page works without this file; with it, keys answer, and the next pair comes without a reload.
const status = document.getElementById("status");
const answers = {
  a: "left", arrowleft: "left", 1: "left", b: "right", arrowright: "right", 2: "right", t: "tie", x: "both_bad", s: "skip",
};
const said = {
  left: "Saved: A is better.", right: "Saved: B is better.", tie: "Saved: as good.", both_bad: "Saved: both bad.",
  skip: "Skipped.", undo: "Taken back: here is your last pair again.",
};
let busy = false;

function say(text) {
  // a text that stays the same is not read out again
  status.textContent = "";
  requestAnimationFrame(() => { status.textContent = text; });
}

function show(html, text) {
  const page = new DOMParser().parseFromString(html, "text/html");
  const main = document.adoptNode(page.getElementById("main"));
  document.getElementById("main").replaceWith(main);
  document.title = page.title;
  if (!document.getElementById("answer")) document.querySelector(".jump").remove();
  const problem = main.querySelector("[role=alert]");
  say(problem ? problem.textContent : text);
  scrollTo(0, 0);
  main.querySelector("h1").focus({ preventScroll: true });
  remember();
}

async function send(form, answer) {
  if (busy) return;
  busy = true;
  const fields = new URLSearchParams(new FormData(form));
  if (answer) fields.set("answer", answer);
  try {
    const reply = await fetch(form.action, { method: "POST", body: fields });
    if (reply.ok) show(await reply.text(), said[answer || "undo"]);
    else say("Not saved: " + (await reply.text()));
  } catch {
    say("Not saved: the server does not answer. Start it again, and open the address that it shows.");
  } finally {
    busy = false;
  }
}

function answer(value) {
  const form = document.getElementById("vote");
  if (form) send(form, value);
}

function edit(side) {
  const field = document.getElementById("edit-" + side);
  if (!field) return;
  field.closest("details").open = true;
  field.focus();
}

function undo() {
  const form = document.querySelector('form[action="/undo"]');
  if (form) send(form);
}

function inField(event) {
  if (event.key === "Escape") {
    event.target.blur();
    document.querySelector("main h1").focus({ preventScroll: true });
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.id.startsWith("edit-")) {
    event.preventDefault();
    answer(event.target.id.slice("edit-".length));
  }
}

function pressed(event) {
  if (event.target.matches("textarea, input:not([type=checkbox])")) return inField(event);
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !keysOn()) return;
  const key = event.key.toLowerCase();
  if (event.shiftKey && (key === "a" || key === "b")) edit(key === "a" ? "left" : "right");
  else if (event.shiftKey) return;
  else if (key in answers) answer(answers[key]);
  else if (key === "u") undo();
  else if (key === "c" && document.getElementById("comment")) document.getElementById("comment").focus();
  else return;
  event.preventDefault();
}

function keysOn() {
  return localStorage.getItem("favor-keys") !== "off";
}

function remember() {
  const box = document.getElementById("keys");
  if (box) box.checked = keysOn();
}

document.addEventListener("keydown", pressed);
document.addEventListener("change", (event) => {
  if (event.target.id === "keys") localStorage.setItem("favor-keys", event.target.checked ? "on" : "off");
});
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.id !== "vote" && form.getAttribute("action") !== "/undo") return;
  event.preventDefault();
  send(form, event.submitter && event.submitter.value);
});
remember();
