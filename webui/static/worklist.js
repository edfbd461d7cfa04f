// The worklist keeps itself up to date, tells of a new positive, and is walked through by keyboard.

import { countAges, follow, onKeys } from "./keys.js";

const POLL_MS = 3000; // while no stream tells of changes
const CHECK_MS = 30000; // while one does: nothing that it could miss stays for long
const RETRY_MS = 60000; // after the server has refused a stream
const rows = document.getElementById("rows");
const offline = document.getElementById("offline");
const messages = document.querySelector(".messages");
const title = document.title;
let etag = "";
let live = false;
let asking = false;
let askAgain = false;
let timer;

const links = () => [...rows.querySelectorAll("a.open")];
const state = () => rows.querySelector("#state").dataset;

// --- what is shown ---

function badge() {
  const waiting = Number(state().unacknowledged);
  document.title = waiting ? `(${waiting}) ${title}` : title;
}

/** What can be found again after the rows have been replaced: a row by its revision, else a link by its relation. */
const places = (element) => {
  const series = element?.closest("tr[data-series]")?.dataset.series;
  if (series) return `tr[data-series="${CSS.escape(series)}"] a.open`;
  const relation = rows.contains(element) && element.getAttribute("rel");
  return relation ? `a[rel="${CSS.escape(relation)}"]` : null;
};

function swap(html) {
  const before = state().newestPositive;
  const focused = places(document.activeElement);
  const index = links().indexOf(document.activeElement);
  // what the reader looks at stays where it is on the screen, whatever comes in above it
  const seen = focused ?? places(links().find((link) => scrollY > 0 && link.getBoundingClientRect().top >= 0));
  const top = seen && rows.querySelector(seen)?.getBoundingClientRect().top;
  rows.innerHTML = html; // rendered and escaped by our own server
  const again = seen && rows.querySelector(seen);
  if (again) scrollBy(0, again.getBoundingClientRect().top - top);
  if (focused) (again ?? links()[Math.min(index, links().length - 1)])?.focus({ preventScroll: true });
  if (state().newestPositive > before) {
    messages.innerHTML = "<p>A new positive series has arrived.</p>";
    beep();
  }
  badge();
  countAges();
}

// --- live ---

async function ask() {
  clearTimeout(timer);
  askAgain = asking;
  if (asking) return;
  asking = true;
  try {
    const headers = etag ? { "If-None-Match": etag } : {};
    const response = await fetch(rows.dataset.url, { headers, cache: "no-store" });
    if (response.redirected) return location.reload(); // the session has ended: the log-in page comes
    if (response.ok) {
      etag = response.headers.get("ETag") ?? "";
      swap(await response.text());
    }
    offline.hidden = response.ok || response.status === 304;
  } catch {
    offline.hidden = false;
  } finally {
    asking = false;
  }
  if (askAgain) return ask();
  timer = setTimeout(ask, live && offline.hidden ? CHECK_MS : POLL_MS);
}

function listen() {
  const source = new EventSource(rows.dataset.events);
  source.onopen = () => (live = true);
  source.onmessage = ask;
  source.onerror = () => {
    live = false;
    clearTimeout(timer);
    timer = setTimeout(ask, POLL_MS);
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS); // else the browser tries again
  };
  addEventListener("pagehide", () => source.close(), { once: true });
}

timer = setTimeout(ask, POLL_MS);
// one stream a browser, as it opens six connections to us at most; the other tabs poll until it is their turn
if (navigator.locks) navigator.locks.request("herald.worklist", () => new Promise(listen));
else listen();
addEventListener("pageshow", (event) => event.persisted && location.reload());

// --- sound ---

const SOUND = "herald.sound";
const sound = document.getElementById("sound"); // not there for who reads blind: it would tell
let audio;

/** A browser lets a page sound only after a click or a key. */
const maySound = () => navigator.userActivation?.hasBeenActive ?? Boolean(audio);
const wantsSound = () => Boolean(sound) && localStorage.getItem(SOUND) === "on";

function beep() {
  if (!wantsSound() || !maySound()) return;
  audio ??= new AudioContext();
  for (const [after, hertz] of [[0, 660], [0.18, 880]]) {
    const tone = new OscillatorNode(audio, { frequency: hertz });
    const volume = new GainNode(audio, { gain: 0 });
    const start = audio.currentTime + after;
    volume.gain.setValueAtTime(0, start); // without a ramp it would click
    volume.gain.linearRampToValueAtTime(0.25, start + 0.02);
    volume.gain.linearRampToValueAtTime(0, start + 0.16);
    tone.connect(volume).connect(audio.destination);
    tone.start(start);
    tone.stop(start + 0.18);
  }
  sound.dataset.sounded = Number(sound.dataset.sounded ?? 0) + 1;
}

function showSound() {
  const waiting = wantsSound() && !maySound();
  sound.hidden = false;
  sound.setAttribute("aria-pressed", String(wantsSound()));
  sound.dataset.state = waiting ? "waiting" : wantsSound() ? "on" : "off";
  document.getElementById("sound-state").textContent = waiting
    ? "on after your next click or key" // the browser's rule, said so that silence is no surprise
    : wantsSound() ? "on" : "off";
}

if (sound) {
  showSound();
  sound.addEventListener("click", () => {
    localStorage.setItem(SOUND, wantsSound() ? "off" : "on");
    showSound();
    beep();
  });
  for (const gesture of ["pointerup", "keyup"]) addEventListener(gesture, showSound);
  addEventListener("storage", showSound);
}

// --- keyboard, mouse ---

function move(by) {
  const all = links();
  const at = all.indexOf(document.activeElement);
  const next = all[at < 0 ? (by > 0 ? 0 : all.length - 1) : Math.min(Math.max(at + by, 0), all.length - 1)];
  next?.focus();
}

onKeys({
  j: () => move(1),
  k: () => move(-1),
  ArrowDown: () => move(1),
  ArrowUp: () => move(-1),
  "/": () => document.getElementById("search").focus(),
  f: () => document.getElementById("disposition").focus(),
  n: follow("next"),
});

rows.addEventListener("click", (event) => {
  if (event.target.closest("a, button") || getSelection().toString()) return;
  event.target.closest("tr[data-series]")?.querySelector("a.open").click();
});

const filters = document.getElementById("filters");
filters.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !event.target.matches("select")) return; // the other fields send by themselves
  event.preventDefault();
  filters.requestSubmit();
});
// an address with what was asked, and nothing else
filters.addEventListener("formdata", (event) => {
  for (const [name, value] of [...event.formData]) if (!value) event.formData.delete(name);
});

badge();
