// How names, numbers and sizes are written, and how elements are made.

// Characters that cannot be seen, or that change the order of their neighbours; and those of a name that would look like
// an escape, or like nothing.
const UNPRINTABLE =
  /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\u{e0100}-\u{e01ef}]|[^\S ]/gu;
const AMBIGUOUS = /\\|^ | $/g;
const SHORT_ESCAPES = new Map([["\n", "\\n"], ["\r", "\\r"], ["\t", "\\t"]]);
const EXACT = new Intl.NumberFormat("en");
const ruler = document.createElement("canvas").getContext("2d");

// Returns `text` with escapes for characters that cannot be seen.
function printable(text) {
  return text.replace(UNPRINTABLE, escaped);
}

function escaped(character) {
  const code = character.codePointAt(0);
  if (SHORT_ESCAPES.has(character)) return SHORT_ESCAPES.get(character);
  // A byte of a file name that is not UTF-8.
  if (code >= 0xdc80 && code <= 0xdcff) return `\\x${(code - 0xdc00).toString(16)}`;
  const digits = code.toString(16);
  if (digits.length <= 2) return `\\x${digits.padStart(2, "0")}`;
  return digits.length <= 4 ? `\\u${digits.padStart(4, "0")}` : `\\U${digits.padStart(8, "0")}`;
}

// Returns a name as text that is never empty. No two names look the same.
function nameText(name) {
  if (name === "") return '""';
  return printable(name.replace(AMBIGUOUS, (character) => (character === "\\" ? "\\\\" : "\\x20")));
}

function exact(number) {
  return EXACT.format(number);
}

// Returns a count with a unit of thousands: 124.4 M.
function rounded(count) {
  const units = ["", " K", " M", " B", " T"];
  let unit = 0;
  while (count >= 999.95 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return unit === 0 ? exact(count) : `${count.toFixed(1)}${units[unit]}`;
}

function sizeText(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return unit === 0 ? `${bytes} B` : `${bytes.toFixed(1)} ${units[unit]}`;
}

function counted(count, noun) {
  return `${exact(count)} ${noun}${count === 1 ? "" : "s"}`;
}

function shareText(part, whole) {
  if (whole === 0 || part === 0) return "0%";
  const percent = (100 * part) / whole;
  if (percent < 0.1) return "<0.1%";
  // Only the whole is 100%.
  if (percent >= 99.5 && part < whole) return percent < 99.95 ? `${percent.toFixed(1)}%` : ">99.9%";
  return `${percent.toFixed(percent >= 10 ? 0 : 1).replace(/\.0$/, "")}%`;
}

// Returns a value of a tensor, with five digits or as many as given. The page's data has infinite ones as text.
function valueText(value, digits = 5) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return exact(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(Math.min(digits, 4) - 1).replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

// Returns `text` without its middle, so that it is at most `width` pixels wide in the font of `context`.
function fit(text, width, context) {
  if (text.length < 400 && context.measureText(text).width <= width) return text;
  const characters = text.length < 400 ? Array.from(text) : [...Array.from(text.slice(0, 200)), ...Array.from(text.slice(-200))];
  let [low, high] = [0, characters.length - 1];
  const shortened = (kept) => {
    const front = Math.ceil(kept / 2);
    return `${characters.slice(0, front).join("")}…${characters.slice(characters.length - kept + front).join("")}`;
  };
  while (low < high) {
    const kept = Math.ceil((low + high) / 2);
    if (context.measureText(shortened(kept)).width <= width) low = kept;
    else high = kept - 1;
  }
  return low === 0 ? "" : shortened(low);
}

// Makes an element with attributes and children, or lists of children. Text becomes text nodes: no name is read as HTML.
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) made.append(child);
  }
  return made;
}

// Makes an element for a name: its direction does not change that of its surroundings.
function nameElement(name, className) {
  return element("bdi", { class: `name ${className ?? ""}`.trim(), dir: "ltr" }, nameText(name));
}

function byId(id) {
  return document.getElementById(id);
}
