// The sections of a run: state, experts, life, layout, config.

const STATES = { finished: "good", running: "good", starting: "warn", queued: "warn", stopped: "warn", preempted: "warn" };
const PARTS = ["steps_s", "again_s", "startup_s", "saves_s", "queue_s", "detection_s", "other_s"];

const badge = (state) => el("span", { class: `badge ${STATES[state] || "bad"}` }, state.replace(/_/g, " "));

// A bar of parts with its key. `parts`: [name, value, text].
function meter(parts, words) {
  const total = parts.reduce((sum, [, value]) => sum + value, 0) || 1;
  const bar = el("div", { class: "meter", role: "img", "aria-label": `${words}: ${parts.map(([name, , text]) => `${name} ${text}`).join(", ")}` },
    parts.map(([, value], at) => {
      const part = el("span", {});
      part.style.width = `${(100 * value) / total}%`;
      part.style.background = colour(at);
      return part;
    }));
  const keys = parts.map(([name, , text], at) => {
    const dot = el("i", {});
    dot.style.background = colour(at);
    return el("li", {}, dot, `${name} ${text}`);
  });
  return el("div", {}, bar, el("ul", { class: "keys" }, keys));
}

function runCard(run) {
  const status = run.status, newest = run.curves.newest, good = status.goodput;
  const validation = Object.entries(newest).filter(([name]) => name.startsWith("val_loss")).map(([name, value]) => [clean(name.replace("val_loss", "validation loss")), short(value, 5)]);
  const steps = status.total_steps === null ? String(status.step) : `${status.step} of ${status.total_steps}`;
  const cost = run.cost ? (run.cost.usd !== undefined ? `$${Math.round(run.cost.usd).toLocaleString("en")}` : null) : null;
  const parts = good ? PARTS.filter((name) => good[name] > 0).map((name) => [run.times[name] || name, good[name], duration(good[name])]) : [];
  return card(null,
    el("h3", {}, run.label, " ", badge(status.state)),
    el("p", { class: "soft" }, [status.why, run.path].filter(Boolean).join(" · ")),
    tiles([["step", steps], ["loss", short(status.loss, 5)], ...validation, ["tokens", short(status.tokens)], ["tokens/s", short(status.tokens_per_s)],
      ["MFU", isNumber(newest.mfu) ? percent(newest.mfu) : null], ["s/step", short(status.step_time_s)], ["ETA", status.eta_s === null ? null : duration(status.eta_s)],
      ["attempt", String(status.attempt)], ["goodput", good ? percent(good.ratio) : null],
      ["rank-hours", run.cost ? short(run.cost.rank_hours, 3) : null], ["ranks", run.cost ? String(run.cost.ranks) : null], ["cost so far", cost]]),
    parts.length ? meter(parts, "Where the time went") : null,
    status.damage.length ? el("p", { class: "bad" }, `damaged: ${status.damage.join("; ")}`) : null,
    run.curves.left_out ? el("p", { class: "bad" }, `${run.curves.left_out} rows of metrics.jsonl are left out: their steps are not ascending`) : null,
    status.job ? el("p", { class: "soft" }, status.job.unknown || `job ${status.job.number}: ${status.job.state}`) : null,
    el("p", {}, "next: ", run.next.flatMap((line, at) => [at ? " · " : null, el("code", {}, line)])));
}

const HEATS = { ratio: ["largest load over mean", "×"], entropy: ["entropy of the load (1: even)", ""], dead: ["dead experts", "experts"] };

