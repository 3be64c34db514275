// The curves of all runs: panels that share their zoom, an x axis of steps, tokens or time, smoothing and marks.

const view = { axis: "steps", log: false, smooth: 0.6, marks: { attempt: true, save: true, rollback: true, skip: true }, range: null };
const KINDS = {
  attempt: ["attempts and layouts", 6, "triangle-right"], save: ["saves", 2, "line-ns-open"],
  rollback: ["rollbacks", 1, "triangle-left"], skip: ["steps not applied", 3, "x"],
};
const KIND_OF = { layout: "attempt", nonfinite: "skip" };
const PANELS = [
  ["loss", "Loss", "nats a token", /^loss$/], ["val", "Validation loss", "nats a token", /^val_loss/],
  ["grad", "Gradient norm", "before clipping", /^grad_norm$/], ["lr", "Learning rate", "", /^lr$/],
  ["step", "Step time", "s", /^step_time_s$/], ["speed", "Tokens a second", "", /^tokens_per_s$/],
  ["mfu", "MFU", "of the bf16 peak", /^mfu$/], ["flops", "Model TFLOP/s of a rank", "", /^tflops_per_gpu$/],
  ["memory", "Peak memory by stage", "GiB", /^memory_gib\//], ["router", "Router and prediction losses", "", /^(seq_|global_)?aux_loss$|^z_loss$|^mtp_loss$/],
  ["load", "Load of experts, largest over mean", "", /^expert_load_max_over_mean/], ["dead", "Dead experts", "", /^dead_experts$/],
  ["drop", "Tokens dropped", "share", /^expert_drop_fraction$/],
];
const NO_PANEL = /^tokens$/;

function sums(differences) {
  let total = 0;
  return differences.map((value) => (total += value));
}

// Steps back from their differences, and what places them on an axis. Done once for each document.
function unpack(run) {
  const curves = run.curves;
  if (curves.ready) return curves;
  curves.ready = true;
  curves.axis.steps = sums(curves.axis.steps);
  if (curves.middle) curves.middle = sums(curves.middle);
  curves.byName = new Map();
  for (const one of curves.curves) {
    one.x = sums(one.x);
    curves.byName.set(one.name, one);
  }
  return curves;
}

// Steps as places on the chosen axis; between two known steps on the straight line. Time: hours spent in steps.
function places(run, steps) {
  const axis = run.curves.axis;
  if (view.axis === "steps") return steps;
  const values = view.axis === "tokens" ? axis.tokens : axis.seconds;
  if (!values) return steps.map(() => null);
  const scale = view.axis === "tokens" ? 1 : 1 / 3600;
  let at = 0;
  return steps.map((step) => {
    while (at < axis.steps.length - 1 && axis.steps[at] < step) at++;
    while (at > 0 && axis.steps[at - 1] >= step) at--;
    const before = at ? [axis.steps[at - 1], values[at - 1]] : [0, 0], span = axis.steps[at] - before[0];
    return scale * (span > 0 ? before[1] + ((step - before[0]) / span) * (values[at] - before[1]) : values[at]);
  });
}

// An exponential mean without the pull of its start.
function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function panelsOf(runs) {
  const names = new Set(runs.flatMap((run) => [...unpack(run).byName.keys()]));
  const found = [], taken = new Set();
  for (const [key, title, unit, pattern] of PANELS) {
    const own = [...names].filter((name) => pattern.test(name));
    own.forEach((name) => taken.add(name));
    if (own.length) found.push({ key, title, unit, names: own });
  }
  for (const name of names) if (!taken.has(name) && !NO_PANEL.test(name)) found.push({ key: `other ${name}`, title: name, unit: "", names: [name] });
  return found;
}

const isSmoothed = (panel) => ["loss", "grad", "step", "speed", "mfu", "flops"].includes(panel.key) && view.smooth > 0;

function tracesOf(panel, runs) {
  const traces = [], several = runs.length > 1;
  runs.forEach((run, number) => panel.names.forEach((name, index) => {
    const one = run.curves.byName.get(name);
    if (!one) return;
    const paint = colour(several ? number : index);
    const label = plain(several ? (panel.names.length > 1 ? `${run.label} ${name}` : run.label) : name.split("/").pop().replace(/_/g, " "));
    const line = { color: paint, width: 1.4, dash: several && index ? ["dash", "dot", "dashdot"][(index - 1) % 3] : "solid" };
    const few = one.x.length < 60;
    const hover = (what) => `${what}%{y:.7~g}<br>step %{customdata:,}<extra></extra>`;
    const title = several || panel.names.length > 1 ? `<b>${label}</b> ` : "";
    traces.push({ x: places(run, one.x), y: one.y, customdata: one.x, name: label, type: "scatter", mode: few ? "lines+markers" : "lines", line,
      marker: { size: 4, color: paint }, opacity: isSmoothed(panel) ? 0.35 : 1, connectgaps: false, hovertemplate: hover(title), showlegend: !isSmoothed(panel) });
    if (!isSmoothed(panel)) return;
    const steps = one.mean ? run.curves.middle : one.x, means = smoothed(one.mean || one.y, view.smooth);
    traces.push({ x: places(run, steps), y: means, customdata: steps, name: label, type: "scatter", mode: "lines",
      line: { ...line, width: 2.2 }, hovertemplate: hover(`${title}smoothed `) });
  }));
  return traces.concat(marksOf(runs));
}

const kindOf = (mark) => KIND_OF[mark.kind] || mark.kind;
const allMarks = (run) => [...run.marks, ...run.curves.marks, ...run.life.saves.map((save) => ({ ...save, kind: "save" }))];

function marksOf(runs) {
  return Object.entries(KINDS).filter(([kind]) => view.marks[kind]).flatMap(([kind, [, index, symbol]]) => runs.map((run) => {
    const found = allMarks(run).filter((mark) => kindOf(mark) === kind).sort((one, other) => one.step - other.step);
    const several = runs.length > 1 ? `${plain(run.label)}: ` : "";
    return { x: places(run, found.map((mark) => mark.step)), y: found.map(() => 0.02), text: found.map((mark) => several + plain(mark.text)), yaxis: "y2",
      type: "scatter", mode: "markers", marker: { symbol, size: kind === "save" ? 8 : 9, color: colour(index), line: { width: 1.5, color: colour(index) } },
      hovertemplate: "%{text}<extra></extra>", showlegend: false, cliponaxis: false };
  }));
}

// Rare events stand out by a line through the panel.
function linesOf(runs) {
  return runs.flatMap((run) => allMarks(run).filter((mark) => kindOf(mark) !== "save" && view.marks[kindOf(mark)] && mark.step > 1).slice(-100).map((mark) => {
    const [x] = places(run, [mark.step]);
    return { type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { width: 1, dash: "dot", color: colour(KINDS[kindOf(mark)][1]) } };
  }));
}

function layoutOf(panel, runs) {
  const title = { steps: "step", tokens: "tokens", time: "hours in steps" }[view.axis];
  const canLog = view.log && !["mfu", "memory", "drop", "dead"].includes(panel.key);
  return {
    xaxis: { title: { text: title, standoff: 4 }, ...(view.range ? { range: [...view.range], autorange: false } : { autorange: true }) },
    yaxis: { type: canLog ? "log" : "linear", rangemode: ["mfu", "memory", "dead"].includes(panel.key) ? "tozero" : "normal", exponentformat: "e" },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true }, shapes: linesOf(runs),
    showlegend: runs.length > 1 || panel.names.length > 1, uirevision: "keep",
  };
}

