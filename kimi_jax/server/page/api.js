// Calls the server that this page came from.

let key = sessionStorage.getItem("key") ?? "";

/** Returns the key that calls send, an empty text for none. */
export const currentKey = () => key;

/** Sets the key; it stays in this tab. */
export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

/** An answer that did not come, in words. `status` is HTTP's, 0 where the server said nothing. */
export class CallError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Returns the first model of the server. Throws `CallError`. */
export async function firstModel() {
  const answer = await call("v1/models");
  return (await answer.json()).data[0].id;
}

/** Yields the choices of a streamed answer. Throws `CallError`, or an AbortError where `signal` stopped it. */
export async function* stream(body, signal) {
  const answer = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of events(answer.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new CallError(sentence(chunk.error.message), 200);
    if (chunk.choices.length) yield chunk.choices[0];
  }
  throw new CallError("The connection was lost before the answer was complete.");
}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError("The server cannot be reached. Is it running, and are you connected?");
  }
  if (!answer.ok) throw new CallError(await inWords(answer), answer.status);
  return answer;
}

async function inWords(answer) {
  let said = "";
  try {
    said = sentence((await answer.json()).error.message);
  } catch {
    said = `The server answered with status ${answer.status}.`;
  }
  const seconds = Number(answer.headers.get("Retry-After"));
  const later = seconds ? ` Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.` : "";
  if (answer.status === 401) return "The server wants an API key, or another one than this.";
  if (answer.status === 413) return "The message is too large for this server. Send fewer or smaller pictures.";
  if (answer.status === 429) return `Too many requests at the moment: ${said}${later}`;
  if (answer.status === 503) return `The server cannot answer now: ${said}${later}`;
  return said;
}

/** Yields the data of server-sent events. */
async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } catch (error) {
    if (signal.aborted) throw new DOMException("stopped", "AbortError");
    if (error instanceof TypeError) throw new CallError("The connection was lost before the answer was complete.");
    throw error;
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

function sentence(text) {
  const trimmed = String(text).trim();
  const begun = trimmed.charAt(0).toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