function expertsSection(parent, run) {
  const found = run.experts;
  if (!found) {
    parent.append(card(null, el("p", { class: "soft" }, "There is no experts.jsonl with rows: a dense model, or metrics.expert_counts_interval_steps is 0.")));
    return;
  }
  const last = found.steps.length - 1;
  const worst = found.ratio.reduce((best, row, at) => (row[last] > found.ratio[best][last] ? at : best), 0);
  const mean = (rows) => rows.reduce((sum, row) => sum + row[last], 0) / rows.length;
  parent.append(card(null, tiles([["step", String(found.steps[last])], ["MoE layers", String(found.layers.length)], ["experts a layer", String(found.experts)],
    ["largest over mean", `${short(found.ratio[worst][last], 3)} ×`], ["in layer", String(found.layers[worst])], ["entropy, mean", short(mean(found.entropy), 3)],
    ["dead experts", String(found.dead.reduce((sum, row) => sum + row[last], 0))]])));
  const grid = el("div", { class: "grid" });
  parent.append(grid);
  const choose = el("select", { id: "heat", onchange: () => byStep.draw() }, Object.entries(HEATS).map(([value, [text]]) => el("option", { value }, text)));
  const first = card("By layer and step", el("label", {}, "shown ", choose));
  grid.append(first);
  const heat = (x, y, z, hover, unit, names, limits) => ({
    traces: [{ type: "heatmap", x, y, z, colorscale: "Viridis", hovertemplate: hover, colorbar: { thickness: 12, title: { text: unit, side: "right" } }, xgap: 0, ...limits }],
    layout: { xaxis: { title: { text: names[0], standoff: 4 } }, yaxis: { title: { text: "layer", standoff: 4 }, type: "category" } },
  });
  const layers = found.layers.map((layer) => `${layer} `);
  const byStep = chart(first, `Load of experts by layer and step. At step ${found.steps[last]} the largest load over the mean is ${short(found.ratio[worst][last], 3)} in layer ${found.layers[worst]}.`,
    () => heat(found.steps, layers, found[choose.value], `layer %{y}step %{x:,}<br>${HEATS[choose.value][0]}: %{z}<extra></extra>`, HEATS[choose.value][1], ["step"]), true);
  const pick = el("select", { id: "snapshot", onchange: () => byExpert.draw() }, found.snapshots.map((shot, at) => el("option", { value: at, selected: at === found.snapshots.length - 1 }, String(shot.step))));
  const second = card("By layer and expert, load over mean", el("label", {}, "at step ", pick));
  grid.append(second);
  const byExpert = chart(second, "Load of each expert over the mean of its layer, at the chosen step.", () => {
    const load = found.snapshots[Number(pick.value)].load;
    return heat(load[0].map((_, at) => at), layers, load, "layer %{y}expert %{x}<br>load over mean: %{z}<extra></extra>", "×", ["expert"], { zmin: 0 });
  }, true);
}

const SEGMENTS = [["queue", 5], ["start-up", 1], ["steps", 0], ["hang, until seen", 3], ["end", 6]];

function segmentsOf(attempt) {
  const start = attempt.start_s, end = attempt.end_s || start, found = [];
  const add = (kind, from, to) => { if (isNumber(from) && isNumber(to) && to > from) found.push({ kind, from, to }); };
  add("queue", attempt.queued_s, start);
  add("start-up", start, attempt.training_s || end);
  const hung = attempt.hung_s ? end - attempt.hung_s : end;
  add("steps", attempt.training_s, Math.max(hung, attempt.training_s || hung));
  if (attempt.hung_s) add("hang, until seen", hung, end);
  return found;
}

