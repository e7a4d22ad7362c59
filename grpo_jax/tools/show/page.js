"use strict";
// Text from a run is only ever set as textContent: nothing of it can become markup.
const runs = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const LIGHTS = { bad: "wrong", warn: "look", good: "fine", none: "no data" };
let run = runs[0];
let at = 0; // index into run.steps

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null));
  return node;
}

function draw(tag, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

const minus = (text) => text.replace(/^-/, "\u2212");
const fixed = (x) => x === null ? "not finite" : minus(x.toFixed(2));

function number(x, digits = 3) {
  if (x === null || x === undefined) return "not finite";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 1e-3 || size >= 1e6) return minus(x.toExponential(1).replace("e+", "e"));
  return minus(String(Number(x.toPrecision(digits))));
}

// ------------------------------------------------------------------------------------------------------ header, health

function showHeader() {
  document.title = `${run.title} \u00b7 ${run.name}`;
  $("title").textContent = `${run.title} \u00b7 ${run.name}`;
  $("facts").replaceChildren(...run.facts.map(([label, value]) => make("div", "", make("dt", "", label), make("dd", "", value))));
}

function showChecks() {
  const counts = Object.keys(LIGHTS).map((light) => [light, run.checks.filter((check) => check.light === light).length]);
  $("verdict").textContent = counts.filter(([, count]) => count).map(([light, count]) => `${count} ${LIGHTS[light]}`).join(" \u00b7 ");
  $("checks").replaceChildren(...run.checks.map((check) => make("li", check.light,
    make("span", "light", LIGHTS[check.light]), make("span", "", check.title),
    make("span", "number", minus(check.value)), make("span", "sentence", check.sentence))));
}

// -------------------------------------------------------------------------------------------------------------- curves

const WIDTH = 300, HEIGHT = 140, LEFT = 38, RIGHT = 8, TOP = 8, BOTTOM = 18;
const SMOOTH_FROM = 50; // points; from here on a running mean is drawn over them
let movers = []; // one function a panel: show the values at a step

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++) found.push(i * size);
  return found;
}

// The mean over a window around each point, a twentieth of the curve wide.
function smoothed(values) {
  const reach = Math.max(1, Math.floor(values.length / 40));
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - reach), i + reach + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

function showPanels() {
  const last = Math.max(1, ...run.panels.flatMap((panel) => panel.series.map((series) => series.steps.at(-1))));
  movers = [];
  $("panels").replaceChildren(...run.panels.map((panel) => panelOf(panel, last)));
  moveTo(null);
}

function panelOf(panel, last) {
  const values = panel.series.flatMap((series) => series.values);
  let low = Math.min(0, ...values), high = Math.max(...values);
  if (high <= low) high = low + 1;
  if (panel.unit === "share" && high > 0.4) high = Math.max(1, high);
  const x = (step) => LEFT + (step / last) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${panel.title} over the steps` }, document.createElement("div"));
  for (const tick of ticks(low, high, 4)) {
    draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }, svg);
    draw("text", { x: LEFT - 5, y: y(tick) + 3, "text-anchor": "end" }, svg).textContent = number(tick, 2);
  }
  for (const tick of ticks(0, last, 5).filter(Number.isInteger)) {
    draw("text", { x: x(tick), y: HEIGHT - 4, "text-anchor": tick === last ? "end" : "middle" }, svg).textContent = tick;
  }
  const cross = draw("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM }, svg);
  const key = make("div", "key");
  const dots = panel.series.map((series, i) => {
    const color = `var(--c${i})`;
    const path = (values) => values.map((value, j) => `${j ? "L" : "M"}${x(series.steps[j]).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const isNoisy = series.steps.length > SMOOTH_FROM;
    draw("path", { d: path(series.values), style: `stroke: ${color}`, class: isNoisy ? "faint" : "" }, svg);
    if (isNoisy) {
      draw("path", { d: path(smoothed(series.values)), style: `stroke: ${color}` }, svg);
    } else {
      series.steps.forEach((step, j) => draw("circle", { cx: x(step), cy: y(series.values[j]), r: 2, style: `fill: ${color}` }, svg));
    }
    return draw("circle", { r: 3.5, style: `fill: ${color}` }, svg);
  });
  movers.push((step) => {
    cross.toggleAttribute("hidden", step === null);
    cross.setAttribute("x1", x(step ?? 0));
    cross.setAttribute("x2", x(step ?? 0));
    key.replaceChildren(...panel.series.map((series, i) => {
      const j = step === null ? series.steps.length - 1 : nearest(series.steps, step);
      dots[i].setAttribute("cx", x(series.steps[j]));
      dots[i].setAttribute("cy", y(series.values[j]));
      const mark = make("i");
      mark.style.background = `var(--c${i})`;
      return make("span", "", mark, `${series.name} `, make("b", "", number(series.values[j])));
    }));
    if (step !== null) key.append(make("span", "", "at step ", make("b", "", String(step))));
  });
  const stepAt = (event) => {
    const box = svg.getBoundingClientRect(), inside = ((event.clientX - box.left) / box.width) * WIDTH;
    return Math.round(Math.min(1, Math.max(0, (inside - LEFT) / (WIDTH - LEFT - RIGHT))) * last);
  };
  svg.addEventListener("pointermove", (event) => moveTo(stepAt(event)));
  svg.addEventListener("pointerleave", () => moveTo(null));
  svg.addEventListener("click", (event) => {
    if (!run.steps.length) return;
    goTo(nearest(run.steps.map((each) => each.step), stepAt(event)));
    $("samples").scrollIntoView({ behavior: "smooth" });
  });
  return make("figure", "", make("figcaption", "", panel.title, make("small", "", panel.unit)), key, svg);
}

