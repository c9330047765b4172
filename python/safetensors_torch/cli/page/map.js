// The treemap as something to use: pointer, keyboard, rings around cells, breadcrumbs and the browser's history.

const treemap = new Treemap(byId("canvas"));
const map = byId("treemap");
const tip = byId("tip");
let active = null;

function drawMap() {
  treemap.draw(state.node, (tensor) => !isMatching(tensor));
  if (!active || !treemap.tops.some((cell) => cell.node === active)) active = treemap.tops[0]?.node ?? null;
  placeRings();
  byId("ring-hover").hidden = true;
  tip.hidden = true;
}

function placeRing(id, cell) {
  const ring = byId(id);
  ring.hidden = !cell;
  if (!cell) return;
  ring.style.left = `${cell.x}px`;
  ring.style.top = `${cell.y}px`;
  ring.style.width = `${cell.width}px`;
  ring.style.height = `${cell.height}px`;
}

function placeRings() {
  const focused = document.activeElement === map;
  const cell = treemap.tops.find((top) => top.node === active) ?? null;
  placeRing("ring-active", focused ? cell : null);
  const shown = state.selected && isInside(state.selected, state.node);
  placeRing("ring-selected", shown ? treemap.cellOf(state.selected.leaf) : null);
  // The option that has the focus, for screen readers. A new one each time, so that it is read.
  const options = byId("options");
  options.replaceChildren();
  map.removeAttribute("aria-activedescendant");
  if (!cell) return;
  const position = treemap.tops.indexOf(cell);
  const option = element("div", {
    id: `option-${position}`,
    class: "hidden",
    role: "option",
    "aria-selected": String(cell.node.tensor !== null && cell.node.tensor === state.selected),
    "aria-posinset": position + 1,
    "aria-setsize": treemap.tops.length,
  });
  option.textContent = describeNode(cell.node).join(", ");
  options.append(option);
  map.setAttribute("aria-activedescendant", option.id);
}

// Returns the lines that say what a node is.
function describeNode(node) {
  const share = `${shareText(node.nbytes, everything.nbytes)} of all`;
  if (!node.tensor) {
    const flagged = node.flagged ? [`⚠ NaN or Inf in ${counted(node.flagged, "tensor")}`] : [];
    return [nameText(node.path), `${counted(node.count, "tensor")}, ${sizeText(node.nbytes)}, ${share}`, ...flagged];
  }
  const { tensor } = node;
  const lines = [nameText(tensor.name), `${tensor.dtype} ${tensor.shape}`, `${sizeText(tensor.nbytes)}, ${share}`];
  if (tensor.change) lines.push(changeText(tensor.change));
  if (tensor.flagged) lines.push("⚠ NaN or Inf");
  return lines;
}

function changeText(change) {
  if (change.status.key !== "values") return change.status.title;
  const relative = typeof change.relative === "number" ? `, relative difference ${valueText(change.relative)}` : "";
  return `${counted(change.differing, "value")} differ${change.differing === 1 ? "s" : ""}${relative}`;
}

// Shows `node`: a module is walked into, a tensor is selected.
function open(node) {
  if (node.tensor) select(node.tensor);
  else walk(node);
}

// Shows the module `node`, and remembers it in the browser's history.
function walk(node, from) {
  if (node === state.node) return;
  history.pushState({ path: lineOf(node).map((at) => at.parent?.children.indexOf(at) ?? 0) }, "");
  show(node, from);
}

function show(node, from) {
  state.node = node;
  if (state.selected && !isInside(state.selected, node)) state.selected = null;
  active = from ?? null;
  refresh();
  byId("table").scrollTop = 0;
}

// Shows the module around the shown one, in which the shown one keeps the focus.
function walkOut() {
  if (state.node.parent) walk(state.node.parent, state.node);
}

// Returns the module that an entry of the browser's history has. The page may have been another one then.
function nodeOf(entry) {
  let node = root;
  for (const position of (entry?.path ?? []).slice(1)) {
    const child = node.children[position];
    if (!child || child.tensor) break;
    node = child;
  }
  return node;
}

window.addEventListener("popstate", (event) => {
  const node = nodeOf(event.state);
  show(node, state.node.parent === node ? state.node : null);
});

function drawCrumbs() {
  const line = lineOf(state.node);
  byId("up").disabled = line.length === 1;
  byId("crumbs").replaceChildren(
    ...line.map((node, position) => {
      ruler.font = `13px ${palette.get("sans")}`;
      const name = nameElement(position === 0 ? "All" : fit(nameText(node.label), 320, ruler));
      if (node === state.node) return element("li", {}, element("span", { "aria-current": "location" }, name));
      return element("li", {}, element("button", { type: "button", class: "crumb", click: () => walk(node, line[position + 1]) }, name));
    }),
  );
}

const ARROWS = new Map([
  ["ArrowLeft", [-1, 0]],
  ["ArrowRight", [1, 0]],
  ["ArrowUp", [0, -1]],
  ["ArrowDown", [0, 1]],
]);

function onMapKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { tops } = treemap;
  const cell = tops.find((top) => top.node === active);
  if (event.key === "Enter" || event.key === " ") {
    if (cell) open(cell.node);
  } else if (ARROWS.has(event.key)) {
    active = (cell && treemap.next(cell, ...ARROWS.get(event.key)))?.node ?? active;
  } else if (event.key === "Home") {
    active = tops[0]?.node ?? null;
  } else if (event.key === "End") {
    active = tops[tops.length - 1]?.node ?? null;
  } else {
    return;
  }
  event.preventDefault();
  placeRings();
}

function pointed(event) {
  const box = map.getBoundingClientRect();
  return [event.clientX - box.left - map.clientLeft, event.clientY - box.top - map.clientTop];
}

function onMapMove(event) {
  const [x, y] = pointed(event);
  const cell = treemap.at(x, y);
  placeRing("ring-hover", cell?.top ?? null);
  tip.hidden = !cell || event.pointerType === "touch";
  if (tip.hidden) return;
  const [name, ...lines] = describeNode(cell.node);
  ruler.font = `600 13px ${palette.get("mono")}`;
  tip.replaceChildren(element("bdi", { class: "name", dir: "ltr" }, fit(name, Math.min(map.clientWidth - 40, 560), ruler)), ...lines.map((line) => element("div", {}, line)));
  const left = Math.min(x + 14, map.clientWidth - tip.offsetWidth - 6);
  const upper = y + 18 + tip.offsetHeight > map.clientHeight ? y - tip.offsetHeight - 10 : y + 18;
  tip.style.left = `${Math.max(left, 6)}px`;
  tip.style.top = `${Math.max(upper, 6)}px`;
}

function startMap() {
  map.addEventListener("keydown", onMapKey);
  map.addEventListener("focus", placeRings);
  map.addEventListener("blur", placeRings);
  map.addEventListener("pointermove", onMapMove);
  map.addEventListener("pointerleave", () => {
    byId("ring-hover").hidden = true;
    tip.hidden = true;
  });
  map.addEventListener("click", (event) => {
    const cell = treemap.at(...pointed(event));
    if (!cell) return;
    active = cell.top.node;
    open(cell.top.node);
  });
  byId("up").addEventListener("click", walkOut);
  new ResizeObserver(() => treemap.fits() || drawMap()).observe(map);
}
