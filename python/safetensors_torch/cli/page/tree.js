// The modules that the names of tensors form, split at their dots, and how they share a rectangle.

const NO_CHILDREN = [];

// Deeper parts of a name stay together, so that a hostile one cannot exhaust the stack.
const MOST_LEVELS = 32;

function moduleNode(label, path, parent) {
  const sums = { count: 0, parameters: 0, nbytes: 0, flagged: 0, first: Infinity };
  return { label, path, parent, tensor: null, children: [], byLabel: new Map(), ...sums };
}

function splitName(name) {
  const parts = name.split(".");
  return parts.length <= MOST_LEVELS
    ? parts
    : [...parts.slice(0, MOST_LEVELS - 1), parts.slice(MOST_LEVELS - 1).join(".")];
}

function addTensor(root, tensor) {
  const parts = splitName(tensor.name);
  const last = parts.pop();
  let [node, length] = [root, 0];
  for (const part of parts) {
    let child = node.byLabel.get(part);
    length += part.length + 1;
    if (!child) {
      child = moduleNode(part, tensor.name.slice(0, length - 1), node);
      node.byLabel.set(part, child);
      node.children.push(child);
    }
    node = child;
  }
  const { parameters, nbytes } = tensor;
  const flagged = tensor.flagged ? 1 : 0;
  tensor.leaf = { label: last, path: tensor.name, parent: node, tensor, children: NO_CHILDREN, count: 1, parameters, nbytes, flagged };
  node.children.push(tensor.leaf);
}

// Sums up the children of `node`, sorts them by size, and merges modules that have one child only.
function finish(node) {
  node.children = node.children.map((child) => {
    if (child.tensor) return child;
    finish(child);
    if (child.children.length > 1) return child;
    const [only] = child.children;
    only.label = `${child.label}.${only.label}`;
    only.parent = node;
    return only;
  });
  node.byLabel = null;
  for (const child of node.children) {
    node.count += child.count;
    node.parameters += child.parameters;
    node.nbytes += child.nbytes;
    node.flagged += child.flagged;
    node.first = Math.min(node.first, firstIndex(child));
  }
  // Equal sizes keep the order of the names.
  node.children.sort((a, b) => b.nbytes - a.nbytes);
}

function buildTree() {
  const root = moduleNode(data.title, "", null);
  for (const tensor of tensors) addTensor(root, tensor);
  finish(root);
  return root;
}

// Returns the nodes from the root to `node`.
function lineOf(node) {
  const line = [];
  for (let at = node; at; at = at.parent) line.unshift(at);
  return line;
}

// Returns the tensors below `node`, in the order of their names.
function tensorsBelow(node) {
  if (!node.parent) return tensors;
  const found = [];
  const visit = (at) => (at.tensor ? found.push(at.tensor) : at.children.forEach(visit));
  visit(node);
  return found.sort((a, b) => a.index - b.index);
}

// Divides a rectangle among nodes, the largest first, so that theirs are as square as possible: a squarified treemap.
function squarify(nodes, x, y, width, height, place) {
  let rest = nodes.reduce((sum, node) => sum + node.nbytes, 0);
  let start = 0;
  while (start < nodes.length) {
    const side = Math.min(width, height);
    const scale = (width * height) / rest;
    let [end, row, worst] = [start, 0, Infinity];
    while (end < nodes.length) {
      const grown = row + nodes[end].nbytes;
      const ratio = worstRatio(nodes[start].nbytes * scale, nodes[end].nbytes * scale, grown * scale, side);
      if (ratio > worst) break;
      [row, worst, end] = [grown, ratio, end + 1];
    }
    const breadth = (row * scale) / side;
    let along = 0;
    for (; start < end; start += 1) {
      const length = (nodes[start].nbytes / row) * side;
      if (width >= height) place(nodes[start], x, y + along, breadth, length);
      else place(nodes[start], x + along, y, length, breadth);
      along += length;
    }
    if (width >= height) [x, width] = [x + breadth, width - breadth];
    else [y, height] = [y + breadth, height - breadth];
    rest -= row;
  }
}

// Divides a rectangle among nodes of similar sizes, such as layers, in rows: they keep the order of their names.
function inRows(nodes, x, y, width, height, place) {
  const total = nodes.reduce((sum, node) => sum + node.nbytes, 0);
  const across = Math.min(Math.max(Math.round(Math.sqrt((nodes.length * width) / height)), 1), nodes.length);
  const count = Math.ceil(nodes.length / across);
  for (let number = 0; number < count; number += 1) {
    const begin = Math.floor((number * nodes.length) / count);
    const row = nodes.slice(begin, Math.floor(((number + 1) * nodes.length) / count));
    const sum = row.reduce((bytes, node) => bytes + node.nbytes, 0);
    const breadth = (height * sum) / total;
    let along = x;
    for (const node of row) {
      const length = (width * node.nbytes) / sum;
      place(node, along, y, length, breadth);
      along += length;
    }
    y += breadth;
  }
}

// Divides a rectangle among the children of a node, by their bytes. Calls `place` with each child and its rectangle.
function divide(node, x, y, width, height, place) {
  const nodes = node.children.filter((child) => child.nbytes > 0);
  if (nodes.length === 0) return;
  const similar = nodes.length > 2 && nodes[0].nbytes <= 1.5 * nodes[nodes.length - 1].nbytes;
  if (!similar) squarify(nodes, x, y, width, height, place);
  else inRows(nodes.sort((a, b) => firstIndex(a) - firstIndex(b)), x, y, width, height, place);
}

function firstIndex(node) {
  return node.tensor ? node.tensor.index : node.first;
}

// Returns the largest ratio of sides in a row whose largest, smallest and total areas are given.
function worstRatio(largest, smallest, total, side) {
  const square = side * side;
  return Math.max((square * largest) / (total * total), (total * total) / (square * smallest));
}
