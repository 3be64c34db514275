// What the planner says, alone or beside what was measured; a search; a rehearsal; a coordinate check.

const MEMORY = [["weights_gib", "weights"], ["gradients_gib", "gradients"], ["optimizer_gib", "optimizer"], ["activations_gib", "activations"], ["buffers_gib", "buffers"]];

function planCharts(plan, measured = { memory: {}, step_s: null }) {
  const grid = el("div", { class: "grid" }), stages = plan.memory.ranks, has = Object.keys(measured.memory).length > 0;
  const memory = card(`Memory of a rank by stage (GiB), planned${has ? " and measured" : ""}`);
  grid.append(memory);
  const words = stages.slice(0, 16).map((rank) => `stage ${rank.stage}: ${short(rank.total_gib, 3)}${isNumber(measured.memory[rank.stage]) ? ` planned, ${short(measured.memory[rank.stage], 3)} measured` : ""}`);
  chart(memory, `Memory in GiB. ${words.join("; ")}. Capacity ${short(plan.memory.capacity_gib, 3)}.`, () => {
    const x = stages.map((rank) => rank.stage);
    const traces = MEMORY.map(([key, name], at) => ({ type: "bar", name, x, y: stages.map((rank) => rank[key]), marker: { color: colour(at) }, offsetgroup: "planned",
      hovertemplate: `stage %{x}, ${name}: %{y:.3f} GiB<extra></extra>` }));
    if (has) traces.push({ type: "scatter", mode: "markers", name: "measured peak", x, y: x.map((stage) => measured.memory[stage] ?? null), marker: { symbol: "diamond", size: 11, color: style("--text") },
      hovertemplate: "stage %{x}, measured: %{y:.3f} GiB<extra></extra>" });
    const capacity = plan.memory.capacity_gib, top = Math.max(...stages.map((rank) => rank.total_gib));
    const shapes = capacity < 3 * top ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: capacity, y1: capacity, line: { dash: "dash", width: 1.5, color: style("--bad") } }] : [];
    return { traces, layout: { barmode: "stack", bargap: 0.4, showlegend: true, shapes, xaxis: { title: { text: "stage", standoff: 4 }, dtick: stages.length > 16 ? null : 1 } } };
  }, true);
  const time = card("Time of a step (s)");
  grid.append(time);
  const parts = Object.entries(plan.time.breakdown_s).sort((one, other) => other[1] - one[1]);
  time.append(tiles([["planned", `${short(plan.time.step_s)} s`], ["measured", isNumber(measured.step_s) ? `${short(measured.step_s)} s` : null],
    ["MFU planned", percent(plan.time.mfu)], ["pipeline bubble", percent(plan.time.bubble_fraction)], ["capacity", `${short(plan.memory.capacity_gib, 3)} GiB`]]));
  chart(time, `Planned time of a step by part. ${parts.slice(0, 8).map(([name, value]) => `${name} ${short(value, 3)} s`).join("; ")}`, () => ({
    traces: [{ type: "bar", orientation: "h", y: parts.map(([name]) => `${name} `), x: parts.map(([, value]) => value), marker: { color: colour(0) }, hovertemplate: "%{y}: %{x:.4~g} s<extra></extra>" }],
    layout: { yaxis: { autorange: "reversed", type: "category" }, bargap: 0.25 },
  }), true);
  if (plan.gpu === "host") grid.append(card(null, el("p", { class: "soft" }, "cluster.gpu is not set: the plan takes a process for a slow GPU, good for an order of magnitude only.")));
  return grid;
}

function planSection(parent) {
  const plan = DATA.plan;
  parent.append(card(plan.title, tiles(plan.facts), el("p", { class: plan.fits ? "good" : "bad" }, plan.fits ? "It fits." : "It does not fit.")), planCharts(plan));
  if (plan.notes.length) parent.append(card("Notes", el("ul", {}, plan.notes.map((note) => el("li", {}, note)))));
  if (plan.grid.length) parent.append(card("Layout", el("pre", { tabindex: 0 }, [...plan.grid, ...plan.pipeline].join("\n"))));
}

function searchSection(parent) {
  const found = DATA.search, figure = card("Speed and memory of the layouts that fit; the ones on the Pareto front are joined");
  parent.append(card(null, tiles(found.facts)), figure);
  const hover = (one) => `${plain(one.layout)}<br>step ${short(one.step_s)} s, MFU ${percent(one.mfu)}<br>${short(one.peak_gib, 3)} GiB, bubble ${percent(one.bubble)}`;
  const front = found.candidates.filter((one) => one.pareto).sort((one, other) => one.peak_gib - other.peak_gib);
  const best = found.candidates[0];
  chart(figure, `${found.candidates.length} layouts by memory and speed.${best ? ` The fastest: ${best.layout}, ${short(best.speed)} tokens a second a GPU in ${short(best.peak_gib, 3)} GiB.` : ""}`, () => ({
    traces: [["others", found.candidates.filter((one) => !one.pareto), "markers", 0, 7], ["Pareto front", front, "lines+markers", 1, 10]].map(([name, list, mode, paint, size]) => ({
      type: "scatter", mode, name, x: list.map((one) => one.peak_gib), y: list.map((one) => one.speed), text: list.map(hover), marker: { size, color: colour(paint), opacity: 0.85 },
      line: { color: colour(paint), width: 1.2 }, hovertemplate: "%{text}<extra></extra>" })),
    layout: { showlegend: true, xaxis: { title: { text: "GiB of the fullest rank", standoff: 4 } }, yaxis: { title: { text: "tokens/s a GPU", standoff: 4 }, rangemode: "tozero" } },
  }), true);
  parent.append(card("Fastest layouts", table(["layout", "step s", "tokens/s a GPU", "MFU", "bubble", "GiB", "settings"],
    found.candidates.slice(0, found.top).map((one) => [one.layout, short(one.step_s), short(one.speed), percent(one.mfu), percent(one.bubble), short(one.peak_gib, 3), one.words.join(" ")]), [1, 2, 3, 4, 5])));
  const reasons = [...found.notes, ...found.refused.map(([rule, layouts]) => `refused ${layouts}: ${rule}`)];
  if (reasons.length) parent.append(card("Why", el("ul", {}, reasons.map((note) => el("li", {}, note)))));
}

