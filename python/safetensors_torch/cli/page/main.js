// Joins the parts: the head of the page, tabs, search, selection and keys.

function drawHead() {
  document.body.classList.toggle("tall", hasStatistics || isDiff);
  document.title = `${printable(data.title)} – safetensors`;
  byId("title").replaceChildren(nameElement(data.title));
  const paths = data.sides.map((side) => nameElement(side.path));
  const subtitle = isDiff ? ["Left: ", paths[0], " · Right: ", paths[1]] : data.sides[0].path === data.title ? [] : paths;
  byId("subtitle").replaceChildren(...subtitle);
  byId("subtitle").hidden = subtitle.length === 0;
  const total = (title, value, hint) => element("div", { title: hint ?? null }, element("dt", {}, title), element("dd", {}, value));
  const totals = isDiff
    ? allGroups.map((group) => total(group.title, exact(group.count)))
    : [
        total("tensors", exact(everything.count)),
        total("parameters", rounded(everything.parameters), exact(everything.parameters)),
        total("of data", sizeText(everything.nbytes), `${exact(everything.nbytes)} bytes`),
        total(data.sides[0].files.length === 1 ? "file" : "files", exact(data.sides[0].files.length)),
      ];
  byId("totals").replaceChildren(...totals);
}

const TABS = [
  ["tensors", "Tensors", () => everything.count],
  ["metadata", "Metadata", metadataCount],
  ["files", "Layout", () => null],
];

function openTab(chosen) {
  for (const [key] of TABS) {
    byId(`panel-${key}`).hidden = key !== chosen;
    byId(`tab-${key}`).setAttribute("aria-selected", String(key === chosen));
    byId(`tab-${key}`).setAttribute("tabindex", key === chosen ? "0" : "-1");
  }
  if (chosen === "metadata") drawMetadata();
  if (chosen === "files") {
    drawFiles();
    drawStrips();
  }
  if (chosen === "tensors" && table.clientWidth !== tableWidth) drawTable();
}

function onTabKey(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const at = TABS.findIndex(([key]) => event.target.id === `tab-${key}`);
  const [key] = TABS[(at + step + TABS.length) % TABS.length];
  openTab(key);
  byId(`tab-${key}`).focus();
  event.preventDefault();
}

function startTabs() {
  const tabs = TABS.map(([key, title, count]) => {
    const number = count() === null ? null : element("span", { class: "count" }, exact(count()));
    const attributes = { id: `tab-${key}`, type: "button", role: "tab", "aria-controls": `panel-${key}` };
    return element("button", { ...attributes, click: () => openTab(key), keydown: onTabKey }, title, number);
  });
  byId("tabs").replaceChildren(...tabs);
  openTab("tensors");
}

function drawFound() {
  const found = byId("found");
  const inModule = state.node.parent ? " in this module" : "";
  const { nbytes } = totalOf(matched);
  const text = isFiltered()
    ? `${exact(matched.length)} of ${counted(below.length, "tensor")}${inModule}, ${sizeText(nbytes)}`
    : `${counted(below.length, "tensor")}${inModule}, ${sizeText(nbytes)}`;
  const parts = [element("span", {}, text)];
  if (isFiltered()) {
    const outside = state.node.parent ? matchesOf(tensors).length - matched.length : 0;
    if (outside) parts.push(element("button", { type: "button", class: "button small", click: () => walk(root) }, `${exact(outside)} more outside`));
    parts.push(element("button", { type: "button", class: "button small", click: clearFilter }, "Clear"));
  }
  found.replaceChildren(...parts);
}

function clearFilter() {
  state.query = "";
  byId("query").value = "";
  state.groups.clear();
  state.flaggedOnly = false;
  refresh();
}

// Draws everything that depends on the module, the search and the selection.
function refresh() {
  match();
  sortRows();
  drawCrumbs();
  drawMap();
  drawGroups();
  drawDetails();
  drawFound();
  drawTable();
  drawStrips();
}

// Selects a tensor in all parts of the page, or none.
function select(tensor) {
  state.selected = tensor;
  drawDetails();
  placeRings();
  scrollToSelected();
  drawn = [-1, -1];
  drawRows();
  drawStrips();
}

function setTheme(theme) {
  document.documentElement.setAttribute("data-theme", theme);
  const other = theme === "dark" ? "light" : "dark";
  byId("theme").textContent = other === "dark" ? "◐ Dark" : "◑ Light";
  byId("theme").setAttribute("aria-label", `Switch to the ${other} theme`);
  readPalette();
}

function startTheme() {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = false;
  setTheme(prefersDark.matches ? "dark" : "light");
  prefersDark.addEventListener("change", () => {
    if (chosen) return;
    setTheme(prefersDark.matches ? "dark" : "light");
    refresh();
  });
  byId("theme").addEventListener("click", () => {
    chosen = true;
    setTheme(document.documentElement.getAttribute("data-theme") === "dark" ? "light" : "dark");
    refresh();
  });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const query = byId("query");
  if (event.target === query || event.target instanceof HTMLSelectElement) {
    if (event.key !== "Escape") return;
    if (state.query) clearFilter();
    else map.focus();
  } else if (event.key === "/") {
    query.focus();
    query.select();
  } else if (event.key === "Escape" || event.key === "Backspace") {
    walkOut();
  } else {
    return;
  }
  event.preventDefault();
}

startTheme();
// After a reload, the module is the same.
state.node = nodeOf(history.state);
drawHead();
tableTools();
refresh();
startTabs();
startMap();
startTable();
byId("query").addEventListener("input", (event) => {
  state.query = event.target.value;
  refresh();
});
// A jump to the table would be an entry of the history, which has no module.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  table.focus();
});
byId("deselect").addEventListener("click", () => {
  select(null);
  map.focus();
});
document.addEventListener("keydown", onKey);
