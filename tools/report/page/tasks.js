// Scores of checkpoints on tasks, by step.
function tasksSection(parent) {
  const runs = DATA.runs.filter((run) => run.tasks.length);
  const several = DATA.runs.length > 1, of = (run, name) => (several ? `${run.label}: ${name}` : name);
  const rows = runs.flatMap((run) => run.tasks.map((one) => [of(run, one.name), short(one.scores[one.scores.length - 1]), isNumber(one.stderr) ? short(one.stderr, 2) : "–", String(one.steps[one.steps.length - 1])]));
  const grid = el("div", { class: "grid" }), figure = card("Scores by step");
  grid.append(card("Newest scores", table(["task/metric", "score", "standard error", "step"], rows, [1, 2, 3])), figure);
  parent.append(grid);
  chart(figure, `Scores on tasks by step. ${rows.slice(0, 12).map(([name, score, , step]) => `${name} ${score} at step ${step}`).join("; ")}.`, () => ({
    traces: runs.flatMap((run) => run.tasks.map((one) => [run, one])).map(([run, one], at) => ({ type: "scatter", mode: "lines+markers", name: plain(of(run, one.name)), x: one.steps, y: one.scores,
      marker: { color: colour(at), size: 8 }, line: { color: colour(at), width: 1.2 }, hovertemplate: `step %{x:,}: %{y:.4f}<extra>${plain(of(run, one.name))}</extra>` })),
    layout: { showlegend: true, xaxis: { title: { text: "step", standoff: 4 } } },
  }), true);
}
