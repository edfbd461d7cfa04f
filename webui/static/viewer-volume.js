// Draws with NiiVue (WebGL 2): every plane, window and tint without asking the server again.

import { NVImage, Niivue } from "./vendor/niivue.js";

const PLANES = ["slice", "coronal", "sagittal"]; // in NiiVue's order of SLICE_TYPE
const WIDE = [[0, 0, 2 / 3, 1], [2 / 3, 0, 1 / 3, 1 / 2], [2 / 3, 1 / 2, 1 / 3, 1 / 2]]; // prettier-ignore
const TALL = [[0, 0, 1, 2 / 3], [0, 2 / 3, 1 / 2, 1 / 3], [1 / 2, 2 / 3, 1 / 2, 1 / 3]]; // prettier-ignore

const HEADER_BYTES = 352;
const AT_DATATYPE = 70;
const AT_BITS = 72;
const RGBA = 2304;
const MAGENTA = [255, 64, 160]; // the pictures' MASK_COLOUR
const OUTLINE = 128; // of 255: where the pictures draw it
const FAINTEST = 51;

/** NiiVue without its font and its metal sheen: both are data: images, which our Content-Security-Policy refuses. */
class Slices extends Niivue {
  async loadDefaultFont() {}
  async loadDefaultMatCap() {}
}

export class Volume {
  /** Opens `canvas`, which lies on `stage`; raises when there is no WebGL 2. */
  static async open(stage, canvas, base, hasMask) {
    const volume = new Volume();
    Object.assign(volume, { stage, canvas, base, hasMask, heads: {}, shown: {} });
    volume.niivue = new Slices({
      isResizeCanvas: false, // the letters over it must fit at once
      forceDevicePixelRatio: -1,
      interactive: false, // keys and pointer are the page's own, the same for pictures
      dragAndDropEnabled: false,
      isOrientationTextVisible: false,
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      crosshairWidth: 0,
      loadingText: "",
      logLevel: "error",
    });
    await volume.niivue.attachToCanvas(canvas, false);
    return volume;
  }

  /** Loads what the model saw, or the original; raises when the server has none. */
  async prepare(original) {
    const name = original ? "original.nii.gz" : "volume.nii.gz";
    this.heads[name] ??= await NVImage.loadFromUrl({ url: this.base + name, cal_min: 0, cal_max: 80 });
    if (this.hasMask && !this.mask) await this.#loadMask();
  }

  draw(view) {
    const { niivue, shown } = this;
    const head = this.heads[view.original ? "original.nii.gz" : "volume.nii.gz"];
    const mask = view.mask && this.mask;
    const [low, high] = [view.center - view.width / 2, view.center + view.width / 2];
    const overlays = mask ? [mask] : [];
    // all at once: adding and removing them one by one draws each time
    Object.assign(niivue, { volumes: [head, ...overlays], back: head, overlays });
    if (mask && this.painted !== view.opacity) this.#paint(view.opacity);
    const now = { head, mask, low, high, opacity: view.opacity };
    Object.assign(head, { cal_min: low, cal_max: high });
    const [x, y, z] = [view.x, view.y, (view.slice - 0.5) / view.count];
    niivue.scene.crosshairPos.set([1 - x, 1 - y, z]); // NiiVue counts to the right and anterior
    niivue.customLayout = this.#places(view.three).map((position, i) => ({ sliceType: i, position }));
    this.#fit();
    if (Object.keys(now).some((key) => now[key] !== shown[key])) niivue.updateGLVolume();
    else niivue.drawScene();
    this.shown = now;
  }

  /** Where each plane lies on the stage, in CSS pixels. */
  tiles() {
    const scale = this.canvas.clientWidth / this.canvas.width;
    return this.niivue.screenSlices.map(({ axCorSag, leftTopWidthHeight }) => {
      const [left, top, width, height] = leftTopWidthHeight.map((pixels) => pixels * scale);
      return { plane: PLANES[axCorSag], left, top, width, height };
    });
  }

  #fit() {
    const { canvas, stage } = this;
    const [width, height] = [stage.clientWidth, stage.clientHeight].map((side) => Math.round(side * devicePixelRatio));
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
  }

  #places(three) {
    if (!three) return [[0, 0, 1, 1]];
    return this.stage.clientWidth > this.stage.clientHeight ? WIDE : TALL;
  }

  async #loadMask() {
    const answer = await fetch(`${this.base}mask.nii.gz`);
    if (!answer.ok) throw new Error(`the mask: ${answer.status}`);
    const file = await new Response(answer.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
    const header = new DataView(file, 0, HEADER_BYTES);
    this.probability = new Uint8Array(file, HEADER_BYTES);
    this.outline = outline(this.probability, header.getInt16(42, true), header.getInt16(44, true));
    // the same voxels in colour: so each has an opacity of its own
    const coloured = new Uint8Array(HEADER_BYTES + 4 * this.probability.length);
    coloured.set(new Uint8Array(file, 0, HEADER_BYTES));
    const changed = new DataView(coloured.buffer);
    changed.setInt16(AT_DATATYPE, RGBA, true);
    changed.setInt16(AT_BITS, 32, true);
    for (let at = HEADER_BYTES; at < coloured.length; at += 4) coloured.set(MAGENTA, at);
    this.mask = await NVImage.loadFromUrl({ url: "mask.nii", name: "mask.nii", buffer: coloured.buffer });
  }

  /** A tint that grows with the probability, and an outline: the bleed shows through. */
  #paint(opacity) {
    const { probability } = this;
    const voxels = this.mask.img;
    for (let i = 0; i < probability.length; i++) {
      voxels[4 * i + 3] = this.outline[i] ? 255 : probability[i] < FAINTEST ? 0 : Math.round(probability[i] * opacity);
    }
    this.painted = opacity;
  }
}

/** The voxels around those of at least one half, slice by slice. */
function outline(probability, columns, rows) {
  const around = new Uint8Array(probability.length);
  const inside = (at) => probability[at] >= OUTLINE;
  for (let at = 0; at < probability.length; at++) {
    if (inside(at)) continue;
    const column = at % columns;
    const row = Math.floor(at / columns) % rows;
    around[at] =
      (column > 0 && inside(at - 1)) ||
      (column < columns - 1 && inside(at + 1)) ||
      (row > 0 && inside(at - columns)) ||
      (row < rows - 1 && inside(at + columns));
  }
  return around;
}
