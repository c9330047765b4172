// The tensors of the page: its JSON, which has a list for each column, as objects.

const data = JSON.parse(byId("data").textContent);
const isDiff = data.changes !== null;
const hasStatistics = data.statistics !== null;

const dtypes = data.dtypes.map(printable);

// The states of a tensor in a comparison, by their number in the JSON.
const STATUSES = [
  { key: "equal", title: "equal", mark: "=" },
  { key: "values", title: "values differ", mark: "≠" },
  { key: "kind", title: "dtype or shape", mark: "↔" },
  { key: "left", title: "only left", mark: "−" },
  { key: "right", title: "only right", mark: "+" },
  { key: "same", title: "not compared", mark: "?" },
];

function sideOf(side, index) {
  if (side.dtype[index] < 0) return null;
  const [shape, parameters] = data.shapes[side.shape[index]];
  const dtype = dtypes[side.dtype[index]];
  const file = side.file[index];
  return { dtype, shape, parameters, nbytes: side.nbytes[index], file, begin: side.begin[index] };
}

function statisticsOf(row) {
  if (!row) return null;
  const [zeros, nans, infs, minimum, maximum, mean, std, histogram] = row;
  return { zeros, nans, infs, minimum, maximum, mean, std, histogram };
}

function changeOf(row) {
  const [status, differing, nans, most, relative] = row;
  return { status: STATUSES[status], differing, nans, most, relative };
}

function tensorOf(name, index) {
  const left = sideOf(data.sides[0], index);
  const right = isDiff ? sideOf(data.sides[1], index) : null;
  const { dtype, shape, file, begin } = left ?? right;
  const parameters = Math.max(left?.parameters ?? 0, right?.parameters ?? 0);
  const nbytes = Math.max(left?.nbytes ?? 0, right?.nbytes ?? 0);
  const statistics = hasStatistics ? statisticsOf(data.statistics[index]) : null;
  const flagged = statistics !== null && statistics.nans + statistics.infs > 0;
  const change = isDiff ? changeOf(data.changes[index]) : null;
  const group = isDiff ? change.status.title : dtype;
  const sides = isDiff ? [left, right] : null;
  return { index, name, sides, dtype, shape, file, begin, parameters, nbytes, statistics, flagged, change, group, leaf: null };
}

const tensors = data.names.map(tensorOf);

// Returns what a side has of a tensor, or null.
function placeOf(tensor, at) {
  return isDiff ? tensor.sides[at] : tensor;
}

// Returns the number, parameters and bytes of some tensors.
function totalOf(list) {
  const total = { count: 0, parameters: 0, nbytes: 0 };
  for (const tensor of list) {
    total.count += 1;
    total.parameters += tensor.parameters;
    total.nbytes += tensor.nbytes;
  }
  return total;
}

// Returns the tensors of each group: a dtype or, in a comparison, a status. The largest group comes first.
function groupsOf(list) {
  const groups = new Map();
  for (const tensor of list) {
    if (!groups.has(tensor.group)) groups.set(tensor.group, []);
    groups.get(tensor.group).push(tensor);
  }
  const found = Array.from(groups, ([title, members]) => ({ title, ...totalOf(members) }));
  if (isDiff) return STATUSES.flatMap((status) => found.filter((group) => group.title === status.title));
  return found.sort((a, b) => b.nbytes - a.nbytes || b.count - a.count);
}

const everything = totalOf(tensors);
const allGroups = groupsOf(tensors);
