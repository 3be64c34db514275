// A ladder: its points, planned beside measured, and the scaling law of their final losses.

function ladderSection(parent) {
  const found = DATA.ladder, points = found.points, sum = (name) => points.reduce((total, one) => total + (one[name] || 0), 0);
  const states = [...new Set(points.map((one) => one.state))].map((state) => `${points.filter((one) => one.state === state).length} ${state}`);
  const dollars = (value) => (isNumber(value) ? `$${Math.round(value).toLocaleString("en")}` : "–");
  parent.append(card(null, el("p", { class: "soft" }, found.path),
    tiles([["points", String(points.length)], ["states", states.join(", ")], ["rank-hours planned", short(sum("planned_hours"), 3)], ["rank-hours so far", short(sum("hours"), 3)],
      ["cost planned", points.every((one) => isNumber(one.planned_usd)) ? dollars(sum("planned_usd")) : null]]),
    table(["point", "state", "step", "loss", "validation loss", "parameters", "active", "tokens", "rank-hours planned", "measured", "cost planned", "settings"],
      points.map((one) => [one.point, badge(one.state), `${one.step} of ${one.steps}`, short(one.loss, 5), short(one.val_loss, 5), short(one.parameters), short(one.active), short(one.tokens),
        short(one.planned_hours, 3), short(one.hours, 3), dollars(one.planned_usd), one.words.join(" ")]), [2, 3, 4, 5, 6, 7, 8, 9, 10]),
    points.length > DATA.runs.length ? el("p", { class: "soft" }, `The curves below are of ${DATA.runs.length} of ${points.length} points.`) : null));
  lawCard(parent, found.law);
}

function lawCard(parent, law) {
  const place = card("Scaling law of the final losses");
  parent.append(place);
  if (law.why) place.append(el("p", { class: "soft" }, law.why));
  if (!law.runs.length) return;
  const curve = law.curve;
  if (curve) {
    place.append(el("p", { class: "soft" }, `${law.form}; N: active parameters, D: tokens; off by ${percent(law.error)} at most. The line is at ${short(curve.tokens_per_parameter, 3)} tokens a parameter; ` +
      `the band holds 80% of the laws fitted to resampled runs; beyond ${short(curve.largest, 3)} FLOP nothing was measured.`),
      table(["value", "fitted", "10th percentile", "90th percentile"], law.values.map(([name, ...numbers]) => [clean(name), ...numbers.map((value) => short(value))]), [1, 2, 3]));
  }
  const runs = law.runs.map((one) => `${one.point} ${short(one.loss, 5)}`).slice(0, 20).join("; ");
  chart(place, `Final loss by compute. ${runs}.`, () => {
    const traces = [];
    if (curve) {
      const band = (y, more) => ({ type: "scatter", mode: "lines", x: curve.compute, y, line: { width: 0, color: colour(0) }, hoverinfo: "skip", showlegend: false, ...more });
      traces.push(band(curve.low, {}), band(curve.high, { fill: "tonexty", fillcolor: `${colour(0)}33`, name: "80% of resampled runs", showlegend: true }),
        { type: "scatter", mode: "lines", name: "law", x: curve.compute, y: curve.loss, line: { color: colour(0), width: 2 }, hovertemplate: "%{x:.3e} FLOP: %{y:.4f}<extra></extra>" });
    }
    const text = law.runs.map((one) => `${plain(one.point)}<br>N ${short(one.parameters)}, D ${short(one.tokens)}<br>loss ${short(one.loss, 5)}${isNumber(one.fitted) ? `, law ${short(one.fitted, 5)}` : ""}`);
    traces.push({ type: "scatter", mode: "markers", name: "runs", x: law.runs.map((one) => one.compute), y: law.runs.map((one) => one.loss), text, hovertemplate: "%{text}<extra></extra>",
      marker: { size: 10, color: colour(1) } });
    return { traces, layout: { showlegend: true, xaxis: { type: "log", exponentformat: "e", title: { text: "FLOP (6 N D)", standoff: 4 } }, yaxis: { type: "log", title: { text: "nats a token", standoff: 4 } } } };
  }, true);
}
