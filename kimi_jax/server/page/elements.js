// Makes elements. Texts become text nodes: nothing that comes from a model is ever read as markup.

/** Returns an element with attributes (functions listen to the event of their name) and children, texts or nodes. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Returns the element of the page with an id. */
export const byId = (id) => document.getElementById(id);

/** Returns a small button with a text. */
export const smallButton = (text, click) => element("button", { type: "button", class: "small", click }, text);

/** Returns a button that copies what `read` returns, and says so for a moment. */
export function copyButton(read) {
  const button = smallButton("Copy", async () => {
    const copied = await copy(read());
    button.textContent = copied ? "Copied" : "Not copied";
    say(copied ? "Copied." : "The browser did not allow copying.");
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

/** Says a sentence to those who use a screen reader. */
export function say(text) {
  byId("status").textContent = text;
}

/** Shows a sentence above the message field; an empty one removes it. */
export function notice(text) {
  byId("notice").textContent = text;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without TLS there is no clipboard on other machines; a selected field is copied as a person would.
    const field = element("textarea", { class: "hidden", "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    return copied;
  }
}
