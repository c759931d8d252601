// Shows markdown that a model wrote: paragraphs, headings, lists, quotes, tables, code, emphasis and links.
//
// Every text becomes a text node. Links lead to http and https alone and name their address; pictures are links too,
// since loading one would tell its server about the conversation.

import { copyButton, element } from "./elements.js";

const DEEPEST = 6; // lists and quotes in one another; deeper ones are plain text

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)/;
const HEADING = /^(#{1,6})[ \t]+(.*)/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])[ \t]+(.*)/;
const QUOTE = /^ {0,3}> ?(.*)/;
const RULE = /^ {0,3}(?:-{3,}|\*{3,}|_{3,})[ \t]*$/;
const TABLE_LINE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** Shows `source` in `container`. Blocks that are as before stay: a stream adds to the last one. */
export function showMarkdown(container, source) {
  const blocks = split(source.split("\n"));
  const before = container.blocks ?? [];
  let same = 0;
  while (same < before.length && same < blocks.length && equal(before[same], blocks[same])) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map((block) => show(block, 0)));
  container.blocks = blocks;
}

const equal = (a, b) => a.kind === b.kind && a.mark === b.mark && a.lines.join("\n") === b.lines.join("\n");

/** Splits lines into blocks {kind, lines, mark}. */
function split(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const start = at;
    let found;
    if (!line.trim()) {
      at++;
    } else if ((found = FENCE.exec(line))) {
      const [, fence, language] = found;
      do at++;
      while (at < lines.length && !closes(lines[at], fence));
      blocks.push({ kind: "code", lines: lines.slice(start + 1, at), mark: language });
      at++;
    } else if ((found = HEADING.exec(line))) {
      blocks.push({ kind: "heading", lines: [found[2].replace(/[ \t]#+[ \t]*$/, "")], mark: found[1].length });
      at++;
    } else if (RULE.test(line)) {
      blocks.push({ kind: "rule", lines: [] });
      at++;
    } else if (QUOTE.test(line)) {
      while (at < lines.length && QUOTE.test(lines[at])) at++;
      blocks.push({ kind: "quote", lines: lines.slice(start, at).map((one) => QUOTE.exec(one)[1]) });
    } else if (ITEM.test(line)) {
      while (at < lines.length && belongs(lines, at)) at++;
      blocks.push({ kind: "list", lines: lines.slice(start, at) });
    } else if (line.includes("|") && TABLE_LINE.test(lines[at + 1] ?? "")) {
      while (at < lines.length && lines[at].includes("|")) at++;
      blocks.push({ kind: "table", lines: lines.slice(start, at) });
    } else {
      do at++;
      while (at < lines.length && lines[at].trim() && !begins(lines[at]));
      blocks.push({ kind: "paragraph", lines: lines.slice(start, at) });
    }
  }
  return blocks;
}

const begins = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((kind) => kind.test(line));

const closes = (line, fence) => {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
};

/** Says whether a line goes on with the list before it. */
function belongs(lines, at) {
  const line = lines[at];
  if (ITEM.test(line) || /^ {2,}\S/.test(line)) return true;
  if (!line.trim()) return at + 1 < lines.length && (ITEM.test(lines[at + 1]) || /^ {2,}\S/.test(lines[at + 1]));
  return Boolean(lines[at - 1].trim()) && !begins(line);
}

function show({ kind, lines, mark }, depth) {
  const text = lines.join("\n");
  switch (kind) {
    case "code":
      return code(text, mark);
    case "heading": // h2 names the message that it stands in
      return element(`h${Math.min(6, mark + 2)}`, {}, ...inline(text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...inner(lines, depth));
    case "list":
      return list(lines, depth);
    case "table":
      return table(lines);
    default:
      return element("p", {}, ...inline(text));
  }
}

const inner = (lines, depth) =>
  depth < DEEPEST ? split(lines).map((block) => show(block, depth + 1)) : [lines.join("\n")];

function code(text, language) {
  const head = element("figcaption", {}, element("span", {}, language || "text"), copyButton(() => text));
  const shown = element("pre", { tabindex: "0", "aria-label": `Code, ${language || "text"}` }, element("code", {}, text));
  return element("figure", { class: "code" }, head, shown);
}

function list(lines, depth) {
  const [, indent, first] = ITEM.exec(lines[0]);
  const items = [];
  let width = 0;
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent.length + 1) {
      width = found[0].length - found[3].length;
      items.push([found[3]]);
    } else {
      const blank = line.length - line.trimStart().length;
      items.at(-1).push(line.slice(Math.min(blank, width)));
    }
  }
  const isOrdered = /\d/.test(first);
  return element(
    isOrdered ? "ol" : "ul",
    isOrdered ? { start: parseInt(first, 10) } : {},
    ...items.map((item) => {
      const children = inner(item, depth);
      const [only] = children;
      const tight = children.length && only instanceof Element && only.tagName === "P" && !item.includes("");
      return element("li", {}, ...(tight ? [...only.childNodes, ...children.slice(1)] : children));
    }),
  );
}

function table([head, , ...rows]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (line, tag) => element("tr", {}, ...cells(line).map((cell) => element(tag, {}, ...inline(cell.trim()))));
  const made = element(
    "table",
    {},
    element("thead", {}, row(head, "th")),
    element("tbody", {}, ...rows.map((line) => row(line, "td"))),
  );
  return element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, made);
}

const SPANS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const ADDRESS = /https?:\/\/[^\s<>"'`]{1,2000}/y;

/** Returns the nodes of a line of text. Time grows with its length alone: a mark without an end is looked for once. */
function inline(text) {
  const nodes = [];
  const endless = new Set();
  let plain = "";
  let at = 0;

  const find = (mark, from) => {
    if (endless.has(mark)) return -1;
    const end = text.indexOf(mark, from);
    if (end < 0) endless.add(mark);
    return end;
  };
  const add = (node, next) => {
    nodes.push(plain, node);
    plain = "";
    at = next;
  };
  const steps = {
    "\\": () => /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") && ((plain += text[at + 1]), (at += 2)),
    "\n": () => add(element("br"), at + 1),
    "`": () => {
      const mark = /^`+/.exec(text.slice(at, at + 8))[0];
      const end = find(mark, at + mark.length);
      return end > 0 && (add(element("code", {}, text.slice(at + mark.length, end)), end + mark.length), true);
    },
    "[": () => link(at),
    "!": () => text[at + 1] === "[" && link(at + 1),
    h: () => {
      ADDRESS.lastIndex = at;
      const found = ADDRESS.exec(text)?.[0].replace(/[.,;:!?)\]*_]+$/, "");
      if (!found) return;
      const target = address(found);
      if (target) add(anchor(target, [found]), at + found.length);
      else plain += text.slice(at, (at += found.length));
    },
  };
  const link = (open) => {
    const middle = find("](", open);
    const end = middle < 0 ? -1 : find(")", middle);
    const target = end < 0 ? null : address(text.slice(middle + 2, end).trim().split(/\s/)[0]);
    if (!target) return false;
    add(anchor(target, inline(text.slice(open + 1, middle))), end + 1);
    return true;
  };
  const span = () => {
    const mark = [text.slice(at, at + 2), text[at]].find((one) => Object.hasOwn(SPANS, one));
    if (!mark || /\s|^$/.test(text[at + mark.length] ?? "")) return false;
    if (mark[0] === "_" && /\w/.test(text[at - 1] ?? "")) return false; // snake_case
    const end = find(mark, at + mark.length + 1);
    if (end < 0 || /\s/.test(text[end - 1])) return false;
    add(element(SPANS[mark], {}, ...inline(text.slice(at + mark.length, end))), end + mark.length);
    return true;
  };
  while (at < text.length) {
    const step = Object.hasOwn(steps, text[at]) ? steps[text[at]] : span;
    const before = at;
    step();
    if (at === before) plain += text[at++];
  }
  nodes.push(plain);
  return nodes.filter((node) => node !== "");
}

/** Returns an address of the web as the browser reads it, null for any other. */
function address(text) {
  if (!/^https?:\/\//i.test(text) || !URL.canParse(text)) return null;
  const found = new URL(text);
  return found.username || found.password ? null : found.href;
}

const anchor = (target, children) =>
  element("a", { href: target, title: target, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
