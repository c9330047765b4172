// The colours of dtypes and of the states in a comparison. page.css defines them for each theme; people with any kind of
// colour blindness can tell them apart.

const FILLS = ["blue", "green", "sky", "orange", "purple", "red", "yellow", "grey"];
const PREFERRED = new Map([
  ["F32", "blue"],
  ["BF16", "green"],
  ["F16", "sky"],
  ["F64", "purple"],
  ["F8_E4M3", "orange"],
  ["F8_E5M2", "red"],
  ["F4", "yellow"],
  ["U8", "orange"],
  ["I8", "orange"],
  ["I32", "purple"],
  ["I64", "purple"],
  ["BOOL", "grey"],
]);
const STATUS_FILLS = new Map([
  ["equal", "calm"],
  ["values", "blue"],
  ["kind", "yellow"],
  ["left", "red"],
  ["right", "green"],
  ["same", "calm"],
]);

// The colour of each group. Each dtype has one of its own, as long as there are enough.
const groupFills = new Map();
if (isDiff) {
  for (const status of STATUSES) groupFills.set(status.title, STATUS_FILLS.get(status.key));
} else {
  const free = new Set(FILLS);
  const take = (group, fill) => groupFills.set(group.title, fill) && free.delete(fill);
  for (const group of allGroups) {
    const fill = PREFERRED.get(group.title);
    if (free.has(fill)) take(group, fill);
  }
  for (const group of allGroups) {
    if (!groupFills.has(group.title)) take(group, free.values().next().value ?? "grey");
  }
}

// Returns the name of a tensor's colour. Values that differ have three shades, by how much.
function fillOf(tensor) {
  if (tensor.change?.status.key === "values") return `blue-${shadeOf(tensor.change)}`;
  return groupFills.get(tensor.group);
}

function shadeOf(change) {
  if (typeof change.relative !== "number") return 3;
  if (change.relative < 1e-3) return 1;
  return change.relative < 1e-1 ? 2 : 3;
}

let palette = new Map();

// Reads the colours of the current theme, which a canvas cannot take from the style sheet.
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  palette = new Map();
  for (const name of [...FILLS, "calm", "blue-1", "blue-2", "blue-3"]) palette.set(name, style.getPropertyValue(`--${name}`));
  for (const name of ["on-fill", "frame-0", "frame-1", "frame-2", "frame-3", "frame-text", "ground", "line", "alarm"]) {
    palette.set(name, style.getPropertyValue(`--${name}`));
  }
  for (const name of ["sans", "mono"]) palette.set(name, style.getPropertyValue(`--${name}`));
}

function swatch(fill) {
  return element("span", { class: `swatch fill-${fill}`, "aria-hidden": "true" });
}