function moveTo(step) {
  for (const mover of movers) mover(step);
}

function nearest(sorted, wanted) {
  let best = 0;
  sorted.forEach((each, i) => { if (Math.abs(each - wanted) < Math.abs(sorted[best] - wanted)) best = i; });
  return best;
}

// ------------------------------------------------------------------------------------------------------ sampled groups

const LONG = 60; // tokens; a longer completion gets the whole width
const FILTERS = {
  all: () => true,
  right: (completion) => completion.isSuccess,
  wrong: (completion) => completion.isScored && !completion.isSuccess,
  mixed: (completion, group) => group.completions.some((each) => each.isSuccess !== completion.isSuccess),
};
const ORDERS = {
  reward: (a, b) => b.reward - a.reward || a.text.length - b.text.length,
  length: (a, b) => b.text.length - a.text.length,
  sampled: () => 0,
};
const advantageOf = (completion, i) => Array.isArray(completion.advantage) ? completion.advantage[i] : completion.advantage;

function goTo(index) {
  at = Math.min(Math.max(index, 0), run.steps.length - 1);
  $("slider").value = at;
  showGroups();
}

function showSamples() {
  const count = run.steps.length;
  $("controls").hidden = count === 0;
  $("slider").max = count - 1;
  $("thinned").textContent = count === 0 ? "none recorded; log.completions_every = 1 records every step"
    : count < run.numRecorded ? `${count} of ${run.numRecorded} recorded steps, evenly spread` : "";
  goTo(count - 1);
}

function showGroups() {
  const groups = run.steps.length ? run.steps[at].groups : [];
  const query = $("search").value.toLowerCase(), colour = $("colour").value;
  $("step").textContent = run.steps.length ? run.steps[at].step : "";
  $("back").disabled = at <= 0;
  $("forth").disabled = at >= run.steps.length - 1;
  showLegend(colour);
  const nodes = [];
  let shown = 0, all = 0;
  for (const group of groups) {
    const isAsked = group.prompt.toLowerCase().includes(query);
    const kept = group.completions.filter((completion) => FILTERS[$("filter").value](completion, group)
      && (isAsked || completion.text.join("").toLowerCase().includes(query)));
    all += group.completions.length;
    shown += kept.length;
    if (kept.length) nodes.push(groupOf(group, kept.sort(ORDERS[$("order").value]), colour));
  }
  $("groups").replaceChildren(...nodes);
  $("count").textContent = groups.length ? `${nodes.length} of ${groups.length} groups, ${shown} of ${all} completions` : "";
}

function groupOf(group, completions, colour) {
  const all = group.completions, right = all.filter((each) => each.isSuccess).length;
  const scored = all.filter((each) => each.isScored);
  const reward = scored.reduce((sum, each) => sum + each.reward, 0) / Math.max(scored.length, 1);
  const heads = ["", "reward", "tokens", "entropy", "advantage / GRPO", "completion"];
  return make("article", "group",
    make("header", "", make("h3", "", `Group ${group.number}`),
      make("span", "", `${right} of ${all.length} right \u00b7 mean reward ${fixed(reward)}`)),
    make("pre", "prompt", visible(group.prompt)),
    make("div", "row heads", ...heads.map((head, i) => make("span", i && i < 5 ? "number" : "", head))),
    ...completions.map((completion) => rowOf(completion, colour)));
}

