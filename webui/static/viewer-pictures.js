// Draws with slices that the server renders as PNG: at once, and where there is no WebGL.

const PLANES = ["slice", "coronal", "sagittal"];

export class Pictures {
  /** `stage` holds the picture that came with the page; `onSeen(ok)` is told whether a picture could be loaded. */
  constructor(stage, base, onSeen) {
    this.stage = stage;
    this.base = base;
    this.images = { slice: stage.querySelector("#picture") };
    for (const plane of PLANES.slice(1)) {
      const image = new Image();
      image.className = `plane ${plane}`;
      image.draggable = false;
      image.alt = "";
      stage.append(image);
      this.images[plane] = image;
    }
    this.next = {};
    this.ahead = [];
    for (const [plane, image] of Object.entries(this.images)) {
      image.addEventListener("load", () => this.#seen(plane, () => onSeen(true)));
      image.addEventListener("error", () => this.#seen(plane, () => onSeen(false)));
    }
  }

  async prepare() {}

  draw(view) {
    const places = { slice: view.slice, coronal: view.row, sagittal: view.column };
    for (const plane of view.three ? PLANES : ["slice"]) {
      this.#load(plane, this.#address(view, plane, places[plane]), view.hurried);
    }
    // the neighbours come before they are asked for; the references keep them in memory
    this.ahead = [];
    for (const near of [1, -1, 2, -2].map((by) => view.slice + by)) {
      if (near < 1 || near > view.count || !view.preset) continue;
      const image = new Image();
      image.src = this.#address(view, "slice", near);
      this.ahead.push(image);
    }
  }

  /** Where each plane lies on the stage, in CSS pixels. */
  tiles() {
    const from = this.stage.getBoundingClientRect();
    return PLANES.filter((plane) => this.images[plane].naturalWidth && this.images[plane].offsetParent).map((plane) => {
      const image = this.images[plane];
      const box = image.getBoundingClientRect();
      const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
      const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
      const left = box.left - from.left + (box.width - width) / 2;
      const top = box.top - from.top + (box.height - height) / 2;
      return { plane, left, top, width, height };
    });
  }

  #address(view, plane, number) {
    const window = view.preset ? { window: view.preset } : { center: view.center, width: view.width };
    const asked = new URLSearchParams({ ...window, mask: view.mask ? 1 : 0 });
    if (view.mask && view.opacity !== view.usualOpacity) asked.set("opacity", view.opacity);
    if (view.original) asked.set("original", 1);
    return `${this.base}${plane}/${number}.png?${asked}`;
  }

  // in a hurry only the newest wish is kept while a picture is on its way: dragging asks for more than a server can draw
  #load(plane, address, hurried) {
    const image = this.images[plane];
    if (image.getAttribute("src") === address) delete this.next[plane];
    else if (hurried && image.src && !image.complete) this.next[plane] = address;
    else {
      delete this.next[plane];
      image.src = address;
    }
  }

  #seen(plane, tell) {
    const address = this.next[plane];
    delete this.next[plane];
    if (address) this.images[plane].src = address;
    tell();
  }
}
