// The table of tensors. Only the rows in view, and a few around them, are in the document.

const AROUND = 6;
const table = byId("table");
const tableBody = byId("table-body");
let columns = [];
let widths = [];
let rows = [];
let rowHeight = 32;
let drawn = [-1, -1];

function sortRows() {
  const { key, descending } = state.sort;
  rows = matched.slice();
  // They are in the order of their names.
  if (key !== "name") rows.sort(allColumns().find((one) => one.key === key).compare);
  if (descending) rows.reverse();
}

// Sorts by a column: numbers from the largest at first, a second time in the other direction.
function sortBy(key) {
  const chosen = allColumns().find((one) => one.key === key);
  const descending = state.sort.key === key ? !state.sort.descending : chosen.numeric && key !== "offset";
  state.sort = { key, descending };
  drawTools();
  sortRows();
  drawTable();
}

// The columns of the table while it is as wide as this.
let tableWidth = -1;

function chooseColumns() {
  tableWidth = table.clientWidth;
  columns = columnsNow();
  widths = columns.map((column) => column.width());
  const narrow = tableWidth < 700;
  table.classList.toggle("narrow", narrow);
  const tracks = columns.map((column, index) => (column === NAME ? "minmax(0, 1fr)" : `${widths[index]}ch`));
  table.style.setProperty("--columns", narrow ? narrowTracks() : tracks.join(" "));
  rowHeight = narrow ? 54 : 32;
  table.style.setProperty("--row", `${rowHeight}px`);
}

function narrowTracks() {
  if (isDiff) return "8.75rem minmax(0, 1fr) auto";
  return state.columns === "values" ? "6.75rem 6.75rem minmax(0, 1fr)" : "5.5rem minmax(0, 1fr) auto";
}

function headCell(column) {
  const { key, descending } = state.sort;
  const sorted = key === column.key ? (descending ? "descending" : "ascending") : "none";
  const arrow = sorted === "none" ? "" : descending ? " ↓" : " ↑";
  const button = element("button", { type: "button", "data-sort": column.key, click: () => sortBy(column.key) }, column.title + arrow);
  return element("div", { class: column.numeric ? "cell number" : "cell", role: "columnheader", "aria-sort": sorted }, button);
}

// Draws the head, and the rows anew.
function drawTable() {
  chooseColumns();
  const focused = document.activeElement?.getAttribute("data-sort");
  byId("table-head").replaceChildren(...columns.map(headCell));
  if (focused) byId("table-head").querySelector(`[data-sort="${focused}"]`)?.focus();
  table.setAttribute("aria-rowcount", rows.length + 1);
  table.setAttribute("aria-colcount", columns.length);
  tableBody.style.height = `${Math.max(rows.length, 1) * rowHeight}px`;
  drawn = [-1, -1];
  drawRows();
}

// Draws the rows that have come into view.
function drawRows() {
  // When there are fewer rows than before, the browser corrects its position later.
  const most = Math.max(rows.length * rowHeight - table.clientHeight, 0);
  const first = Math.max(Math.floor(Math.min(table.scrollTop, most) / rowHeight) - AROUND, 0);
  const last = Math.min(first + Math.ceil(table.clientHeight / rowHeight) + 2 * AROUND, rows.length);
  if (first === drawn[0] && last === drawn[1]) return;
  drawn = [first, last];
  ruler.font = getComputedStyle(tableBody).font;
  const nameWidth = tableBody.clientWidth - nameSpace();
  const made = [];
  for (let position = first; position < last; position += 1) made.push(row(rows[position], position, nameWidth));
  if (rows.length === 0) made.push(element("p", { class: "none" }, "No tensor matches."));
  tableBody.replaceChildren(...made);
  const position = rows.indexOf(state.selected);
  if (position >= first && position < last) table.setAttribute("aria-activedescendant", `row-${position}`);
  else table.removeAttribute("aria-activedescendant");
}

