// The red banner keeps itself up to date on every page that is left open.

import { countAges } from "./keys.js";

const POLL_MS = 10000;
const place = document.getElementById("banner");
let etag = place.dataset.etag;

async function poll() {
  try {
    const headers = { "If-None-Match": `"${etag}"` };
    const response = await fetch(place.dataset.url, { headers, cache: "no-store" });
    if (response.redirected) return; // the session has ended
    if (response.ok) {
      etag = (response.headers.get("ETag") ?? "").replaceAll('"', "");
      const focused = place.contains(document.activeElement) && document.activeElement.getAttribute("href");
      place.innerHTML = await response.text(); // rendered and escaped by our own server
      if (focused) place.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
      countAges();
    }
  } catch {
    // the worklist says when Herald does not answer
  }
  setTimeout(poll, POLL_MS);
}

setTimeout(poll, POLL_MS);
