// What the page shows, which its parts draw: a module, a selected tensor, and the tensors that match the search.

const root = buildTree();

const state = {
  node: root,
  selected: null,
  query: "",
  // The groups, by title, to which the tensors are restricted; none if it is empty.
  groups: new Set(),
  flaggedOnly: false,
  sort: { key: "name", descending: false },
  columns: "storage",
};

// The tensors of the module, and those of them that match. match() fills these.
let below = tensors;
let matched = tensors;
// The same as a set, or null if all match.
let matching = null;

// Returns a test of names: all words of the query are part of the name, in which * stands for any characters.
function nameTest(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const tests = words.map((word) => {
    if (!word.includes("*")) return (name) => name.includes(word);
    const parts = word.split("*");
    return (name) => {
      let at = 0;
      for (const part of parts) {
        const found = name.indexOf(part, at);
        if (found < 0) return false;
        at = found + part.length;
      }
      return true;
    };
  });
  return (name) => tests.every((test) => test(name));
}

function isFiltered() {
  return state.query.trim() !== "" || state.groups.size > 0 || state.flaggedOnly;
}

// Returns those of `list` that match the search and the chosen groups.
function matchesOf(list) {
  if (!isFiltered()) return list;
  const test = nameTest(state.query);
  return list.filter(
    (tensor) =>
      (state.groups.size === 0 || state.groups.has(tensor.group)) &&
      (!state.flaggedOnly || tensor.flagged) &&
      test(tensor.name.toLowerCase()),
  );
}

function match() {
  below = tensorsBelow(state.node);
  matched = matchesOf(below);
  matching = isFiltered() ? new Set(matched) : null;
}

function isMatching(tensor) {
  return matching === null || matching.has(tensor);
}

function isInside(tensor, node) {
  for (let at = tensor.leaf; at; at = at.parent) if (at === node) return true;
  return false;
}
