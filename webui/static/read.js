// One key for the verdict, one for the kind of bleed, one for the next series. Without this script each is a form.

import { follow, onKeys, singleKeys } from "./keys.js";

const panel = () => document.getElementById("read");
const recorded = document.getElementById("recorded");
const button = (key) => document.querySelector(`#review [data-key=${key}], #undo [data-key=${key}]`);

const ANSWER_MS = 20000;
let sending = false;
const typedAhead = [];

/** Send a form; put the part of the page that has changed in place, and say what was recorded. */
async function send(form, submitter) {
  if (sending) return; // a second press is not a second review
  sending = true;
  const patience = new AbortController();
  const timer = setTimeout(() => patience.abort(), ANSWER_MS); // a server that hangs must not swallow key after key
  try {
    const answer = await fetch(form.action, {
      method: "POST",
      body: new FormData(form, submitter),
      headers: { "X-Fragment": "read" },
      signal: patience.signal,
    });
    if (answer.status === 409) return location.replace(panel().dataset.page); // another result: the page says so
    if (!answer.ok || answer.redirected) throw new Error(`${answer.status}`);
    const text = await answer.text();
    panel().outerHTML = text;
    recorded.textContent = panel().dataset.said;
    recorded.className = "said";
    const dialog = document.getElementById("description");
    if (dialog?.open) ask(dialog);
    else document.getElementById("next").focus();
  } catch {
    typedAhead.length = 0;
    recorded.textContent = patience.signal.aborted
      ? `Perhaps not recorded: Herald gave no answer within ${ANSWER_MS / 1000} seconds. Reload to see what it has.`
      : "Not recorded: Herald gave no answer, or you are no longer logged in. Try again, or reload.";
    recorded.className = "said problem";
  }
  clearTimeout(timer);
  sending = false;
  while (typedAhead.length && !sending) {
    const key = new KeyboardEvent("keydown", { key: typedAhead.shift(), bubbles: true, cancelable: true });
    document.activeElement.dispatchEvent(key);
  }
}

/** Ask for the kind; the dialog holds the focus, and its keys are its own. */
function ask(dialog) {
  dialog.close();
  dialog.showModal();
  dialog.querySelector("button").focus();
}

document.addEventListener("submit", (event) => {
  const { target: form, submitter } = event;
  if (!panel()?.contains(form)) return;
  const dialog = form.closest("dialog");
  const blind = Boolean(document.querySelector("#review [data-key=y]"));
  // what shows a blind reader the prediction is a new page, since all of it changes
  const stays = dialog ? !blind : !blind || submitter?.matches("[data-describes], [data-key=z]");
  if (stays) {
    event.preventDefault();
    send(form, submitter);
  } else if (form.dataset.sent) event.preventDefault();
  else form.dataset.sent = "1";
});
addEventListener("pageshow", () => document.querySelectorAll("form").forEach((form) => delete form.dataset.sent));

document.addEventListener("click", (event) => {
  const link = event.target.closest("#describe");
  const dialog = document.getElementById("description");
  if (!link || !dialog || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  ask(dialog);
});

// before any other listener: while the dialog is open, a key means nothing elsewhere
document.addEventListener(
  "keydown",
  (event) => {
    if (sending && !event.target.matches("textarea, input, select") && !(event.ctrlKey || event.metaKey || event.altKey)) {
      // a reader is faster than the network: the key means what it will mean when the answer is here
      if (event.key.length === 1 || event.key === "Escape") {
        if (!event.repeat) typedAhead.push(event.key);
        event.preventDefault();
        return event.stopPropagation();
      }
    }
    const dialog = event.target.closest?.("dialog");
    if (!dialog) return;
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const writing = event.target.matches("textarea");
    if (writing && event.key !== "Escape") return;
    if (event.key.length === 1 && !singleKeys()) return;
    if (writing) dialog.querySelector("button").focus(); // Escape leaves the field, and the next one the dialog
    else if (event.key === "t") document.getElementById("note").focus();
    else {
      const chosen = [...dialog.querySelectorAll("[data-key]")].find((one) => one.dataset.key === event.key);
      if (!chosen) return;
      chosen.click();
    }
    event.preventDefault();
  },
  { capture: true },
);

const press = (key) => () => button(key) ? button(key).click() : false;
const bindings = { n: follow("next"), t: follow("describe"), w: () => document.querySelector(".brand").click() };
for (const key of ["a", "d", "u", "k", "y", "x", "z"]) bindings[key] = press(key);
onKeys(bindings);

const here = new URL(location);
here.pathname = panel().dataset.page; // the answer to a form that was refused has the address of the form
here.searchParams.delete("describe"); // a reload is not asked again
if (here.href !== location.href) history.replaceState(null, "", here);
const opened = document.getElementById("description");
if (opened?.open) ask(opened);