function rowOf(completion, colour) {
  const tokens = completion.text.map((piece, i) => tokenOf(completion, piece, i, colour));
  const text = make("div", "text", ...tokens, completion.isTruncated ? make("span", "cut", "cut off") : null);
  text.completion = completion;
  const mean = completion.text.reduce((sum, _, i) => sum + advantageOf(completion, i), 0) / completion.text.length / run.perUnit;
  const reward = make("span", "number", completion.isScored ? fixed(completion.reward) : "no score");
  if (completion.reward !== completion.taskReward) {
    reward.append(" ", make("span", "dim", `(${fixed(completion.taskReward)})`));
    reward.title = "reward (task reward before shaping)";
  }
  const isLong = completion.text.length > LONG;
  return make("div", `row ${completion.isSuccess ? "good" : "bad"}${isLong ? " long" : ""}`,
    make("span", "light", completion.isSuccess ? "right" : completion.isScored ? "wrong" : "none"), reward,
    make("span", "number", String(completion.text.length)), make("span", "number", fixed(completion.meanEntropy)),
    make("span", "number", fixed(mean), make("span", "dim", ` / ${fixed(completion.grpo)}`)), text);
}

function tokenOf(completion, piece, i, colour) {
  const isLast = i === completion.text.length - 1;
  const token = make("span", "tok", piece ? visible(piece) : isLast && !completion.isTruncated ? "end" : "\u00b7");
  token.dataset.i = i;
  const value = (colour === "entropy" ? completion.entropy[i] : advantageOf(completion, i)) / run.perUnit;
  const strength = colour === "none" ? 0 : Math.min(1, Math.abs(value) / run.scales[colour]);
  token.style.setProperty("--hue", `var(--${colour === "entropy" ? "entropy" : value < 0 ? "minus" : "plus"})`);
  token.style.setProperty("--strength", strength.toFixed(3));
  if (!piece) token.classList.add("silent", ...(strength > 0.4 ? ["strong"] : []));
  return token;
}

// Control characters as pictures of themselves; a line end is shown and kept.
function visible(text) {
  return text.replace(/\n/g, "\u21b5\n").replace(/[\u0000-\u0009\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
}

function showLegend(colour) {
  const bar = make("i", colour), end = number(run.scales[colour] ?? 0, 2);
  const [low, high] = colour === "entropy" ? ["0", `${end} nats or more`] : [`\u2212${end}`, `+${end}`];
  $("legend").replaceChildren(...(colour === "none" ? [] : [low, bar, high]));
}

// ----------------------------------------------------------------------------------------------------------- tool tip

function showTip(event) {
  const token = event.target.closest(".tok"), tip = $("tip");
  tip.hidden = !token;
  if (!token) return;
  const completion = token.parentNode.completion, i = Number(token.dataset.i), piece = completion.text[i];
  const thousandth = (x) => x === null ? "not finite" : Math.abs(x) < 1 ? `below ${1 / run.perUnit}` : number(x / run.perUnit, 4);
  const rows = [["token", String(i + 1)], ["entropy", `${thousandth(completion.entropy[i])} nats`],
    ["advantage", completion.advantage === 0 ? "0" : thousandth(advantageOf(completion, i))], ["GRPO's advantage", number(completion.grpo, 4)]];
  const table = make("table", "", ...rows.map(([label, value]) => make("tr", "", make("td", "", label), make("td", "", value))));
  const silent = i === completion.text.length - 1 ? "stop token, or part of a character" : "part of a character";
  tip.replaceChildren(make("code", "", piece ? JSON.stringify(piece) : silent), table);
  const box = tip.getBoundingClientRect(), above = event.clientY - box.height - 14;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 8))}px`;
  tip.style.top = `${above > 4 ? above : event.clientY + 18}px`;
}

// ---------------------------------------------------------------------------------------------------------- beginning

function showRun(index) {
  run = runs[index];
  showHeader();
  showChecks();
  showPanels();
  showSamples();
}

$("run").hidden = runs.length < 2;
$("run").append(...runs.map((each, i) => new Option(each.name, i)));
$("run").addEventListener("change", () => showRun($("run").value));
$("slider").addEventListener("input", () => goTo(Number($("slider").value)));
$("back").addEventListener("click", () => goTo(at - 1));
$("forth").addEventListener("click", () => goTo(at + 1));
for (const id of ["colour", "filter", "order"]) $(id).addEventListener("change", showGroups);
$("search").addEventListener("input", showGroups);
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("groups").addEventListener("pointermove", showTip);
$("groups").addEventListener("pointerleave", () => { $("tip").hidden = true; });
addEventListener("scroll", () => { $("tip").hidden = true; }, { passive: true });
showRun(0);