// Returns the width that names do not have.
function nameSpace() {
  if (table.classList.contains("narrow")) return 24;
  const character = ruler.measureText("0").width;
  return 24 + widths.reduce((sum, width) => sum + width * character, 0) + 16 * (columns.length - 1);
}

function row(tensor, position, nameWidth) {
  const made = element("div", {
    id: `row-${position}`,
    class: tensor === state.selected ? "row selected" : "row",
    role: "row",
    "aria-rowindex": position + 2,
    "aria-selected": String(tensor === state.selected),
    click: () => select(tensor),
    dblclick: () => walk(tensor.leaf.parent),
  });
  made.style.top = `${position * rowHeight}px`;
  const character = ruler.measureText("0").width;
  columns.forEach((column, index) => made.append(cellOf(tensor, column, nameWidth, widths[index] * character)));
  return made;
}

function cellOf(tensor, column, nameWidth, width) {
  const text = column.text(tensor);
  const cell = element("div", { class: `cell ${column.numeric ? "number" : column.key}`, role: "gridcell" });
  if (column === NAME) {
    const mark = tensor.flagged ? "⚠ " : "";
    const name = element("bdi", { class: "name", dir: "ltr" }, fit(mark + text, nameWidth, ruler));
    if (name.textContent !== mark + text) name.setAttribute("title", text);
    cell.append(name);
    return cell;
  }
  if (column === DTYPE || column === STATUS) cell.append(swatch(fillOf(tensor)));
  const narrow = table.classList.contains("narrow");
  const shown = narrow ? column.narrow(tensor) : column.numeric ? text : fit(text, width, ruler);
  if (!narrow && shown !== text) cell.setAttribute("title", text);
  if (text.startsWith("⚠")) cell.classList.add("alarm");
  cell.append(element("span", { dir: "ltr" }, shown));
  return cell;
}

// Scrolls so that the selected tensor is in view.
function scrollToSelected() {
  const position = rows.indexOf(state.selected);
  if (position < 0) return;
  const head = byId("table-head").offsetHeight;
  const upper = position * rowHeight;
  const lower = upper + rowHeight + head - table.clientHeight;
  if (table.scrollTop > upper) table.scrollTop = upper;
  else if (table.scrollTop < lower) table.scrollTop = lower;
}

function onTableKey(event) {
  if (event.target !== table || event.ctrlKey || event.metaKey || event.altKey) return;
  const page = Math.max(Math.floor(table.clientHeight / rowHeight) - 2, 1);
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key === "Enter" && state.selected) {
    walk(state.selected.leaf.parent);
  } else if (Object.hasOwn(steps, event.key) && rows.length > 0) {
    const at = rows.indexOf(state.selected);
    const next = at < 0 && steps[event.key] === 1 ? 0 : at + steps[event.key];
    select(rows[Math.min(Math.max(next, 0), rows.length - 1)]);
  } else {
    return;
  }
  event.preventDefault();
}

function tableTools() {
  const options = allColumns().map(({ key, title }) => element("option", { value: key }, title));
  const choice = element("select", { id: "sort", change: (event) => sortBy(event.target.value) }, ...options);
  const tools = [element("label", { class: "sort" }, "Sort by ", choice)];
  if (hasStatistics) {
    const button = (key, title) => {
      const choose = () => {
        state.columns = key;
        drawTools();
        drawTable();
      };
      return element("button", { type: "button", class: "segment", "data-columns": key, click: choose }, title);
    };
    const buttons = [button("storage", "Storage"), button("values", "Values")];
    tools.unshift(element("div", { class: "segments", role: "group", "aria-label": "Columns" }, ...buttons));
  }
  byId("table-tools").replaceChildren(...tools);
  drawTools();
}

function drawTools() {
  byId("sort").value = state.sort.key;
  for (const button of byId("table-tools").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.getAttribute("data-columns") === state.columns));
  }
}

function startTable() {
  table.addEventListener("scroll", drawRows, { passive: true });
  table.addEventListener("keydown", onTableKey);
  new ResizeObserver(() => (table.clientWidth === tableWidth ? drawRows() : drawTable())).observe(table);
}
