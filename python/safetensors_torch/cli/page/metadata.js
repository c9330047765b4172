// The metadata. Values that are JSON are shown with line breaks; their characters stay as they are.

const MOST_SHOWN = 4000;
// Entries are drawn in parts: a browser takes 9 s for 80,000.
const ENTRIES_IN_PART = 1000;
// Longer values stay as they are: their line breaks could take gigabytes.
const MOST_FORMATTED = 1_000_000;

// Returns JSON with line breaks and indentation, or null if `text` is not an object or a list, or too long. Numbers are
// not parsed, because large ones would change.
function formatted(text) {
  if (text.length > MOST_FORMATTED || !/^\s*[[{]/.test(text)) return null;
  try {
    JSON.parse(text);
  } catch {
    return null;
  }
  const parts = [];
  let [last, depth] = ["", 0];
  const line = () => `\n${"  ".repeat(Math.min(depth, 20))}`;
  for (const [token] of text.matchAll(/"[^"\\]*(?:\\.[^"\\]*)*"|[[\]{},:]|[^\s[\]{},:"]+/g)) {
    const opened = last === "{" || last === "[";
    const closes = token === "}" || token === "]";
    if (closes) depth -= 1;
    if (opened !== closes) parts.push(line());
    parts.push(token);
    if (token === ",") parts.push(line());
    if (token === ":") parts.push(" ");
    if (token === "{" || token === "[") depth += 1;
    last = token;
  }
  return parts.join("");
}

// Line breaks that the formatting has made are kept; everything else that is not printable is shown as an escape.
function printableLines(text) {
  return text.split("\n").map(printable).join("\n");
}

function valueElement(value) {
  if (value === null || value === undefined) return element("span", { class: "muted" }, "none");
  if (value === "") return element("span", { class: "muted" }, "empty");
  const json = formatted(value);
  const text = json === null ? printable(value) : printableLines(json);
  const block = element("pre", { dir: "ltr" }, text.length > MOST_SHOWN ? `${text.slice(0, MOST_SHOWN)}…` : text);
  const parts = [block];
  if (text.length > MOST_SHOWN) {
    const showAll = (event) => {
      block.textContent = text;
      event.target.remove();
    };
    parts.push(element("button", { type: "button", class: "button small", click: showAll }, `Show all ${exact(text.length)} characters`));
  }
  if (json !== null) {
    const raw = (event) => {
      const pressed = event.target.getAttribute("aria-pressed") === "true";
      event.target.setAttribute("aria-pressed", String(!pressed));
      block.textContent = pressed ? text : printable(value);
    };
    parts.push(element("button", { type: "button", class: "button small", "aria-pressed": "false", click: raw }, "As in the file"));
  }
  return element("div", { class: "value" }, ...parts);
}

// Returns a list of the first entries, and a button that draws more of them. `row` makes the two elements of an entry.
function entryList(entries, row) {
  const list = element("dl", { class: "metadata" });
  let drawn = 0;
  const drawMore = () => {
    list.append(...entries.slice(drawn, drawn + ENTRIES_IN_PART).flatMap(row));
    drawn += ENTRIES_IN_PART;
    const left = entries.length - drawn;
    if (left > 0) more.textContent = `Show ${exact(Math.min(left, ENTRIES_IN_PART))} more of ${exact(left)}`;
    else more.remove();
  };
  const more = element("button", { type: "button", class: "button", click: drawMore });
  const parts = element("div", {}, list, more);
  drawMore();
  return parts;
}

function metadataList() {
  const entries = data.sides[0].metadata;
  if (!entries?.length) return element("p", { class: "none" }, "The checkpoint has no metadata.");
  return entryList(entries, ([key, value]) => [element("dt", {}, nameElement(key)), element("dd", {}, valueElement(value))]);
}

function metadataDifferences() {
  const [left, right] = data.sides.map((side) => new Map(side.metadata ?? []));
  const keys = Array.from(new Set([...left.keys(), ...right.keys()])).sort();
  if (keys.length === 0) return element("p", { class: "none" }, "Neither side has metadata.");
  const row = (key) => {
    const equal = left.get(key) === right.get(key);
    const [mark, title] = equal ? ["=", "equal"] : ["≠", "differs"];
    const status = element("p", { class: equal ? "muted" : "differs" }, `${mark} ${title}`);
    const sides = equal ? [["Both", left]] : [["Left", left], ["Right", right]];
    const values = sides.map(([side, map]) => element("div", {}, element("h4", {}, side), valueElement(map.get(key))));
    return [element("dt", {}, nameElement(key), status), element("dd", { class: "pair" }, ...values)];
  };
  const differing = keys.filter((key) => left.get(key) !== right.get(key));
  const sorted = [...differing, ...keys.filter((key) => left.get(key) === right.get(key))];
  return entryList(sorted, row);
}

// Draws the metadata when they are shown for the first time.
function drawMetadata() {
  const panel = byId("panel-metadata");
  if (!panel.hasChildNodes()) panel.replaceChildren(isDiff ? metadataDifferences() : metadataList());
}

// Returns the number that the tab shows.
function metadataCount() {
  const keys = new Set(data.sides.flatMap((side) => (side.metadata ?? []).map(([key]) => key)));
  return keys.size;
}
