// Slices, windows and the mask without a reload. Every control also works as a plain link.

import { onKeys } from "./keys.js";

const viewer = document.getElementById("viewer");
const windows = [...document.querySelectorAll("[data-window-name]")];
if (viewer) {
  const bindings = {};
  const { url, count: countText, hottest } = viewer.dataset;
  const count = Number(countText);
  const numbers = JSON.parse(viewer.dataset.numbers);
  const probabilities = JSON.parse(viewer.dataset.probabilities);
  const hasMask = "hasMask" in viewer.dataset;
  const state = {
    slice: Number(viewer.dataset.shown),
    window: viewer.dataset.window,
    mask: viewer.dataset.mask === "1",
  };
  const picture = document.getElementById("picture");
  const position = document.getElementById("position");
  const problem = document.getElementById("no-slice");
  const slider = document.getElementById("slice");
  const maskButton = document.getElementById("mask");
  const bars = [...document.querySelectorAll(".strip rect")];
  const ahead = [];

  const query = (slice) => new URLSearchParams({ slice, window: state.window, mask: state.mask ? 1 : 0 });
  const address = (slice) =>
    `${url}${slice}.png?${new URLSearchParams({ window: state.window, mask: state.mask ? 1 : 0 })}`;

  function percent(p) {
    if (p > 0 && p < 0.01) return "< 1 %";
    if (p > 0.99 && p < 1) return "> 99 %";
    return `${Math.round(p * 100)} %`;
  }

  function show(change) {
    Object.assign(state, change);
    state.slice = Math.min(Math.max(state.slice, 1), count);
    const i = state.slice - 1;
    picture.src = address(state.slice);
    picture.alt =
      `Axial CT slice ${state.slice} of ${count}, ${state.window} window` +
      (state.mask ? ", predicted haemorrhage outlined in magenta" : "");
    const chance = i in probabilities ? `, haemorrhage ${percent(probabilities[i])}` : "";
    position.textContent = `Slice ${state.slice} of ${count} (original ${numbers[i]})${chance}`;
    if (slider) {
      slider.value = state.slice;
      slider.setAttribute("aria-valuetext", position.textContent);
    }
    bars.forEach((bar, at) => bar.classList.toggle("here", at === i));
    for (const link of windows) {
      if (link.dataset.windowName === state.window) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    maskButton?.setAttribute("aria-pressed", String(state.mask));
    history.replaceState(null, "", `?${query(state.slice)}`);
    // the neighbours come before they are asked for; the references keep them in memory
    ahead.length = 0;
    for (const near of [state.slice + 1, state.slice - 1, state.slice + 2, state.slice - 2]) {
      if (near < 1 || near > count) continue;
      const image = new Image();
      image.src = address(near);
      ahead.push(image);
    }
  }

  const step = (by) => () => show({ slice: state.slice + by });
  picture.addEventListener("error", () => (problem.hidden = false));
  picture.addEventListener("load", () => (problem.hidden = true));
  slider?.addEventListener("input", () => show({ slice: Number(slider.value) }));

  let wheeled = 0;
  viewer.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      wheeled += event.deltaY;
      if (Math.abs(wheeled) < 20) return; // a touch pad sends many small ones
      show({ slice: state.slice + (wheeled < 0 ? 1 : -1) });
      wheeled = 0;
    },
    { passive: false },
  );

  const choose = (name) => () => show({ window: name });
  windows.forEach((link, i) => {
    bindings[String(i + 1)] = choose(link.dataset.windowName);
    link.addEventListener("click", (event) => {
      event.preventDefault();
      show({ window: link.dataset.windowName });
    });
  });
  const toggleMask = () => hasMask && show({ mask: !state.mask });
  maskButton?.addEventListener("click", (event) => {
    event.preventDefault();
    toggleMask();
  });
  document.getElementById("hottest")?.addEventListener("click", (event) => {
    event.preventDefault();
    show({ slice: Number(hottest) });
  });
  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-slice]");
    if (!target) return;
    event.preventDefault();
    show({ slice: Number(target.dataset.slice) });
  });
  Object.assign(bindings, {
    ArrowUp: step(1),
    ArrowDown: step(-1),
    m: toggleMask,
    h: () => hasMask && show({ slice: Number(hottest) }),
  });
  onKeys(bindings);
  show({}); // fills in what only a script can: spoken slider value, neighbours
}
