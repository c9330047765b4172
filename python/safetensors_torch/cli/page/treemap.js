// Draws the module that the page shows as a treemap, on a canvas, and finds what is at a point of it. Only what is large
// enough to be seen is drawn.

const HEADER = 19;
const PADDING = 2;
const LEAST_SIDE = 1;
// What is left of a shortened label has as many characters.
const LEAST_LABEL = 7;
// A module has a title if it is as large as this.
const TITLED = [60, 58];

class Treemap {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    // What is drawn: rectangles of nodes, each after those that it lies in.
    this.cells = [];
    // The cells of the children of the module.
    this.tops = [];
    this.dimmed = () => false;
  }

  // Draws `node`. `dimmed` says which tensors the search leaves out.
  draw(node, dimmed) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const density = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * density);
    this.canvas.height = Math.round(height * density);
    this.context.setTransform(density, 0, 0, density, 0, 0);
    this.context.direction = "ltr";
    this.context.fillStyle = palette.get("ground");
    this.context.fillRect(0, 0, width, height);
    this.cells = [];
    this.tops = [];
    this.dimmed = dimmed;
    this.children(node, 0, 0, width, height, null, 0, "");
    if (node.nbytes === 0) this.label("no bytes to draw", 12, 24, width - 24, palette.get("frame-text"));
  }

  // `untitled` are the labels of the modules around `node` that have no title.
  children(node, x, y, width, height, top, level, untitled) {
    divide(node, x, y, width, height, (child, left, upper, w, h) => {
      if (w < LEAST_SIDE || h < LEAST_SIDE) {
        this.speck(child, left, upper, w, h);
        return;
      }
      const cell = { node: child, x: left, y: upper, width: w, height: h, top: null };
      cell.top = top ?? cell;
      this.cells.push(cell);
      if (!top) this.tops.push(cell);
      if (child.tensor) this.leaf(cell, untitled);
      else this.module(cell, level, untitled);
    });
  }

  // Draws what is too small for a cell in the colour of its largest tensor.
  speck(node, x, y, width, height) {
    let largest = node;
    while (!largest.tensor) [largest] = largest.children;
    this.context.globalAlpha = this.dimmed(largest.tensor) ? 0.18 : 1;
    this.context.fillStyle = palette.get(fillOf(largest.tensor));
    this.context.fillRect(x, y, width, height);
    this.context.globalAlpha = 1;
  }

  module(cell, level, untitled) {
    const { node, x, y, width, height } = cell;
    const { context } = this;
    context.fillStyle = palette.get(`frame-${Math.min(level, 3)}`);
    context.fillRect(x + 0.5, y + 0.5, Math.max(width - 1, 0.5), Math.max(height - 1, 0.5));
    const named = width >= TITLED[0] && height >= TITLED[1] && this.title(node, untitled, x + 6, y, width - 12);
    const padding = width >= 12 && height >= 12 ? PADDING : 0.5;
    const above = named ? HEADER : padding;
    const inner = [x + padding, y + above, width - 2 * padding, height - above - padding];
    const prefix = named ? "" : `${untitled}${node.label}.`;
    if (inner[2] > 0 && inner[3] > 0) this.children(node, ...inner, cell.top, level + 1, prefix);
  }

  // Draws the title of a module. Returns whether there is room for it.
  title(node, untitled, x, y, width) {
    this.font(600, 12);
    const name = this.name(node, untitled, node.flagged ? "⚠ " : "", width);
    if (name.length < 3 && name !== nameText(node.label)) return false;
    const used = this.context.measureText(name).width;
    this.label(name, x, y + 14, width, palette.get("frame-text"));
    this.font(400, 11);
    const size = sizeText(node.nbytes);
    if (used + this.context.measureText(size).width + 12 > width) return true;
    this.context.textAlign = "right";
    this.label(size, x + width, y + 14, width, palette.get("frame-text"));
    this.context.textAlign = "left";
    return true;
  }

  // Returns the label of a node: with those of the modules around it that have no title, or only theirs if there is no
  // room, or what fits of them.
  name(node, untitled, mark, width) {
    const around = untitled.slice(0, -1);
    const labels = untitled ? [untitled + node.label, around, around.slice(around.lastIndexOf(".") + 1)] : [node.label];
    const texts = labels.map((label) => mark + nameText(label));
    const fitting = texts.find((text) => text.length < 200 && this.context.measureText(text).width <= width);
    if (fitting) return fitting;
    const shown = fit(texts[texts.length - 1], width, this.context);
    return shown.length >= LEAST_LABEL ? shown : mark;
  }

  leaf(cell, untitled) {
    const { x, y, width, height, node } = cell;
    const { context } = this;
    const dimmed = this.dimmed(node.tensor);
    const gap = width > 6 && height > 6 ? 0.5 : 0;
    context.globalAlpha = dimmed ? 0.18 : 1;
    context.fillStyle = palette.get(fillOf(node.tensor));
    context.fillRect(x + gap, y + gap, width - 2 * gap, height - 2 * gap);
    context.globalAlpha = 1;
    if (node.tensor.flagged) this.alarm(cell);
    if (dimmed || width < 30 || height < 18) return;
    const color = palette.get("on-fill");
    const mark = this.mark(node.tensor);
    this.font(500, 12);
    const name = this.name(node, untitled, mark, width - 10);
    this.label(name, x + 5, y + 15, width - 10, color);
    if (height < 34 || name === mark) return;
    this.font(400, 11);
    const kind = `${node.tensor.dtype} ${node.tensor.shape}`;
    const lines = height >= 50 ? [kind, sizeText(node.nbytes)] : [sizeText(node.nbytes)];
    const short = lines.filter((line) => context.measureText(line).width <= width - 10);
    short.forEach((line, index) => this.label(line, x + 5, y + 30 + 14 * index, width - 10, color));
  }

  mark(tensor) {
    if (tensor.flagged) return "⚠ ";
    return tensor.change && tensor.change.status.key !== "equal" ? `${tensor.change.status.mark} ` : "";
  }

  // Marks a tensor with NaN or infinite values: a frame and, if there is room, a triangle.
  alarm({ x, y, width, height }) {
    const { context } = this;
    context.strokeStyle = palette.get("alarm");
    context.lineWidth = 2;
    if (width > 5 && height > 5) context.strokeRect(x + 2, y + 2, width - 4, height - 4);
    const side = Math.min(12, width, height);
    context.fillStyle = palette.get("alarm");
    context.beginPath();
    context.moveTo(x + width, y);
    context.lineTo(x + width, y + side);
    context.lineTo(x + width - side, y);
    context.fill();
  }

  font(weight, size) {
    this.context.font = `${weight} ${size}px ${palette.get("sans")}`;
  }

  label(text, x, y, width, color) {
    if (width <= 0) return;
    this.context.fillStyle = color;
    this.context.fillText(text, x, y);
  }

  // Returns whether the canvas has the size for which it was drawn.
  fits() {
    const density = window.devicePixelRatio || 1;
    return this.canvas.width === Math.round(this.canvas.clientWidth * density) && this.canvas.height === Math.round(this.canvas.clientHeight * density);
  }

  // Returns the innermost cell at a point, or null.
  at(x, y) {
    const inside = (cell) => x >= cell.x && x < cell.x + cell.width && y >= cell.y && y < cell.y + cell.height;
    return this.cells.findLast(inside) ?? null;
  }

  // Returns the cell of `node`, or of the innermost module around it that is drawn.
  cellOf(node) {
    const line = new Set(lineOf(node));
    return this.cells.findLast((cell) => line.has(cell.node)) ?? null;
  }

  // Returns the cell of a child of the module that lies next to `from` in a direction, or null.
  next(from, dx, dy) {
    const center = (cell) => [cell.x + cell.width / 2, cell.y + cell.height / 2];
    const [x, y] = center(from);
    let [best, least] = [null, Infinity];
    for (const cell of this.tops) {
      const [cx, cy] = center(cell);
      const ahead = (cx - x) * dx + (cy - y) * dy;
      const aside = Math.abs(dx ? cy - y : cx - x);
      if (cell === from || ahead <= 0.5 || ahead + 2 * aside >= least) continue;
      [best, least] = [cell, ahead + 2 * aside];
    }
    return best;
  }
}
