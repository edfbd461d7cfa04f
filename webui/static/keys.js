// Single-key shortcuts that can be switched off (WCAG 2.1.4), and ages that go on counting.

const SETTING = "herald.single-keys";
/** Whether keys of one character do something. */
export const singleKeys = () => localStorage.getItem(SETTING) !== "off";

for (const box of document.querySelectorAll("[data-single-keys]")) {
  box.checked = singleKeys();
  box.addEventListener("change", () => localStorage.setItem(SETTING, box.checked ? "on" : "off"));
}

const typing = (element) => element.matches("textarea, select, input:not([type=range], [type=checkbox])");

/** Call `bindings[key]` on a key press outside of fields; Escape leaves a field. */
export function onKeys(bindings) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (typing(event.target)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const action = bindings[event.key];
    if (!action || (event.key.length === 1 && !singleKeys())) return;
    if (action(event) !== false) event.preventDefault();
  });
}

/** Follow the link with this id, if there is one. */
export const follow = (id) => () => document.getElementById(id)?.click();

function ago(seconds) {
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} days`;
}

// the server's clock counts: the browser's own may be wrong
const skew = Date.now() - Date.parse(document.querySelector("meta[name=now]").content);

export function countAges() {
  for (const time of document.querySelectorAll("time[data-ago]")) {
    time.textContent = ago(Math.max(0, Math.floor((Date.now() - skew - Date.parse(time.dateTime)) / 1000)));
  }
}
setInterval(countAges, 5000);
