// Asks how the run stands; when it wrote something, loads the page anew where the reader was.
const line = document.getElementById("favor-live");
const every = 2000;
// a page is read for so long before it is loaded anew
const least = 4000;
const began = performance.now();
const kept = "favor-live " + location.pathname;

function remember() {
  const open = [...document.querySelectorAll("details")].map((one) => one.open);
  const chosen = [...document.querySelectorAll("input[type=radio]:checked, input[type=checkbox]:checked")].map((one) => one.id);
  sessionStorage.setItem(kept, JSON.stringify({ x: scrollX, y: scrollY, open, chosen }));
}

function restore() {
  const before = JSON.parse(sessionStorage.getItem(kept) || "null");
  sessionStorage.removeItem(kept);
  if (!before) return;
  const details = [...document.querySelectorAll("details")];
  if (details.length === before.open.length) details.forEach((one, at) => { one.open = before.open[at]; });
  for (const id of before.chosen) {
    const input = id && document.getElementById(id);
    if (input && !input.checked) input.click();
  }
  // after the page's own scripts have drawn what they draw
  requestAnimationFrame(() => requestAnimationFrame(() => scrollTo({ left: before.x, top: before.y, behavior: "instant" })));
}

function told(state) {
  const quiet = state.seconds > 120 ? ", nothing new for " + Math.floor(state.seconds / 60) + " min" : "";
  const text = state.finished ? "This run has finished, at step " + state.step : "Live: step " + state.step + quiet;
  say(text, state.finished);
}

function say(text, over) {
  line.hidden = false;
  line.classList.toggle("over", over);
  // a text that stays the same is not read out again
  if (line.textContent !== text) line.textContent = text;
}

function busy() {
  const field = document.activeElement;
  const typing = field && field.matches("input:not([type=radio]):not([type=checkbox]), textarea, select");
  return typing || document.hidden || String(getSelection()) !== "";
}

async function look() {
  try {
    const reply = await fetch("/state");
    if (!reply.ok) throw new Error(reply.status);
    const state = await reply.json();
    told(state);
    if (state.version !== line.dataset.version && !busy() && performance.now() - began > least) {
      remember();
      location.reload();
      return;
    }
  } catch {
    say("favor watch has ended; the page is as it was", true);
  }
  setTimeout(look, every);
}

history.scrollRestoration = "manual";
if (document.readyState === "complete") restore();
else addEventListener("load", restore);
look();
