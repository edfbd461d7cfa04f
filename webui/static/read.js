// One key for each review, and on to the next series.

import { follow, onKeys } from "./keys.js";

const send = (button) => () => button.click();
const bindings = { n: follow("next"), w: () => document.querySelector(".brand").click() };
for (const button of document.querySelectorAll("#review [data-key]")) bindings[button.dataset.key] = send(button);
onKeys(bindings);

const form = document.getElementById("review");
form?.addEventListener("submit", (event) => {
  if (form.dataset.sent) return event.preventDefault(); // a second key press is not a second review
  form.dataset.sent = "1";
});
addEventListener("pageshow", () => form && delete form.dataset.sent);