function lifeSection(parent, run) {
  const attempts = run.life.attempts.filter((attempt) => isNumber(attempt.start_s));
  if (attempts.length) {
    const zero = Math.min(...attempts.map((attempt) => attempt.queued_s || attempt.start_s));
    const longest = Math.max(...attempts.map((attempt) => attempt.end_s || 0)) - zero;
    const [unit, scale] = longest > 172800 ? ["days", 86400] : longest > 7200 ? ["hours", 3600] : longest > 180 ? ["minutes", 60] : ["seconds", 1];
    const shown = attempts.slice(-60), label = (attempt) => `attempt ${attempt.attempt} `;
    const figure = card(`Attempts, in ${unit} since the run began`);
    parent.append(figure);
    const words = `Timeline of ${attempts.length} attempts. ${shown.slice(-8).map((a) => `Attempt ${a.attempt}: ${duration((a.end_s || a.start_s) - a.start_s)}, ${a.state || "no end recorded"}`).join("; ")}`;
    chart(figure, words, () => {
      const traces = SEGMENTS.map(([kind, paint]) => {
        const parts = shown.flatMap((attempt) => segmentsOf(attempt).filter((part) => part.kind === kind).map((part) => ({ ...part, attempt })));
        return { type: "bar", orientation: "h", name: kind, y: parts.map((part) => label(part.attempt)), base: parts.map((part) => (part.from - zero) / scale),
          x: parts.map((part) => (part.to - part.from) / scale), marker: { color: colour(paint) }, text: parts.map((part) => duration(part.to - part.from)), textposition: "none",
          customdata: parts.map((part) => plain(`${part.attempt.state} ${part.attempt.why}`)), hovertemplate: `%{y}: ${kind} %{text}<br>%{customdata}<extra></extra>` };
      }).filter((trace) => trace.x.length);
      const saves = run.life.saves.flatMap((save) => {
        const own = shown.find((attempt) => attempt.start_s <= save.time && save.time <= attempt.end_s + 1);
        return own ? [{ ...save, own }] : [];
      });
      traces.push({ type: "scatter", mode: "markers", name: "saves", y: saves.map((save) => label(save.own)), x: saves.map((save) => (save.time - zero) / scale), text: saves.map((save) => plain(save.text)),
        marker: { symbol: "diamond", size: 9, color: colour(2), line: { width: 1, color: style("--card") } }, hovertemplate: "%{text}<extra></extra>" });
      return { traces, layout: { barmode: "overlay", bargap: 0.35, showlegend: true, xaxis: { title: { text: unit, standoff: 4 } }, yaxis: { autorange: "reversed", type: "category" } } };
    }, false, `${130 + 30 * Math.min(shown.length, 20)}px`);
    const rows = [...attempts].reverse().map((a) => [String(a.attempt), clock(a.start_s), duration((a.end_s || a.start_s) - a.start_s), a.state || (run.status.state === "running" ? "runs" : "no end recorded"),
      [a.why, ...a.notes].filter(Boolean).join("; "), a.first_step === null ? "–" : String(a.first_step), String(a.again_steps), String(a.saves), duration(a.blocked_s), a.nodes.join(", ") || "–"]);
    parent.append(card("Causes", table(["attempt", "began", "took", "end", "why", "first step", "steps again", "saves", "waited for saves", "nodes"], rows, [5, 6, 7])));
  }
  const events = [...run.life.events].reverse().map((event) => [clock(event.time), String(event.attempt), event.text]);
  parent.append(card("Events, newest first", events.length ? table(["time", "attempt", "what happened"], events) : el("p", { class: "soft" }, "No events yet.")));
}

const measuredMemory = (run) => Object.fromEntries(Object.entries(run.curves.newest).filter(([name]) => name.startsWith("memory_gib/stage_")).map(([name, value]) => [Number(name.split("_").pop()), value]));

function layoutSection(parent, run) {
  const found = run.layout;
  if (found.problem) parent.append(card(null, el("p", { class: "warn" }, found.problem)));
  if (found.words) parent.append(card(`${found.words} on ${found.ranks} ranks`, el("pre", { tabindex: 0, "aria-label": "The grid of ranks" }, found.grid.join("\n")),
    found.pipeline.length ? el("pre", { tabindex: 0, "aria-label": "The pipeline schedule" }, found.pipeline.join("\n")) : null));
  if (found.memory) parent.append(planCharts(found, { memory: measuredMemory(run), step_s: run.status.step_time_s }));
}

function configSection(parent, run) {
  const found = run.settings;
  if (found.problem) parent.append(card(null, el("p", { class: "warn" }, found.problem)));
  for (const [attempt, keys] of [...found.changes].reverse())
    parent.append(card(`Attempt ${attempt} changed`, table(["key", "before", "after"], keys.map((row) => row.map((value) => value ?? "–")))));
  if (!found.values.length) return;
  const search = el("input", { type: "search", id: "filter", placeholder: "optimizer", "aria-label": "Keys and values that contain", oninput: () => fill() });
  const all = el("input", { type: "checkbox", onchange: () => fill() });
  const place = el("div", {});
  const fill = () => {
    const word = search.value.toLowerCase();
    const rows = found.values.filter(([key, value, origin]) => (all.checked || word || origin !== "default") && `${key} ${value} ${origin}`.toLowerCase().includes(word));
    place.replaceChildren(table(["key", "value", "from"], rows));
  };
  fill();
  parent.append(card("Values", el("div", { class: "controls" }, el("label", {}, "find ", search), el("label", {}, all, "defaults too")), place));
  if (found.software) parent.append(card("Software of the newest attempt", table(["package", "version"], Object.entries(found.software))));
}
