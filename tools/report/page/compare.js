// Several runs side by side: final numbers, and the config keys in which they differ.

function compareSection(parent) {
  const runs = DATA.runs, names = ["loss", "val_loss", "grad_norm", "tokens_per_s", "step_time_s", "mfu"];
  const extra = [...new Set(runs.flatMap((run) => Object.keys(run.curves.newest).filter((name) => name.startsWith("val_loss/"))))].sort();
  const rows = [["state", ...runs.map((run) => run.status.state)], ["step", ...runs.map((run) => String(run.status.step))], ["tokens", ...runs.map((run) => short(run.status.tokens))]];
  for (const name of [...names, ...extra]) if (runs.some((run) => isNumber(run.curves.newest[name]))) rows.push([clean(name), ...runs.map((run) => short(run.curves.newest[name], 6))]);
  rows.push(["goodput", ...runs.map((run) => (run.status.goodput ? percent(run.status.goodput.ratio) : "–"))]);
  rows.push(["rank-hours", ...runs.map((run) => (run.cost ? short(run.cost.rank_hours, 3) : "–"))]);
  parent.append(card("Newest numbers", table(["number", ...runs.map((run) => run.label)], rows, runs.map((_, at) => at + 1))));
  const values = runs.map((run) => new Map(run.settings.values.map(([key, value]) => [key, value])));
  const keys = [...new Set(values.flatMap((map) => [...map.keys()]))].filter((key) => new Set(values.map((map) => map.get(key))).size > 1);
  parent.append(card("Config differences", keys.length ? table(["key", ...runs.map((run) => run.label)], keys.map((key) => [key, ...values.map((map) => map.get(key) ?? "–")]))
    : el("p", { class: "soft" }, "The configs are the same.")));
}
