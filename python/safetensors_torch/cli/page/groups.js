// The summary by dtype or, in a comparison, by status. Its first column restricts the page to a group.

function toggleGroup(title) {
  if (!state.groups.delete(title)) state.groups.add(title);
  refresh();
}

// The parameters of a comparison would belong to both sides.
function totalsRow(button, total) {
  const parameters = element("td", { title: exact(total.parameters) }, rounded(total.parameters));
  return element(
    "tr",
    { class: total.count === 0 ? "empty" : null },
    element("th", { scope: "row" }, button),
    element("td", {}, exact(total.count)),
    isDiff ? null : parameters,
    element("td", {}, sizeText(total.nbytes)),
    element("td", {}, shareText(total.nbytes, state.node.nbytes)),
  );
}

function groupRow(group, inside) {
  const shown = inside.get(group.title) ?? { count: 0, parameters: 0, nbytes: 0 };
  const pressed = state.groups.has(group.title);
  const button = element(
    "button",
    { type: "button", class: "filter", "aria-pressed": String(pressed), "data-group": group.title, click: () => toggleGroup(group.title) },
    swatch(groupFills.get(group.title)),
    printable(group.title),
  );
  return totalsRow(button, shown);
}

function flaggedRow() {
  const flagged = totalOf(below.filter((tensor) => tensor.flagged));
  const toggle = () => {
    state.flaggedOnly = !state.flaggedOnly;
    refresh();
  };
  const attributes = { type: "button", class: "filter alarm", "aria-pressed": String(state.flaggedOnly), click: toggle };
  return totalsRow(element("button", { ...attributes, "data-group": "flagged" }, "⚠ NaN, Inf"), flagged);
}

function shadeLegend() {
  const shade = (number, text) => element("span", {}, swatch(`blue-${number}`), text);
  const shades = [shade(1, "< 0.1%"), shade(2, "< 10%"), shade(3, "≥ 10%")];
  return element("p", { class: "legend" }, "Relative difference", ...shades);
}

function drawGroups() {
  byId("groups-title").textContent = isDiff ? "By change" : "By dtype";
  const inside = new Map(groupsOf(below).map((group) => [group.title, group]));
  const focused = document.activeElement?.getAttribute("data-group");
  const titles = ["", "Tensors", ...(isDiff ? [] : ["Params"]), "Size", "Share"];
  const head = titles.map((title) => element("th", { scope: "col" }, title));
  const rows = allGroups.map((group) => groupRow(group, inside));
  if (tensors.some((tensor) => tensor.flagged)) rows.push(flaggedRow());
  const table = element("table", { class: "groups" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  const legend = isDiff && allGroups.some((group) => group.title === "values differ");
  byId("groups").replaceChildren(table, ...(legend ? [shadeLegend()] : []));
  if (focused !== null && focused !== undefined) {
    for (const button of table.querySelectorAll("button")) {
      if (button.getAttribute("data-group") === focused) button.focus();
    }
  }
}