function summaryOf(panel, runs) {
  const parts = runs.flatMap((run) => panel.names.slice(0, 4).flatMap((name) => {
    const one = run.curves.byName.get(name), values = one ? one.y.filter(isNumber) : [];
    if (!values.length) return [];
    const lowest = values.reduce((a, b) => Math.min(a, b)), highest = values.reduce((a, b) => Math.max(a, b));
    return [`${runs.length > 1 ? `${run.label} ` : ""}${clean(name)}: from ${short(values[0])} to ${short(run.curves.newest[name])}, lowest ${short(lowest)}, highest ${short(highest)}`];
  }));
  return `${panel.title} by step. ${parts.join("; ")}`;
}

function valuesOf(panel, runs) {
  const rows = runs.flatMap((run) => panel.names.flatMap((name) => {
    const one = run.curves.byName.get(name);
    if (!one) return [];
    const stride = Math.max(1, Math.ceil(one.x.length / 20));
    return one.x.map((step, at) => [at, step]).filter(([at]) => at % stride === 0 || at === one.x.length - 1)
      .map(([at, step]) => [runs.length > 1 ? `${run.label} ${name}` : name, String(step), short(one.y[at], 7)]);
  }));
  return table(["number", "step", "value"], rows, [1, 2]);
}

const panelBoxes = new Map();

