// The drawing area: cells of 28 pixels, each of which is one token of a picture.
//
// The small digits model was trained on digits of 8 x 8 grey levels, enlarged by a bicubic filter. So each cell's ink is
// cut out, fitted to such a grid and enlarged again in the middle of its cell: a drawing then looks like what it has seen.

import { byId, element } from "./elements.js";
import { addPicture } from "./pictures.js";

const CELL = 28; // pixels of a cell in the picture that is sent
const ZOOM = 4; // pixels of the drawing area for each of them
const LEVELS = 8;
const DIGIT = 24; // pixels of an enlarged digit, the middle of those in training (18 to 29)
const PEN = (CELL * ZOOM) / 9;

const canvas = byId("canvas");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const ink = new OffscreenCanvas(1, 1); // the strokes alone, without the lines between cells
const strokes = ink.getContext("2d", { willReadFrequently: true });
let isEmpty = true;

/** Lets people draw, and adds what they drew to the message. */
export function listenForDrawing() {
  const dialog = byId("drawing");
  byId("draw").addEventListener("click", openDrawing);
  byId("cells").addEventListener("change", clear);
  byId("clear").addEventListener("click", clear);
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "add" && !isEmpty) addPicture(picture(byId("coarse").checked), "drawing");
    byId("question").focus();
  });
  let last = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    for (const one of event.getCoalescedEvents().concat(event)) {
      const next = place(one);
      stroke(last, next);
      last = next;
    }
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (last = null));
}

/** Opens the drawing area, empty. */
export function openDrawing() {
  byId("drawing").returnValue = "";
  clear();
  byId("drawing").showModal();
}

/** Returns levels of ink [8 * 8] enlarged to [size * size] by the bicubic filter that PIL has (a = -0.5). */
export function enlarge(levels, size) {
  const weights = Array.from({ length: size }, (_, to) => {
    const centre = ((to + 0.5) * LEVELS) / size;
    const row = Array.from({ length: LEVELS }, (__, from) => cubic(from + 0.5 - centre));
    const sum = row.reduce((a, b) => a + b);
    return row.map((weight) => weight / sum);
  });
  const along = (values, width, at) => weights.map((row) => row.reduce((sum, w, i) => sum + w * values[at(i)], 0));
  const wide = []; // [8][size]
  for (let y = 0; y < LEVELS; y++) wide.push(along(levels, LEVELS, (i) => y * LEVELS + i));
  const large = new Float64Array(size * size);
  for (let x = 0; x < size; x++) {
    const column = wide.map((row) => row[x]);
    along(column, 1, (i) => i).forEach((value, y) => (large[y * size + x] = Math.min(1, Math.max(0, value))));
  }
  return large;
}

function cubic(x) {
  const d = Math.abs(x);
  if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
  return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
}

function clear() {
  const [columns, rows] = byId("cells").value.split("x").map(Number);
  for (const one of [canvas, ink]) {
    one.width = columns * CELL * ZOOM;
    one.height = rows * CELL * ZOOM;
  }
  isEmpty = true;
  canvas.style.setProperty("--columns", columns);
  canvas.setAttribute("aria-label", `Drawing area of ${columns * rows} cells, empty`);
  show();
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [
    ((event.clientX - box.left) * canvas.width) / box.width,
    ((event.clientY - box.top) * canvas.height) / box.height,
  ];
}

function stroke(from, to) {
  Object.assign(strokes, { lineWidth: PEN, lineCap: "round", lineJoin: "round" });
  strokes.beginPath();
  strokes.moveTo(...from);
  strokes.lineTo(...to);
  strokes.stroke();
  isEmpty = false;
  canvas.setAttribute("aria-label", "Drawing area with a drawing");
  show();
}

/** Shows the strokes on white paper, with lines between the cells. */
function show() {
  const side = CELL * ZOOM;
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = "#c9cbe8";
  for (let x = side; x < canvas.width; x += side) pen.fillRect(x - 1, 0, 2, canvas.height);
  for (let y = side; y < canvas.height; y += side) pen.fillRect(0, y - 1, canvas.width, 2);
  pen.drawImage(ink, 0, 0);
}

/** Returns the drawing as a PNG's data URL, dark on white: coarse, 28 pixels a cell; else as it was drawn. */
function picture(coarse) {
  const scale = coarse ? 1 : ZOOM;
  const made = element("canvas");
  made.width = (ink.width / ZOOM) * scale;
  made.height = (ink.height / ZOOM) * scale;
  const context = made.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, made.width, made.height);
  if (!coarse) {
    context.drawImage(ink, 0, 0);
    return made.toDataURL("image/png");
  }
  const edge = (CELL - DIGIT) / 2;
  for (let y = 0; y < made.height; y += CELL) {
    for (let x = 0; x < made.width; x += CELL) {
      const levels = reduce(x * ZOOM, y * ZOOM);
      if (!levels) continue;
      const pixels = new ImageData(DIGIT, DIGIT);
      enlarge(levels, DIGIT).forEach((value, at) => {
        pixels.data.fill(Math.round(255 * (1 - value)), 4 * at, 4 * at + 3);
        pixels.data[4 * at + 3] = 255;
      });
      context.putImageData(pixels, x + edge, y + edge);
    }
  }
  return made.toDataURL("image/png");
}

/** Returns the levels [8 * 8] of the ink in a cell, cut out and fitted to the grid; null where there is none. */
function reduce(left, top) {
  const side = CELL * ZOOM;
  const { data } = strokes.getImageData(left, top, side, side);
  let [x0, y0, x1, y1] = [side, side, 0, 0];
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      if (data[4 * (y * side + x) + 3] < 128) continue;
      [x0, y0, x1, y1] = [Math.min(x0, x), Math.min(y0, y), Math.max(x1, x + 1), Math.max(y1, y + 1)];
    }
  }
  // A dot, or the end of a neighbour's stroke, is no digit.
  if (Math.max(x1 - x0, y1 - y0) < 2 * PEN) return null;
  const size = Math.max(x1 - x0, y1 - y0);
  const fitted = new Float64Array(LEVELS * LEVELS);
  const [startX, startY] = [(x0 + x1 - size) / 2, (y0 + y1 - size) / 2];
  for (let y = y0; y < y1; y++) {
    for (let x = x0; x < x1; x++) {
      const column = Math.min(LEVELS - 1, Math.floor(((x + 0.5 - startX) * LEVELS) / size));
      const row = Math.min(LEVELS - 1, Math.floor(((y + 0.5 - startY) * LEVELS) / size));
      fitted[row * LEVELS + column] += data[4 * (y * side + x) + 3] / 255;
    }
  }
  return fitted.map((sum) => Math.min(1, sum / (size / LEVELS) ** 2));
}
