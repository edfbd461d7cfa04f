// The condition of the node keeps itself up to date while nobody is in the middle of something there.

import { countAges } from "./keys.js";

const POLL_MS = 15000;
const place = document.getElementById("condition");

/** Something is open, or the keyboard is there: to put new text in its place would take it away. */
const inUse = () => place.contains(document.activeElement) || place.querySelector("details[open]") !== null;

async function poll() {
  if (!document.hidden && !inUse()) {
    try {
      const response = await fetch(place.dataset.url, { cache: "no-store" });
      if (response.redirected) return; // the session has ended
      if (response.ok && !inUse()) {
        place.innerHTML = await response.text(); // rendered and escaped by our own server
        countAges();
      }
    } catch {
      // the banner and the worklist say when Herald does not answer
    }
  }
  setTimeout(poll, POLL_MS);
}

setTimeout(poll, POLL_MS);
