// Pictures that wait to be sent: chosen, dropped, pasted or drawn, held as data URLs.

import { byId, element, notice } from "./elements.js";

const KINDS = ["image/png", "image/jpeg", "image/gif", "image/webp"];
const MOST = 16;
// Larger files are sent smaller: the server takes 32 MiB a request, and a model sees no more than this many pixels.
const LARGE = 3 * 2 ** 20;
const LONGEST_SIDE = 1792;

let waiting = [];

/** Returns the pictures as data URLs, and forgets them. */
export function takePictures() {
  const taken = waiting.map((picture) => picture.url);
  waiting = [];
  show();
  return taken;
}

/** Returns how many pictures wait. */
export const countPictures = () => waiting.length;

/** Adds a picture by its data URL. */
export function addPicture(url, name) {
  if (waiting.length >= MOST) return notice(`A message holds at most ${MOST} pictures.`);
  waiting.push({ url, name });
  show();
}

/** Adds files, and says which of them are no pictures. */
export async function addFiles(files) {
  notice("");
  for (const file of files) {
    try {
      addPicture(await read(file), file.name || "pasted picture");
    } catch {
      notice(`${file.name || "This file"} is no picture that can be sent: PNG, JPEG, GIF or WebP.`);
    }
  }
}

/** Takes pictures that are dropped on the page, pasted into the message, or chosen. */
export function listenForPictures() {
  const file = byId("file");
  byId("attach").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    await addFiles([...file.files]);
    file.value = "";
    byId("question").focus();
  });
  byId("question").addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    addFiles(files);
  });
  document.addEventListener("dragover", (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    addFiles([...event.dataTransfer.files]);
  });
}

async function read(file) {
  if (!KINDS.includes(file.type)) throw new TypeError("no picture");
  const bitmap = await createImageBitmap(file); // throws where the file is not what it says
  const scale = LONGEST_SIDE / Math.max(bitmap.width, bitmap.height);
  if (file.size > LARGE && file.type !== "image/gif") {
    const canvas = element("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * Math.min(1, scale)));
    canvas.height = Math.max(1, Math.round(bitmap.height * Math.min(1, scale)));
    const context = canvas.getContext("2d");
    context.fillStyle = "white"; // JPEG has no transparency
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.9);
  }
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function show() {
  byId("pictures").replaceChildren(
    ...waiting.map((picture, index) => {
      const remove = () => {
        waiting.splice(index, 1);
        show();
        byId("question").focus();
      };
      return element(
        "li",
        {},
        element("img", { src: picture.url, alt: picture.name }),
        element("button", { type: "button", "aria-label": `Remove ${picture.name}`, click: remove }, "×"),
      );
    }),
  );
}
