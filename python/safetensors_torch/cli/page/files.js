// The layout of each file: its header, its tensors in order, gaps between them, and their alignment.

const MOST_FILES = 50;

// Returns the tensors of each file of a side, in the order of their data, with what lies between them.
function layoutsOf(side, at) {
  const layouts = side.files.map(([name, nbytes]) => ({ name, nbytes, tensors: [], gaps: 0, alignment: 4096, unaligned: 0 }));
  for (const tensor of tensors) {
    const place = placeOf(tensor, at);
    if (place) layouts[place.file].tensors.push({ tensor, begin: place.begin, end: place.begin + place.nbytes, place });
  }
  for (const layout of layouts) finishLayout(layout);
  return layouts;
}

function finishLayout(layout) {
  layout.tensors.sort((a, b) => a.begin - b.begin || a.end - b.end);
  layout.header = layout.tensors[0]?.begin ?? layout.nbytes;
  let end = layout.header;
  for (const one of layout.tensors) {
    layout.gaps += Math.max(one.begin - end, 0);
    end = Math.max(end, one.end);
    if (one.end === one.begin) continue;
    layout.alignment = Math.min(layout.alignment, alignmentOf(one.begin));
    const width = one.place.nbytes / one.place.parameters;
    if (width > 1 && one.begin % width !== 0) layout.unaligned += 1;
  }
  layout.gaps += Math.max(layout.nbytes - end, 0);
}

function layoutFacts(layout) {
  const parts = [sizeText(layout.nbytes), counted(layout.tensors.length, "tensor"), `header ${sizeText(layout.header)}`];
  parts.push(layout.gaps ? `${sizeText(layout.gaps)} in gaps` : "no gaps");
  if (layout.tensors.length) {
    parts.push(layout.unaligned
      ? `⚠ ${counted(layout.unaligned, "tensor")} not aligned to ${layout.unaligned === 1 ? "its" : "their"} dtype`
      : `offsets aligned to ${counted(layout.alignment, "byte")}`);
  }
  return parts;
}

// Draws a file as a strip: the header, then each tensor.
function drawStrip(canvas, layout) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (width === 0) return;
  const density = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  context.fillStyle = palette.get("ground");
  context.fillRect(0, 0, width, height);
  const scale = width / Math.max(layout.nbytes, 1);
  context.fillStyle = palette.get("frame-text");
  context.fillRect(0, 0, Math.max(layout.header * scale, 1.5), height);
  for (const { tensor, begin, end } of layout.tensors) {
    if (begin === end) continue;
    const gap = (end - begin) * scale > 3 ? 0.5 : 0;
    context.globalAlpha = isMatching(tensor) ? 1 : 0.2;
    context.fillStyle = palette.get(fillOf(tensor));
    context.fillRect(begin * scale + gap, 0, Math.max((end - begin) * scale - 2 * gap, 0.5), height);
  }
  context.globalAlpha = 1;
  const chosen = layout.tensors.find(({ tensor }) => tensor === state.selected);
  if (!chosen) return;
  context.strokeStyle = palette.get("line");
  context.lineWidth = 3;
  context.strokeRect(chosen.begin * scale - 1, 1.5, Math.max((chosen.end - chosen.begin) * scale + 2, 4), height - 3);
}

function fileElement(layout) {
  const text = layoutFacts(layout).join(" · ");
  const canvas = element("canvas", { class: "strip", role: "img", "aria-label": `Layout of ${nameText(layout.name)}: ${text}` });
  canvas.addEventListener("click", (event) => {
    const at = (event.offsetX / canvas.clientWidth) * layout.nbytes;
    const hit = layout.tensors.find(({ begin, end }) => at >= begin && at < end);
    if (hit) select(hit.tensor);
  });
  return [canvas, element("li", { class: "file" }, element("h3", {}, nameElement(layout.name)), element("p", { class: "muted" }, text), canvas)];
}

let strips = [];
let filesDrawn = false;

// Draws the files when they are shown for the first time.
function drawFiles() {
  if (filesDrawn) return;
  filesDrawn = true;
  const panel = byId("panel-files");
  strips = [];
  const order = () => {
    sortBy(data.sides[0].files.length > 1 ? "file" : "offset");
    openTab("tensors");
  };
  const parts = isDiff ? [] : [element("button", { type: "button", class: "button small", click: order }, "List tensors in file order")];
  data.sides.forEach((side, at) => {
    if (isDiff) parts.push(element("h3", { class: "side-title" }, at === 0 ? "Left: " : "Right: ", nameElement(side.path)));
    const layouts = layoutsOf(side, at);
    const list = element("ul", { class: "files" });
    const add = (some) => {
      for (const layout of some) {
        const [canvas, item] = fileElement(layout);
        strips.push([canvas, layout]);
        list.append(item);
      }
    };
    add(layouts.slice(0, MOST_FILES));
    parts.push(list);
    if (layouts.length > MOST_FILES) {
      const more = (event) => {
        event.target.remove();
        add(layouts.slice(MOST_FILES));
        drawStrips();
      };
      parts.push(element("button", { type: "button", class: "button small", click: more }, `Show all ${exact(layouts.length)} files`));
    }
  });
  panel.replaceChildren(...parts);
  new ResizeObserver(drawStrips).observe(panel);
}

function drawStrips() {
  for (const [canvas, layout] of strips) drawStrip(canvas, layout);
}
