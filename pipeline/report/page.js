"use strict";
// The page's own script: tables that sort, figures that are drawn from the data in the page. No request is made.

const report = JSON.parse(document.getElementById("report").textContent);

/** {columns: ["run", "step"], rows: [["a", 1]]} -> [{run: "a", step: 1}]; what a row lacks is null, and left out */
const unpacked = ({ columns, rows }) =>
  rows.map((row) => Object.fromEntries(row.map((value, at) => [columns[at], value]).filter(([, value]) => value !== null)));
const data = Object.fromEntries(Object.entries(report.data).map(([name, table]) => [name, unpacked(table)]));

const hidden = new Set(); // runs whose curves are not drawn
const views = new Map(); // figure's name -> what vegaEmbed gave for it

/** A figure's specification as its controls have it now. */
function specified(figure) {
  const spec = structuredClone(figure.spec);
  const chosen = (name) => document.querySelector(`[data-group="${figure.group}"] [name="${name}"]`);
  const { x, y, color } = spec.encoding;
  const axis = document.querySelector(`[data-group="${figure.group}"] [name="x"]:checked`);
  if (axis) Object.assign(x, { field: axis.value, title: axis.dataset.title });
  if (figure.logs && chosen("log")?.checked) y.scale = { type: "log" };
  const measure = chosen("y");
  if (measure) Object.assign(y, { field: measure.value, title: measure.selectedOptions[0].dataset.title });
  const by = chosen("color");
  if (by) spec.encoding.color = by.value === "" || by.value === x.field ? { value: report.colours[0] } : report.by[by.value];
  const name = spec.data.name;
  const rows = data[name].filter((row) => !hidden.has(row.run));
  return { ...spec, data: { values: rows }, width: "container", height: "container", autosize: { type: "fit", contains: "padding" }, config: report.theme };
}

async function draw(figure) {
  views.get(figure.name)?.finalize();
  const options = { actions: false, renderer: "svg" };
  views.set(figure.name, await vegaEmbed(document.getElementById(figure.name), specified(figure), options));
}

const drawAll = (group) => Promise.all(report.figures.filter((figure) => group === undefined || figure.group === group).map(draw));

for (const controls of document.querySelectorAll(".controls"))
  controls.addEventListener("change", () => drawAll(controls.dataset.group));

for (const chip of document.querySelectorAll(".chip"))
  chip.addEventListener("click", () => {
    const shown = chip.getAttribute("aria-pressed") === "true";
    if (shown) hidden.add(chip.dataset.run);
    else hidden.delete(chip.dataset.run);
    for (const twin of document.querySelectorAll(".chip"))
      if (twin.dataset.run === chip.dataset.run) twin.setAttribute("aria-pressed", String(!shown));
    drawAll("curves");
    drawAll("live");
  });

/** Numbers before words, what is missing last, whichever way round. */
function compared(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const [x, y] = [Number(a), Number(b)];
  if (!Number.isNaN(x) && !Number.isNaN(y)) return sign * (x - y);
  if (Number.isNaN(x) !== Number.isNaN(y)) return sign * (Number.isNaN(x) - Number.isNaN(y));
  return sign * a.localeCompare(b, undefined, { numeric: true });
}

for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const [at, sign] = [head.cellIndex, order === "ascending" ? 1 : -1];
    const body = head.closest("table").tBodies[0];
    const rows = [...body.rows];
    rows.sort((a, b) => compared(a.cells[at].dataset.value, b.cells[at].dataset.value, sign));
    body.append(...rows);
  });

window.drawn = drawAll().then(() => true);