function share(range) {
  view.range = range;
  for (const box of panelBoxes.values()) {
    const change = range ? { "xaxis.range": [...range], "xaxis.autorange": false } : { "xaxis.autorange": true, "yaxis.autorange": true };
    box.follows = true;
    Plotly.relayout(box, change).then(() => { box.follows = false; });
  }
  tell(range ? `x axis from ${short(range[0], 6)} to ${short(range[1], 6)}` : "x axis: all");
  setTimeout(() => tell(""), 2500);
}

function follow(box) {
  box.on("plotly_relayout", (change) => {
    if (box.follows) return;
    const from = change["xaxis.range[0]"], to = change["xaxis.range[1]"];
    if (isNumber(from) && isNumber(to)) share([from, to]);
    else if (change["xaxis.autorange"]) share(null);
  });
  box.on("plotly_click", (event) => {
    const point = event.points[0], run = DATA.runs[0];
    if (DATA.runs.length === 1 && point && isNumber(point.customdata)) tell(`Step ${point.customdata}. Its documents: phalanx data trace ${run.path} --step ${point.customdata}`);
  });
}

function current() {
  if (view.range) return view.range;
  const box = [...panelBoxes.values()][0];
  return box && box.layout.xaxis.range ? [...box.layout.xaxis.range] : [0, 1];
}

function controls() {
  const move = (left, right) => () => {
    const [from, to] = current(), span = to - from;
    share([from + left * span, to + right * span]);
  };
  const again = () => redrawPanels();
  const axis = el("select", { id: "axis", onchange: (event) => { view.axis = event.target.value; view.range = null; again(); } },
    [["steps", "steps"], ["tokens", "tokens"], ["time", "time in steps"]].map(([value, text]) => el("option", { value, selected: view.axis === value }, text)));
  return card(null, el("div", { class: "controls", role: "group", "aria-label": "Curves" },
    el("label", {}, "x axis", axis),
    el("label", {}, el("input", { type: "checkbox", id: "log", checked: view.log, onchange: (event) => { view.log = event.target.checked; again(); } }), "log y"),
    el("label", {}, "smoothing", el("input", { type: "range", id: "smooth", min: 0, max: 0.99, step: 0.01, value: view.smooth,
      onchange: (event) => { view.smooth = Number(event.target.value); again(); } })),
    el("span", { class: "controls", role: "group", "aria-label": "Zoom" },
      [["−", "Zoom out", move(-0.5, 0.5)], ["+", "Zoom in", move(0.25, -0.25)], ["←", "To the left", move(-0.25, -0.25)],
        ["→", "To the right", move(0.25, 0.25)], ["all", "Show all", () => share(null)]]
        .map(([text, label, onclick]) => el("button", { type: "button", "aria-label": label, title: label, onclick }, text))),
    Object.entries(KINDS).map(([kind, [text]]) => el("label", {},
      el("input", { type: "checkbox", checked: view.marks[kind], onchange: (event) => { view.marks[kind] = event.target.checked; again(); } }), text))));
}

function redrawPanels() {
  for (const box of panelBoxes.values()) {
    box.follows = true;
    box.draw().then(() => { box.follows = false; });
  }
}

function curvesSection(parent) {
  panelBoxes.clear();
  if (!DATA.runs.some((run) => run.curves.rows)) {
    parent.append(card(null, el("p", { class: "soft" }, "metrics.jsonl has no rows yet.")));
    return;
  }
  const grid = el("div", { class: "grid" });
  parent.append(controls(), grid);
  for (const panel of panelsOf(DATA.runs)) {
    const figure = card(panel.title + (panel.unit ? ` (${panel.unit})` : ""));
    grid.append(figure);
    const box = chart(figure, summaryOf(panel, DATA.runs), () => ({ traces: tracesOf(panel, DATA.runs), layout: layoutOf(panel, DATA.runs) }));
    panelBoxes.set(panel.key, box);
    box.panel = panel;
    box.drawn.then(() => follow(box));
    const values = el("details", { ontoggle: () => { if (values.open) values.replaceChildren(values.firstChild, valuesOf(panel, DATA.runs)); } }, el("summary", {}, "values"));
    figure.append(values);
  }
  const merged = DATA.runs.filter((run) => !run.curves.whole).map((run) => `${run.curves.rows.toLocaleString("en")} steps of ${run.label}`);
  if (merged.length) grid.after(el("p", { class: "soft" }, `${merged.join(", ")} are drawn as the lowest and the highest value of neighbouring steps; smoothing is over their means.`));
}
