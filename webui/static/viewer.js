// The viewer's state, its keys and its controls; what draws is one of two: pictures at once, a volume when it is ready.
// Every control also works as a plain link.

import { onKeys } from "./keys.js";
import { Pictures } from "./viewer-pictures.js";

const DRAGGED_PX = 3;
const LEAST_FOR_LETTERS_PX = 60;
const LETTERS = { slice: ["R", "L", "A", "P"], coronal: ["R", "L", "S", "I"], sagittal: ["A", "P", "S", "I"] };
const SVG = "http://www.w3.org/2000/svg";

const viewer = document.getElementById("viewer");
if (viewer) start(viewer.dataset.base, JSON.parse(viewer.dataset.facts));

function start(base, facts) {
  const find = (id) => document.getElementById(id);
  const stage = find("stage");
  const picture = find("picture");
  const position = find("position");
  const slider = find("slice");
  const maskButton = find("mask");
  const planesButton = find("planes");
  const originalButton = find("original");
  const opacitySlider = find("opacity");
  const bars = [...document.querySelectorAll(".strip rect")];
  const windows = [...document.querySelectorAll("[data-window-name]")];
  const marks = document.createElementNS(SVG, "svg");
  marks.setAttribute("class", "marks");
  marks.setAttribute("aria-hidden", "true");

  const stacks = { model: facts, original: null };
  const [usualCenter, usualWidth] = facts.windows[facts.window];
  const state = {
    slice: facts.slice,
    preset: facts.window,
    center: usualCenter,
    width: usualWidth,
    mask: facts.mask,
    opacity: facts.opacity,
    three: false,
    original: false,
    x: facts.focus[0],
    y: facts.focus[1],
    hurried: false,
  };
  let lastPreset = facts.window;
  let lasting = find("viewer-note").textContent;
  const stack = () => (state.original ? stacks.original : stacks.model);
  const limit = (value, low, high) => Math.min(Math.max(value, low), high);

  const pictures = new Pictures(stage, base, (seen) => {
    find("no-slice").hidden = seen;
    mark();
  });
  stage.append(marks);
  let drawer = pictures;

  // --- what is shown

  function show(change) {
    Object.assign(state, change);
    const { numbers, shape } = stack();
    state.slice = limit(state.slice, 1, numbers.length);
    state.x = limit(state.x, 0.5 / shape[2], 1 - 0.5 / shape[2]);
    state.y = limit(state.y, 0.5 / shape[1], 1 - 0.5 / shape[1]);
    stage.classList.toggle("three", state.three);
    draw();
    describe();
  }

  function draw() {
    const { numbers, shape } = stack();
    const view = {
      ...state,
      count: numbers.length,
      column: Math.floor(state.x * shape[2]) + 1,
      row: Math.floor(state.y * shape[1]) + 1,
      usualOpacity: facts.opacity,
    };
    drawer.draw(view);
    mark();
  }

  function describe() {
    const { numbers } = stack();
    const at = state.slice - 1;
    const name =
      `Axial CT slice ${state.slice} of ${numbers.length}, ${state.preset || "own"} window` +
      (state.mask ? ", predicted haemorrhage outlined in magenta" : "");
    picture.alt = name;
    find("volume")?.setAttribute("aria-label", name);
    const slab = toModel(state.slice);
    const chance = slab - 1 in facts.probabilities ? `, haemorrhage ${percent(facts.probabilities[slab - 1])}` : "";
    const label = state.original
      ? `Original slice ${numbers[at]} of ${numbers.length}`
      : `Slice ${state.slice} of ${numbers.length} (original ${numbers[at]})`;
    position.textContent = label + chance;
    find("levels").textContent = `W ${Math.round(state.width)} L ${Math.round(state.center)}`;
    if (slider) {
      slider.max = numbers.length;
      slider.value = state.slice;
      slider.setAttribute("aria-valuetext", position.textContent);
    }
    bars.forEach((bar, i) => bar.classList.toggle("here", i === slab - 1));
    for (const link of windows) {
      if (link.dataset.windowName === state.preset) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    maskButton?.setAttribute("aria-pressed", String(state.mask));
    planesButton.setAttribute("aria-pressed", String(state.three));
    originalButton.setAttribute("aria-pressed", String(state.original));
    const query = new URLSearchParams({ slice: slab, window: state.preset || lastPreset, mask: state.mask ? 1 : 0 });
    if (!state.hurried) history.replaceState(null, "", `?${query}`);
  }

  /** Letters at the edges of each plane, and where the planes cross. */
  function mark() {
    marks.replaceChildren();
    for (const { plane, left, top, width, height } of drawer.tiles()) {
      if (facts.lettered) {
        const [first, second, above, below] = LETTERS[plane];
        const [x, y] = [left + width / 2, top + height / 2];
        const letters = [
          [first, left + 12, y],
          [second, left + width - 12, y],
        ];
        if (height > LEAST_FOR_LETTERS_PX) letters.push([above, x, top + 14], [below, x, top + height - 14]);
        for (const [text, tx, ty] of letters) {
          marks.append(shape("text", { x: tx, y: ty }, text));
        }
      }
      if (!state.three) continue;
      const [across, down] = crossing(plane);
      const [x, y] = [left + across * width, top + down * height];
      marks.append(shape("line", { x1: x, x2: x, y1: top, y2: top + height }));
      marks.append(shape("line", { x1: left, x2: left + width, y1: y, y2: y }));
    }
  }

  function shape(kind, attributes, text = "") {
    const element = document.createElementNS(SVG, kind);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  }

  // --- places

  /** Where the planes cross within one of them: shares of its width and height. */
  function crossing(plane) {
    const below = 1 - (state.slice - 0.5) / stack().numbers.length;
    return { slice: [state.x, state.y], coronal: [state.x, below], sagittal: [state.y, below] }[plane];
  }

  function crossAt(plane, across, down) {
    const slice = Math.floor((1 - down) * stack().numbers.length) + 1;
    show({ slice: { x: across, y: down }, coronal: { x: across, slice }, sagittal: { y: across, slice } }[plane]);
  }

  /** The model's slice that an original one went into; the same without an original. */
  function toModel(slice) {
    if (!state.original) return slice;
    const found = stacks.model.spans.findIndex(([first, last]) => slice - 1 <= last && slice - 1 >= first);
    return found + 1 || slice;
  }

  /** The slice that is shown for one of the model's. */
  function fromModel(slice) {
    const span = state.original && stacks.model.spans[slice - 1];
    return span ? Math.floor((span[0] + span[1] + 1) / 2) + 1 : slice;
  }

  /** The same point of the body in another stack. */
  function moved(share, axis, from, to) {
    const mm = from.origin[axis] + (share * from.shape[2 - axis] - 0.5) * from.spacing[axis];
    return ((mm - to.origin[axis]) / to.spacing[axis] + 0.5) / to.shape[2 - axis];
  }

  // --- the original images

  let asking = false;
  async function toggleOriginal() {
    if (asking) return;
    asking = true;
    try {
      if (!stacks.original) await askOriginal();
      await drawer.prepare(!state.original);
    } catch (error) {
      say(`The original images cannot be shown: ${error.message}.`);
      return;
    } finally {
      asking = false;
    }
    say("");
    const original = !state.original;
    const [from, to] = original ? [facts, stacks.original] : [stacks.original, facts];
    const slab = toModel(state.slice);
    state.original = original;
    show({ slice: fromModel(slab), x: moved(state.x, 0, from, to), y: moved(state.y, 1, from, to) });
  }

  async function askOriginal() {
    say("Loading the original images …");
    const answer = await fetch(`${base}original.json`);
    const told = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    if (!answer.ok) throw new Error(told.error);
    const places = new Map(told.numbers.map((number, at) => [number, at]));
    facts.spans = facts.numbers.map((number) => number.split("–").map((end) => places.get(end)));
    for (const span of facts.spans) if (span.length === 1) span.push(span[0]);
    stacks.original = told;
  }

  /** A passing message, or what holds as long as the page is open. */
  function say(text) {
    find("viewer-note").textContent = text || lasting;
  }

  function sayLastingly(text) {
    lasting = text;
    say(text);
  }

  // --- controls

  const step = (by) => () => show({ slice: state.slice + by });
  const choose = (name) => {
    lastPreset = name;
    const [center, width] = facts.windows[name];
    show({ preset: name, center, width });
  };
  const reset = () => choose(lastPreset);
  const toggleMask = () => facts.hasMask && show({ mask: !state.mask });
  const togglePlanes = () => facts.axial && show({ three: !state.three });
  const goHottest = () => {
    const [x, y] = facts.focus.map((share, axis) => moved(share, axis, facts, stack()));
    show({ slice: fromModel(facts.hottest), ...(state.three && facts.hasMask ? { x, y } : {}) });
  };
  const onClick = (element, act) =>
    element?.addEventListener("click", (event) => {
      event.preventDefault();
      act();
    });

  slider?.addEventListener("input", () => show({ slice: Number(slider.value) }));
  windows.forEach((link) => onClick(link, () => choose(link.dataset.windowName)));
  onClick(maskButton, toggleMask);
  onClick(find("hottest"), goHottest);
  onClick(planesButton, togglePlanes);
  onClick(originalButton, toggleOriginal);
  onClick(find("reset"), reset);
  for (const id of ["reset", "original", "opacity-label"]) find(id)?.removeAttribute("hidden");
  planesButton.hidden = !facts.axial;
  if (opacitySlider) {
    opacitySlider.value = Math.round(facts.opacity * 100);
    const tint = (hurried) => () => show({ opacity: Number(opacitySlider.value) / 100, mask: true, hurried });
    opacitySlider.addEventListener("input", tint(true));
    opacitySlider.addEventListener("change", tint(false));
  }
  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-slice]");
    if (!target) return;
    event.preventDefault();
    show({ slice: fromModel(Number(target.dataset.slice)) });
  });
  onKeys({
    ArrowUp: step(1),
    ArrowDown: step(-1),
    m: toggleMask,
    h: () => facts.hasMask && goHottest(),
    p: togglePlanes,
    o: () => void toggleOriginal(),
    r: reset,
    ...Object.fromEntries(windows.map((link, i) => [String(i + 1), () => choose(link.dataset.windowName)])),
  });

  // --- the pointer

  function tileAt(event) {
    const box = stage.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    for (const { plane, left, top, width, height } of drawer.tiles()) {
      const [across, down] = [(x - left) / width, (y - top) / height];
      if (across >= 0 && across < 1 && down >= 0 && down < 1) return { plane, across, down };
    }
    return null;
  }

  let wheeled = 0;
  stage.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      wheeled += event.deltaY;
      if (Math.abs(wheeled) < 20) return; // a touch pad sends many small ones
      const by = wheeled < 0 ? 1 : -1;
      wheeled = 0;
      const plane = state.three ? tileAt(event)?.plane : "slice";
      if (plane === "coronal") show({ y: state.y - by / stack().shape[1] });
      else if (plane === "sagittal") show({ x: state.x + by / stack().shape[2] });
      else show({ slice: state.slice + by });
    },
    { passive: false },
  );

  let drag = null;
  stage.addEventListener("contextmenu", (event) => event.preventDefault());
  stage.addEventListener("dblclick", reset);
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 && event.button !== 2) return;
    drag = { x: event.clientX, y: event.clientY, center: state.center, width: state.width, moved: false };
    if (event.pointerType !== "touch") stage.setPointerCapture(event.pointerId); // a finger scrolls the page
  });
  stage.addEventListener("pointermove", (event) => {
    if (!drag || event.pointerType === "touch") return;
    const [right, up] = [event.clientX - drag.x, drag.y - event.clientY];
    if (!drag.moved && Math.hypot(right, up) <= DRAGGED_PX) return;
    drag.moved = true;
    const pace = Math.max(drag.width / 250, 0.4); // Hounsfield units for a pixel
    const width = Math.round(limit(drag.width + right * pace, 1, 8000));
    show({ preset: "", width, center: Math.round(limit(drag.center + up * pace, -1500, 4000)), hurried: true });
  });
  const drop = (event) => {
    if (!drag) return;
    const { moved } = drag;
    drag = null;
    if (moved) return show({ hurried: false });
    const tile = state.three && event.type === "pointerup" && event.button === 0 && tileAt(event);
    if (tile) crossAt(tile.plane, tile.across, tile.down);
  };
  stage.addEventListener("pointerup", drop);
  stage.addEventListener("pointercancel", () => (drag = null));
  new ResizeObserver(() => stage.clientWidth && draw()).observe(stage);

  // --- the volume viewer

  async function openVolume() {
    if (!facts.volume) return;
    if (!document.createElement("canvas").getContext("webgl2")) {
      return sayLastingly("This browser offers no WebGL 2: slices are shown as pictures.");
    }
    const canvas = document.createElement("canvas");
    canvas.id = "volume";
    canvas.setAttribute("role", "img");
    try {
      const { Volume } = await import("./viewer-volume.js");
      stage.insertBefore(canvas, marks);
      const volume = await Volume.open(stage, canvas, base, facts.hasMask);
      await volume.prepare(state.original);
      canvas.addEventListener("webglcontextlost", () => usePictures("The graphics card gave up"));
      drawer = volume;
      show({});
      // the pictures stay until the first frame is on the screen
      requestAnimationFrame(() => requestAnimationFrame(() => drawer === volume && reveal()));
    } catch (error) {
      console.info(error);
      usePictures("The volume viewer cannot start in this browser");
    }
  }

  function reveal() {
    stage.classList.add("volume");
    performance.mark("herald-volume");
  }

  function usePictures(reason) {
    sayLastingly(`${reason}: slices are shown as pictures.`);
    drawer = pictures;
    stage.classList.remove("volume");
    find("volume")?.remove();
    show({});
  }

  show({}); // fills in what only a script can: spoken slider value, letters, neighbours
  if (picture.complete) openVolume();
  else picture.addEventListener("load", openVolume, { once: true });
}

function percent(p) {
  if (p > 0 && p < 0.01) return "< 1 %";
  if (p > 0.99 && p < 1) return "> 99 %";
  return `${Math.round(p * 100)} %`;
}
