// Builds the page, and on a served page follows the runs.

let chosen = 0;

const forRun = (section) => (parent) => section(parent, DATA.runs[chosen]);
const hasRuns = () => DATA.runs.length > 0;
const SECTIONS = {
  runs: [["ladder", "Ladder", ladderSection, () => DATA.ladder], ["run", "Run", (parent) => parent.append(...DATA.runs.map(runCard)), () => !DATA.ladder],
    ["compare", "Compare", compareSection, () => DATA.runs.length > 1 && !DATA.ladder], ["curves", "Curves", curvesSection, hasRuns],
    ["tasks", "Tasks", tasksSection, () => DATA.runs.some((run) => run.tasks.length)], ["experts", "Experts", forRun(expertsSection), hasRuns], ["life", "Life", forRun(lifeSection), hasRuns],
    ["layout", "Layout", forRun(layoutSection), hasRuns], ["config", "Config", forRun(configSection), hasRuns]],
  plan: [["plan", "Plan", planSection]], search: [["search", "Search", searchSection]], rehearsal: [["rehearsal", "Rehearsal", rehearsalSection]],
  coordinates: [["coordinates", "Coordinates", coordinatesSection]],
};
const OF_ONE_RUN = ["experts", "life", "layout", "config"];
const shown = new Map();

function labels() {
  const names = DATA.runs.map((run) => run.name);
  DATA.runs.forEach((run) => { run.label = names.filter((name) => name === run.name).length > 1 ? run.path : run.name; });
}

function chooseRun(event) {
  chosen = Number(event.target.value);
  document.querySelectorAll("select.which").forEach((select) => { select.value = String(chosen); });
  OF_ONE_RUN.forEach((id) => fill(id));
}

function fill(id) {
  const [, title, section] = SECTIONS[DATA.kind].find(([name]) => name === id), place = shown.get(id);
  const which = OF_ONE_RUN.includes(id) && DATA.runs.length > 1
    ? el("label", {}, " of ", el("select", { class: "which", "aria-label": `Run for ${title}`, onchange: chooseRun }, DATA.runs.map((run, at) => el("option", { value: at, selected: at === chosen }, run.label)))) : null;
  place.replaceChildren(el("h2", { id: `${id}-title` }, title, which));
  section(place);
}

const wantedSections = () => SECTIONS[DATA.kind].filter(([, , , wanted]) => !wanted || wanted());

function build() {
  if (DATA.kind === "runs") labels();
  document.getElementById("title").textContent = document.title;
  const main = document.getElementById("main"), nav = document.getElementById("nav");
  main.replaceChildren();
  nav.replaceChildren();
  shown.clear();
  for (const [id, title] of wantedSections()) {
    nav.append(el("a", { href: `#${id}` }, title));
    const place = el("section", { id, "aria-labelledby": `${id}-title` });
    main.append(place);
    shown.set(id, place);
    fill(id);
  }
  state();
}

function state() {
  const live = DATA.live ? "follows the runs" : `made ${clock(DATA.made)}`;
  document.getElementById("state").textContent = live;
  document.getElementById("state").className = "soft";
}

// What a section shows of a document: where it is the same as before, the section stays as it is, with its focus.
const partOf = {
  run: (document) => document.runs.map((run) => [run.status, run.cost, run.next, run.curves.newest]),
  compare: (document) => document.runs.map((run) => [run.status, run.curves.newest, run.settings]),
  experts: (document) => document.runs[chosen].experts, life: (document) => document.runs[chosen].life,
  ladder: (document) => document.ladder, tasks: (document) => document.runs.map((run) => run.tasks),
  layout: (document) => [document.runs[chosen].layout, document.runs[chosen].curves.newest], config: (document) => document.runs[chosen].settings,
};

function update(next) {
  const before = DATA, hadPanels = [...panelBoxes.keys()].join();
  DATA = next;
  labels();
  if (wantedSections().map(([id]) => id).join() !== [...shown.keys()].join()) {
    build();
    redraw();
    return;
  }
  for (const id of shown.keys()) {
    if (id === "curves") {
      if (panelsOf(DATA.runs).map((panel) => panel.key).join() !== hadPanels) fill(id);
      else redrawPanels();
    } else if (JSON.stringify(partOf[id](before)) !== JSON.stringify(partOf[id](next))) {
      const focused = document.activeElement && document.activeElement.id;
      fill(id);
      if (focused && shown.get(id).querySelector(`[id="${CSS.escape(focused)}"]`)) document.getElementById(focused).focus();
    }
  }
  redraw();
}

async function ask() {
  const at = document.getElementById("state");
  try {
    const answer = await fetch(`data?version=${DATA.version}`);
    if (answer.status === 200) update(await answer.json());
    else if (answer.status !== 204) throw new Error(await answer.text());
    state();
  } catch (error) {
    at.textContent = `the server does not answer (${error.message})`;
    at.className = "bad";
  }
  setTimeout(ask, 2000);
}

build();
applyTheme();
if (DATA.live) setTimeout(ask, 2000);
