// Elements, numbers in words, colours and charts. Texts of a run become text nodes only, never markup.
"use strict";

let DATA = JSON.parse(document.getElementById("data").textContent);

function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) made.append(child);
  return made;
}

// plotly reads a few tags in its texts: there a run's words are escaped.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function short(value, digits = 4) {
  if (!isNumber(value)) return value === null || value === undefined ? "–" : String(value);
  const size = Math.abs(value);
  if (size >= 1e4) {
    for (const [unit, scale] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
      if (size >= scale) return `${Number((value / scale).toPrecision(3))}${unit}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 10) return `${Number(seconds.toPrecision(2))} s`;
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

const percent = (share) => (isNumber(share) ? `${(100 * share).toFixed(1)}%` : "–");
const clock = (seconds) => (isNumber(seconds) && seconds > 0 && seconds < 8e12 ? new Date(1000 * seconds).toLocaleString() : "–");
const clean = (name) => name.replace(/_/g, " ");

function tell(text) {
  document.getElementById("told").textContent = text;
}

function table(head, rows, numbers = []) {
  const cell = (tag, value, at) => el(tag, { class: numbers.includes(at) ? "number" : null, scope: tag === "th" ? "col" : null }, value);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": head.join(", ") }, el("table", {},
    el("thead", {}, el("tr", {}, head.map((text, at) => cell("th", text, at)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, at) => cell("td", value, at)))))));
}

const tiles = (pairs) => el("dl", { class: "tiles" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "–")
  .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
const card = (title, ...children) => el("section", { class: "card" }, title ? el("h3", {}, title) : null, ...children);

// Okabe and Ito's colours, which most colour-blind people tell apart; a little lighter on a dark page.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b0528f", "#8a6d00", "#3a9bd9", "#5a6475", "#7a3e00"];
const DARK = ["#56b4e9", "#ff9457", "#2fd3a2", "#e89ac7", "#f0d84a", "#9ad0f5", "#aab4c5", "#d29b6c"];
const isDark = () => document.documentElement.dataset.theme === "dark";
const colour = (index) => (isDark() ? DARK : LIGHT)[index % LIGHT.length];
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const drawings = [];

// A chart that is drawn again when the colours change. `make` gives {traces, layout}; `words` says in a sentence what it shows.
function chart(parent, words, make, tall = false, height = null) {
  const box = el("div", { class: tall ? "plot tall" : "plot", role: "img", "aria-label": words });
  if (height) box.style.height = height;
  parent.append(box);
  const draw = () => {
    const { traces, layout } = make();
    const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line"), automargin: true };
    const full = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: style("--text"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 50, r: 12, t: 8, b: 36 }, showlegend: false, hovermode: "closest", dragmode: "zoom",
      hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--text") }, namelength: -1 },
      legend: { orientation: "h", y: -0.2, yanchor: "top" }, modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--soft"), activecolor: style("--link") }, ...layout,
    };
    for (const name of ["xaxis", "yaxis"]) full[name] = { ...axis, ...(layout[name] || {}) };
    return Plotly.react(box, traces, full, { displaylogo: false, responsive: true, displayModeBar: true,
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]] });
  };
  drawings.push({ box, draw });
  // After the whole section stands: only then its widths are known.
  box.drawn = Promise.resolve().then(draw);
  box.draw = draw;
  return box;
}

function redraw() {
  for (let at = drawings.length - 1; at >= 0; at--) {
    if (drawings[at].box.isConnected) drawings[at].draw();
    else { Plotly.purge(drawings[at].box); drawings.splice(at, 1); }
  }
}

const THEMES = ["auto", "light", "dark"];
let theme = "auto";

function applyTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = theme === "auto" ? system : theme;
  document.documentElement.style.colorScheme = document.documentElement.dataset.theme;
  const button = document.getElementById("theme");
  button.textContent = `${{ auto: "◐", light: "☀", dark: "☾" }[theme]} ${theme}`;
  button.setAttribute("aria-label", `Colours: ${theme}. Press for ${THEMES[(THEMES.indexOf(theme) + 1) % 3]}`);
  redraw();
}

document.getElementById("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  applyTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
