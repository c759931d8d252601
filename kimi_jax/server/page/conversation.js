// Shows the conversation: one article for each message, with its reasoning, calls, results and what became of it.

import { byId, copyButton, element, smallButton } from "./elements.js";
import { showMarkdown } from "./markdown.js";

const messages = () => byId("messages");

/** Shows what a person asked. */
export function showQuestion(text, pictures) {
  byId("welcome").hidden = true;
  const images = pictures.map((url, index) => element("img", { src: url, alt: `Picture ${index + 1} of the message` }));
  const article = element("article", { class: "question" }, element("h2", { class: "hidden" }, "You"));
  if (images.length) article.append(element("div", { class: "pictures" }, ...images));
  if (text) article.append(element("p", {}, text));
  messages().append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

/** Removes a message and those after it. */
export function removeAfter(article) {
  while (article.nextElementSibling) article.nextElementSibling.remove();
}

/** Removes all messages. */
export function clearMessages() {
  messages().replaceChildren();
  byId("welcome").hidden = false;
}

/** An answer on the page, which grows until `end`. It may have several rounds, with calls of tools between them. */
export class AnswerView {
  constructor(retry) {
    this.retry = retry;
    this.body = element("div", { class: "body" });
    this.article = element("article", { class: "answer", "aria-busy": "true" }, element("h2", { class: "hidden" }, "Kimi"));
    this.waiting = element("p", { class: "waiting", "aria-hidden": "true" }, element("i"), element("i"), element("i"));
    this.article.append(this.body, this.waiting);
    this.calls = new Map();
    this.written = "";
    this.beginRound();
    messages().append(this.article);
    this.follow(true);
  }

  /** Begins what the model says after the results of its calls. */
  beginRound() {
    Object.assign(this, { reasoning: null, content: null, since: performance.now() });
  }

  /** Shows the message as far as it has come. It is drawn once a frame, however many pieces come. */
  show(message) {
    this.message = message;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    if (!this.message) return;
    const isAtEnd = this.isAtEnd();
    const { reasoning_content: reasoning, content, tool_calls: calls } = this.message;
    if (reasoning) this.showReasoning(reasoning, Boolean(content || calls.length));
    if (content) {
      if (!this.content) this.body.append((this.content = element("div", { class: "markdown" })));
      showMarkdown(this.content, content);
    }
    for (const call of calls) this.showCall(call);
    this.follow(isAtEnd);
  }

  showReasoning(text, isOver) {
    if (!this.reasoning) {
      const summary = element("summary", {}, "Thinking");
      const shown = element("div", { class: "thought" });
      this.reasoning = { summary, shown, isOver: false };
      this.body.append(element("details", { class: "reasoning" }, summary, shown));
    }
    this.reasoning.shown.textContent = text;
    if (isOver && !this.reasoning.isOver) this.endReasoning();
  }

  endReasoning() {
    const seconds = (performance.now() - this.since) / 1000;
    this.reasoning.isOver = true;
    this.reasoning.summary.textContent = `Thought for ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  }

  showCall(call) {
    let shown = this.calls.get(call);
    if (!shown) {
      shown = { args: element("code"), result: element("output") };
      const name = element("b", {}, call.function.name);
      const line = element("p", {}, element("span", { class: "label" }, "Tool"), name, shown.args);
      shown.card = element("section", { class: "call", "aria-label": `Call of ${call.function.name}` }, line);
      this.body.append(shown.card);
      this.calls.set(call, shown);
    }
    shown.args.textContent = call.function.arguments;
  }

  /** Shows the result of a call. */
  showResult(call, result) {
    this.draw();
    const { card, result: output } = this.calls.get(call);
    output.textContent = result;
    card.append(element("p", {}, element("span", { class: "label" }, "Result"), output));
  }

  /** Ends the answer. `said` says in words why it is not complete, and is an error's where `isError`. */
  end(text, said = "", isError = false) {
    this.draw();
    this.waiting.remove();
    if (this.reasoning && !this.reasoning.isOver) this.endReasoning();
    if (said) this.body.append(element("p", { class: isError ? "mark error" : "mark" }, said));
    const buttons = [smallButton("Retry", this.retry)];
    if (text) buttons.unshift(copyButton(() => text));
    for (const old of document.querySelectorAll(".answer .retry")) old.remove();
    buttons.at(-1).classList.add("retry");
    this.article.append(element("div", { class: "actions" }, ...buttons));
    this.article.removeAttribute("aria-busy");
    this.follow(this.isAtEnd(160));
  }

  isAtEnd(slack = 80) {
    const page = document.documentElement;
    return page.scrollHeight - page.scrollTop - page.clientHeight < slack;
  }

  follow(isAtEnd) {
    if (isAtEnd) document.documentElement.scrollTop = document.documentElement.scrollHeight;
  }
}
