// The columns of the table: how each is called, written and sorted.

// Compares names as people do: layer.2 comes before layer.10. The page's data has the names in this order.
const byName = (a, b) => a.index - b.index;
const byNumber = (value) => (a, b) => value(a) - value(b) || byName(a, b);
const byText = (value) => (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : byName(a, b));

// Returns a number for sorting: what is absent comes first, infinite values are in their places.
function sortable(value) {
  if (value === null || value === undefined) return -Number.MAX_VALUE;
  const number = Number(value);
  return Number.isFinite(number) ? number : number > 0 ? Number.MAX_VALUE : -Number.MAX_VALUE;
}

// A column of texts: as wide, in characters, as the longest of them or `most`.
function column(key, title, text, compare, most) {
  let width = 0;
  const measure = () => {
    if (width === 0) width = tensors.reduce((longest, tensor) => Math.max(longest, text(tensor).length + 2), title.length + 2);
    return Math.min(width, most);
  };
  return { key, title, text, narrow: text, compare, numeric: false, width: measure };
}

// A column of numbers, of which the longest has `most` characters; without it, the longest is the largest.
function numeric(key, title, value, text, most) {
  const show = (tensor) => {
    const found = value(tensor);
    return found === null || found === undefined ? "–" : text(found);
  };
  let width = most ?? 0;
  const measure = () => {
    if (width === 0) width = text(tensors.reduce((largest, tensor) => Math.max(largest, value(tensor) ?? 0), 0)).length;
    return Math.max(width, title.length + 2);
  };
  const compare = byNumber((tensor) => sortable(value(tensor)));
  return { key, title, text: show, narrow: show, compare, numeric: true, width: measure };
}

const kindText = (side) => (side ? `${side.dtype} ${side.shape}` : "–");
const NAME = column("name", "Name", (tensor) => nameText(tensor.name), byName, 0);
const DTYPE = column("dtype", "Dtype", (tensor) => tensor.dtype, byText((tensor) => tensor.dtype), 12);
const SHAPE = column("shape", "Shape", (tensor) => tensor.shape, byNumber((tensor) => tensor.shape.split(",").length), 26);
const PARAMETERS = numeric("parameters", "Parameters", (tensor) => tensor.parameters, exact);
const SIZE = numeric("size", "Size", (tensor) => tensor.nbytes, sizeText, 10);
const fileName = (tensor) => data.sides[0].files[tensor.file][0];
const FILE = column("file", "File", (tensor) => nameText(fileName(tensor)), (a, b) => a.file - b.file || a.begin - b.begin, 34);
const OFFSET = numeric("offset", "Offset", (tensor) => tensor.begin, exact);

// A narrow table has no head: its numbers say what they are.
function titled(column) {
  return { ...column, narrow: (tensor) => `${column.title} ${column.text(tensor)}` };
}

const statistic = (key, title) => titled(numeric(key, title, (tensor) => tensor.statistics?.[key], valueText, 11));
const count = (key, title) => {
  const mark = key === "zeros" ? "" : "⚠ ";
  return titled(numeric(key, title, (tensor) => tensor.statistics?.[key], (value) => (value ? mark + exact(value) : "0")));
};
const VALUES = [
  statistic("minimum", "Min"),
  statistic("maximum", "Max"),
  statistic("mean", "Mean"),
  statistic("std", "Std"),
  count("zeros", "Zeros"),
  count("nans", "NaN"),
  count("infs", "Inf"),
];

const change = (key, title, text, most) => numeric(key, title, (tensor) => tensor.change[key], text, most);
const statusText = (tensor) => `${tensor.change.status.mark} ${tensor.change.status.title}`;
const STATUS = column("status", "Status", statusText, byNumber((tensor) => STATUSES.indexOf(tensor.change.status)), 20);
const LEFT = column("left", "Left", (tensor) => kindText(tensor.sides[0]), byText((tensor) => kindText(tensor.sides[0])), 26);
const RIGHT = column("right", "Right", (tensor) => kindText(tensor.sides[1]), byText((tensor) => kindText(tensor.sides[1])), 26);
const RELATIVE = {
  ...change("relative", "Relative", valueText, 11),
  narrow: ({ change: { relative } }) => (typeof relative === "number" ? `Δ ${valueText(relative, 3)}` : ""),
};
const DIFFERENCE = [
  STATUS,
  LEFT,
  RIGHT,
  change("differing", "Differing", exact),
  change("most", "Largest", valueText, 11),
  RELATIVE,
  SIZE,
];

// Columns of which only those that a narrow screen has room for are shown there, under the name.
const NARROW = new Set(["name", "dtype", "shape", "size", "status", "relative", "minimum", "maximum", "nans"]);

// Returns the columns that the table has now.
function columnsNow() {
  const narrow = byId("table").clientWidth < 700;
  const several = data.sides[0].files.length > 1;
  let columns = [NAME, DTYPE, SHAPE, PARAMETERS, SIZE, ...(several ? [FILE] : []), OFFSET];
  if (isDiff) columns = [NAME, ...DIFFERENCE];
  else if (state.columns === "values") columns = [NAME, DTYPE, SHAPE, ...VALUES];
  if (!narrow) return columns;
  const values = state.columns === "values" && !isDiff;
  return columns.filter(({ key }) => NARROW.has(key) && !(values && (key === "dtype" || key === "shape")));
}

// Returns every column by which the tensors can be sorted.
function allColumns() {
  if (isDiff) return [NAME, ...DIFFERENCE];
  return [NAME, DTYPE, SHAPE, PARAMETERS, SIZE, FILE, OFFSET, ...(hasStatistics ? VALUES : [])];
}