function rehearsalSection(parent) {
  const found = DATA.rehearsal, worst = (value) => (isNumber(value) ? value.toExponential(1) : "–");
  const verdict = (line) => el("span", { class: line.ok ? "good" : "bad" }, line.error ? "failed" : line.bit_equal ? "bit-equal" : line.ok ? "same" : `wrong: ${line.first_difference}`);
  const keys = ["loss_max_rel", "grad_norm_max_rel", "grad_max_rel", "weight_max_rel"];
  parent.append(card(found.title, tiles(found.facts), table(["layout", "engine", "loss", "gradient norm", "gradients", "weights", "verdict"],
    found.layouts.map((line) => [line.layout, `${line.engine} ZeRO-${line.zero}, micro-batch ${line.micro_batch_seqs}`, ...keys.map((key) => worst(line[key])), verdict(line)]), [2, 3, 4, 5])));
  const compared = found.layouts.filter((line) => !line.error);
  if (compared.length) {
    const figure = card("Largest relative differences");
    parent.append(figure);
    chart(figure, "Largest relative difference of each layout.", () => ({
      traces: keys.map((key, at) => ({ type: "scatter", mode: "markers", name: clean(key.replace("_max_rel", "")), x: compared.map((_, number) => number + 1), y: compared.map((line) => Math.max(line[key], 1e-17)),
        text: compared.map((line) => plain(line.layout)), marker: { size: 9, color: colour(at) }, hovertemplate: "%{text}: %{y:.1e}<extra></extra>" })),
      layout: { showlegend: true, yaxis: { type: "log", exponentformat: "e" }, xaxis: { title: { text: "layout", standoff: 4 }, dtick: 1 } },
    }), true);
  }
  if (found.notes.length) parent.append(card("Notes", el("ul", {}, found.notes.map((note) => el("li", {}, note)))));
  for (const line of found.layouts.filter((one) => one.error)) parent.append(card(line.layout, el("pre", { tabindex: 0 }, line.error)));
}

// At least a decade, so that what is flat looks flat.
function decades(values) {
  const logs = values.map(Math.log10), low = Math.min(...logs), high = Math.max(...logs), spare = Math.max(0.05 * (high - low), (1 - high + low) / 2);
  const ticks = [];
  for (let power = Math.floor(low) - 1; power <= high + 1; power++) for (const digit of [1, 2, 5]) ticks.push(digit * 10 ** power);
  return { type: "log", range: [low - spare, high + spare], tickvals: ticks, ticktext: ticks.map((tick) => short(tick, 1)) };
}

function coordinatesSection(parent) {
  const found = DATA.coordinates, grows = (kind) => found.growing.includes(kind);
  parent.append(card(found.title, el("p", { class: found.flat ? "good" : "bad" }, found.verdict),
    table(["output of", "grows as width to the power", "verdict"], Object.entries(found.exponents).map(([kind, power]) => [kind, power.toFixed(2),
      el("span", { class: grows(kind) ? "bad" : "good" }, grows(kind) ? "grows" : "flat")]), [1])));
  const grid = el("div", { class: "grid" });
  parent.append(grid);
  for (const [kind, byWidth] of Object.entries(found.coordinates)) {
    const widths = Object.keys(byWidth).map(Number).sort((one, other) => one - other), steps = byWidth[widths[0]].length;
    const figure = card(`Mean absolute output by width: ${kind}`), last = widths.map((width) => `${short(byWidth[width][steps - 1], 3)} at x ${width}`);
    grid.append(figure);
    chart(figure, `Mean absolute output of ${kind}, after step ${steps - 1}: ${last.join(", ")}.`, () => ({
      traces: Array.from({ length: steps }, (_, step) => ({ type: "scatter", mode: "lines+markers", name: `step ${step}`, x: widths, y: widths.map((width) => byWidth[width][step]),
        marker: { size: 7, color: colour(step) }, line: { color: colour(step), width: 1.6 }, hovertemplate: `x %{x}, step ${step}: %{y:.4~g}<extra></extra>` })),
      layout: { showlegend: true, xaxis: { type: "log", tickvals: widths, ticktext: widths.map((width) => `x ${width}`), title: { text: "width", standoff: 4 } }, yaxis: decades(widths.flatMap((width) => byWidth[width])) },
    }), true);
  }
}
