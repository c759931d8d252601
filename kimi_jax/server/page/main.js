// The chat page: what its buttons do. The conversation is kept here alone, and is gone with the page.

import { answer } from "./answering.js";
import { CallError, currentKey, firstModel, setKey } from "./api.js";
import { AnswerView, clearMessages, removeAfter, showQuestion } from "./conversation.js";
import { listenForDrawing, openDrawing } from "./drawing.js";
import { byId, notice, say } from "./elements.js";
import { countPictures, listenForPictures, takePictures } from "./pictures.js";

const RETRY_MS = 2000; // between questions whether the model is loaded

let model = null;
let history = [];
let last = null; // the last question: its article, and how long the history was before its answer
let running = null; // the AbortController of the answer that comes
const question = byId("question");

async function connect() {
  try {
    model = await firstModel();
    byId("model").textContent = document.title = model;
    question.placeholder = `Message ${model}`;
    notice("");
  } catch (error) {
    if (!(error instanceof CallError)) throw error;
    notice(error.message);
    if (error.status === 401) openKey();
    else setTimeout(connect, RETRY_MS);
  }
}

function ask() {
  const text = question.value.trim();
  if (running || (!text && !countPictures())) return;
  if (!model) return notice("The model is not there yet.");
  notice("");
  const pictures = takePictures();
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  if (text) parts.push({ type: "text", text });
  history.push({ role: "user", content: pictures.length ? parts : text });
  last = { article: showQuestion(text, pictures), length: history.length };
  question.value = "";
  resize();
  run();
}

function retry() {
  if (running || !last) return;
  history.length = last.length;
  removeAfter(last.article);
  question.focus();
  run();
}

async function run() {
  const view = new AnswerView(retry);
  const controller = (running = new AbortController());
  showRunning(true);
  say("The answer has begun.");
  const options = {
    model,
    thinking: document.querySelector("[name=mode]:checked").value,
    hasCalculator: byId("calculator").checked,
    view,
    signal: controller.signal,
  };
  const kept = history;
  try {
    const { text, said } = await answer(kept, options);
    view.end(text, said);
    say(said || "The answer is complete.");
  } catch (error) {
    const isStopped = error.name === "AbortError";
    if (!isStopped && !(error instanceof CallError)) console.error(error);
    const said = isStopped ? "Stopped." : error instanceof CallError ? error.message : "This page failed to read the answer.";
    view.end(view.message?.content ?? "", said, !isStopped);
    say(said);
    if (error.status === 401) openKey();
  } finally {
    if (running === controller) {
      running = null;
      showRunning(false);
    }
  }
}

function stop() {
  running?.abort();
}

function showRunning(isRunning) {
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  if (hadFocus) question.focus();
}

function newChat() {
  stop();
  running = null;
  showRunning(false);
  history = [];
  last = null;
  takePictures();
  clearMessages();
  notice("");
  say("A new chat.");
  question.focus();
}

function resize() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function openKey() {
  byId("key").value = currentKey();
  byId("key-dialog").returnValue = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-pressed", String(theme === "dark"));
}

function currentTheme() {
  return sessionStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

const starters = {
  draw: () => {
    question.value = "What number is in the picture?";
    openDrawing();
  },
  add: () => {
    byId("calculator").checked = true;
    question.value = "What is 17 + 25?";
    ask();
  },
  hello: () => {
    question.value = "Who are you?";
    ask();
  },
};

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
question.addEventListener("input", resize);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", newChat);
byId("settings").addEventListener("click", openKey);
byId("key-dialog").addEventListener("close", () => {
  if (byId("key-dialog").returnValue !== "save") return;
  setKey(byId("key").value.trim());
  connect();
});
byId("theme").addEventListener("click", () => {
  const theme = currentTheme() === "dark" ? "light" : "dark";
  sessionStorage.setItem("theme", theme);
  showTheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => showTheme(currentTheme()));
for (const button of document.querySelectorAll("[data-starter]")) {
  button.addEventListener("click", () => starters[button.dataset.starter]());
}
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => byId(button.dataset.close).close(""));
}
listenForPictures();
listenForDrawing();
showTheme(currentTheme());
connect();
question.focus();
