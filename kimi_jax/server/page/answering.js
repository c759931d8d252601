// Asks for an answer and runs the calls in it, until the model says something without calls.

import { stream } from "./api.js";
import { CALCULATOR, result } from "./tools.js";

const MOST_ROUNDS = 8; // of calls after one question

/**
 * Adds the model's messages, and the results of its calls, to `history`, and shows them in `view`.
 *
 * Returns the text of the answer and what is to be said of its end. A message that was stopped or cut stays in the
 * history without its calls, which may be incomplete; one without any text is left out. Throws what `stream` throws.
 */
export async function answer(history, { model, thinking, hasCalculator, view, signal }) {
  const texts = [];
  for (let round = 0; round < MOST_ROUNDS; round++) {
    const body = { model, messages: history, thinking: { type: thinking } };
    if (hasCalculator) body.tools = CALCULATOR;
    const message = { role: "assistant", content: "", reasoning_content: "", tool_calls: [] };
    let finish = null;
    try {
      for await (const { delta, finish_reason: reason } of stream(body, signal)) {
        add(message, delta);
        finish = reason ?? finish;
        view.show(message);
      }
    } finally {
      if (message.content) texts.push(message.content);
      if (finish === "tool_calls") history.push({ ...message });
      else if (message.content) history.push(withoutCalls(message));
    }
    if (finish === "length") return { text: texts.join("\n\n"), said: "Cut off: the answer reached the limit of its length." };
    if (finish !== "tool_calls") return { text: texts.join("\n\n"), said: message.content ? "" : "The answer is empty." };
    view.draw();
    for (const call of message.tool_calls) {
      const content = result(call.function.name, call.function.arguments);
      history.push({ role: "tool", tool_call_id: call.id, content });
      view.showResult(call, content);
    }
    view.beginRound();
  }
  return { text: texts.join("\n\n"), said: `Stopped after ${MOST_ROUNDS} rounds of calls.` };
}

function add(message, delta) {
  message.content += delta.content ?? "";
  message.reasoning_content += delta.reasoning_content ?? "";
  for (const piece of delta.tool_calls ?? []) {
    const call = (message.tool_calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    call.id ||= piece.id ?? "";
    call.function.name ||= piece.function?.name ?? "";
    call.function.arguments += piece.function?.arguments ?? "";
  }
}

function withoutCalls({ role, content, reasoning_content: reasoning }) {
  return reasoning ? { role, content, reasoning_content: reasoning } : { role, content };
}
