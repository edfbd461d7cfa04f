// The worklist keeps itself up to date, and is walked through by keyboard.

import { countAges, follow, onKeys } from "./keys.js";

const POLL_MS = 3000;
const rows = document.getElementById("rows");
const offline = document.getElementById("offline");
const messages = document.querySelector(".messages");
const title = document.title;
let etag = "";

const links = () => [...rows.querySelectorAll("a.open")];
const unacknowledged = () => Number(rows.querySelector("#state")?.dataset.unacknowledged ?? 0);

function badge() {
  document.title = unacknowledged() ? `(${unacknowledged()}) ${title}` : title;
}

function swap(html) {
  const before = unacknowledged();
  const focused = document.activeElement?.closest("tr[data-series]")?.dataset.series;
  rows.innerHTML = html; // rendered and escaped by our own server
  if (focused) rows.querySelector(`tr[data-series="${CSS.escape(focused)}"] a.open`)?.focus({ preventScroll: true });
  if (unacknowledged() > before) messages.innerHTML = "<p>A new positive series has arrived.</p>";
  badge();
  countAges();
}

async function poll() {
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
  }
  setTimeout(poll, POLL_MS);
}

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
  n: follow("next"),
});

rows.addEventListener("click", (event) => {
  if (event.target.closest("a, button") || getSelection().toString()) return;
  event.target.closest("tr[data-series]")?.querySelector("a.open").click();
});

badge();
setTimeout(poll, POLL_MS);
