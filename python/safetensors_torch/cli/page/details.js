// What is known about the selected tensor, or about the module that the page shows.

function facts(rows) {
  const items = rows.flatMap(([term, ...values]) => [element("dt", {}, term), element("dd", {}, ...values)]);
  return element("dl", { class: "facts" }, ...items);
}

const MOST_LARGEST = 5;

function largestOf(list) {
  return list.slice().sort((a, b) => b.nbytes - a.nbytes).slice(0, MOST_LARGEST);
}

function largestItem(tensor) {
  const name = nameElement(tensor.name);
  ruler.font = `12px ${palette.get("mono")}`;
  name.textContent = fit(name.textContent, 240, ruler);
  const button = element("button", { type: "button", class: "crumb", click: () => select(tensor) }, name);
  return element("li", {}, button, element("span", {}, sizeText(tensor.nbytes)));
}

function moduleDetails(node) {
  const subject = node.parent ? [element("p", { class: "subject" }, nameElement(node.path, "full"))] : [];
  return [
    ...subject,
    facts([
      ["Tensors", exact(node.count)],
      ["Parameters", exact(node.parameters)],
      ["Size", `${sizeText(node.nbytes)} (${exact(node.nbytes)} bytes)`],
      ...(node.parent ? [["Share", shareText(node.nbytes, everything.nbytes)]] : []),
    ]),
    element("h3", {}, "Largest tensors"),
    element("ol", { class: "largest" }, ...largestOf(below).map(largestItem)),
  ];
}

// Returns the largest power of two, up to 4096, that divides an offset.
function alignmentOf(offset) {
  let alignment = 1;
  while (alignment < 4096 && offset % (alignment * 2) === 0) alignment *= 2;
  return alignment;
}

function placeRows(side, files) {
  return [
    ...(files.length > 1 ? [["File", nameElement(files[side.file][0])]] : []),
    ["Bytes", `${exact(side.begin)} – ${exact(side.begin + side.nbytes)}`],
    ["Alignment", counted(alignmentOf(side.begin), "byte")],
  ];
}

function tensorDetails(tensor) {
  const rows = [
    ["Dtype", swatch(fillOf(tensor)), tensor.dtype],
    ["Shape", tensor.shape],
    ["Parameters", exact(tensor.parameters)],
    ["Size", `${sizeText(tensor.nbytes)} (${exact(tensor.nbytes)} bytes)`],
    ["Share", shareText(tensor.nbytes, everything.nbytes)],
    ...placeRows(tensor, data.sides[0].files),
  ];
  const parts = [element("p", { class: "subject" }, nameElement(tensor.name, "full")), facts(rows)];
  if (hasStatistics) parts.push(...statisticsDetails(tensor));
  return parts;
}

function statisticsDetails({ statistics, parameters }) {
  const heading = element("h3", {}, "Values");
  if (!statistics) return [heading, element("p", { class: "muted" }, "This dtype has no statistics.")];
  const counts = [
    ["Zeros", statistics.zeros],
    ["NaN", statistics.nans],
    ["Inf", statistics.infs],
  ];
  const pairs = facts([
    ["Min", valueText(statistics.minimum)],
    ["Max", valueText(statistics.maximum)],
    ["Mean", valueText(statistics.mean)],
    ["Std", valueText(statistics.std)],
  ]);
  pairs.classList.add("pairs");
  const rows = counts.map(([title, count]) => {
    const text = count ? `${exact(count)} (${shareText(count, parameters)})` : "0";
    return [title, count && title !== "Zeros" ? element("strong", { class: "alarm" }, `⚠ ${text}`) : text];
  });
  return [heading, pairs, facts(rows), ...(statistics.histogram ? [histogram(statistics.histogram)] : [])];
}

function drawing(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Draws how many values lie in each of several ranges of equal width.
function histogram([first, step, counts]) {
  const [begin, width] = [Number(first), Number(step)];
  const most = Math.max(...counts, 1);
  const fullest = counts.indexOf(most);
  const [from, to] = [valueText(begin), valueText(begin + width * counts.length)];
  const middle = valueText(begin + width * (fullest + 0.5));
  const text = `Histogram from ${from} to ${to}: the fullest of ${counts.length} ranges, at ${middle}, has ${exact(most)} values.`;
  const svg = drawing("svg", { viewBox: `0 0 ${counts.length} 40`, preserveAspectRatio: "none", role: "img", "aria-label": text });
  counts.forEach((count, position) => {
    // What is not empty can be seen.
    const height = count === 0 ? 0 : Math.max((38 * count) / most, 0.7);
    if (height > 0) svg.append(drawing("rect", { x: position, y: 40 - height, width: 0.9, height }));
  });
  const axis = element("div", { class: "axis", "aria-hidden": "true" }, element("span", {}, from), counts.length > 1 ? element("span", {}, to) : null);
  return element("figure", { class: "histogram" }, svg, axis);
}

function differenceDetails(tensor) {
  const { change, sides } = tensor;
  const several = data.sides.some((side) => side.files.length > 1);
  const cell = (text) => element("td", {}, text);
  const row = (title, describe) =>
    element("tr", {}, element("th", { scope: "row" }, title), ...sides.map((side, at) => cell(side ? describe(side, at) : "–")));
  const head = ["", "Left", "Right"].map((title) => element("th", { scope: "col" }, title));
  const table = element(
    "table",
    { class: "sides" },
    element("thead", {}, element("tr", {}, ...head)),
    element(
      "tbody",
      {},
      row("Dtype", (side) => side.dtype),
      row("Shape", (side) => side.shape),
      row("Size", (side) => sizeText(side.nbytes)),
      ...(several ? [row("File", (side, at) => nameElement(data.sides[at].files[side.file][0]))] : []),
      row("Offset", (side) => exact(side.begin)),
    ),
  );
  const rows = [["Status", swatch(fillOf(tensor)), `${change.status.mark} ${change.status.title}`]];
  if (change.status.key === "values") {
    const share = shareText(change.differing, tensor.parameters);
    rows.push(["Differing", `${exact(change.differing)} of ${exact(tensor.parameters)} (${share})`]);
    rows.push(["Largest", valueText(change.most)]);
    rows.push(["Relative", valueText(change.relative)]);
    if (change.nans) rows.push(["NaN in", element("strong", { class: "alarm" }, `⚠ ${exact(change.nans)}`)]);
  }
  return [element("p", { class: "subject" }, nameElement(tensor.name, "full")), facts(rows), table];
}

// What the details are about. They are not drawn again for a search: screen readers would read them each time.
let described = null;

function drawDetails() {
  const { selected, node } = state;
  if (described === (selected ?? node)) return;
  described = selected ?? node;
  byId("details-title").textContent = selected ? "Selected tensor" : node.parent ? "Module" : "Checkpoint";
  byId("deselect").hidden = !selected;
  const parts = !selected ? moduleDetails(node) : isDiff ? differenceDetails(selected) : tensorDetails(selected);
  byId("details").replaceChildren(...parts);
}
