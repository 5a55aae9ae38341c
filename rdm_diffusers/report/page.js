"use strict";
// Draws the curves of the page and moves through its images. All text goes in as text, never as HTML.
const { charts, marks, grids } = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 176, LEFT = 50, RIGHT = 10, TOP = 8, BOTTOM = 22;
const SMOOTHED = 24; // a line with more points also has a smoothed form
const tip = document.getElementById("tip");

function element(parent, name, attributes = {}, text = null) {
  const made = parent instanceof SVGElement || name === "svg"
    ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

function shown(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e").replace(".0e", "e");
  return String(Number(value.toPrecision(4)));
}

// Round numbers that cover an interval, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * ([1, 2, 2.5, 5, 10].find((factor) => factor * unit >= rough) ?? 10);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function smoothed(values) {
  const window = Math.max(2, values.length / 20);
  let mean = values[0];
  return values.map((value, i) => (mean += (value - mean) / Math.min(i + 1, window)));
}

function extent(values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { const room = Math.abs(low) * 0.1 || 1; low -= room; high += room; }
  return [low, high];
}

const colour = (i) => `var(--line-${i % 8})`;

function draw(chart, card) {
  const svg = card.querySelector("svg"), width = Math.max(svg.clientWidth, 200);
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const [first, last] = extent(chart.lines.flatMap((line) => line.x));
  let [low, high] = extent(chart.lines.flatMap((line) => line.y));
  const room = (high - low) * 0.06;
  const floor = low >= 0 && low - room < 0 ? 0 : low - room;
  [low, high] = [floor, high + room];
  const across = (x) => LEFT + ((x - first) / (last - first)) * (width - LEFT - RIGHT);
  const up = (y) => HEIGHT - BOTTOM - ((y - low) / (high - low)) * (HEIGHT - BOTTOM - TOP);
  for (const y of ticks(low, high, 4)) {
    element(svg, "line", { class: "gridline", x1: LEFT, x2: width - RIGHT, y1: up(y), y2: up(y) });
    element(svg, "text", { x: LEFT - 6, y: up(y) + 4, "text-anchor": "end" }, shown(y));
  }
  element(svg, "line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM });
  for (const x of ticks(first, last, Math.max(2, Math.min(6, width / 80)))) {
    if (!Number.isInteger(x)) continue;
    const anchor = across(x) > width - 24 ? "end" : "middle";
    element(svg, "text", { x: Math.min(across(x), width - 2), y: HEIGHT - 6, "text-anchor": anchor }, x.toLocaleString("en"));
  }
  if (chart.section !== "Learning rates and speed") {
    for (const update of marks.alarms) {
      if (update < first || update > last) continue;
      const mark = element(svg, "line", { class: "alarm", x1: across(update), x2: across(update), y1: TOP, y2: HEIGHT - BOTTOM });
      element(mark, "title", {}, `alarm at update ${update}`);
    }
  }
  const path = (line, values) => line.x.map((x, i) => `${i ? "L" : "M"}${across(x).toFixed(1)} ${up(values[i]).toFixed(1)}`).join("");
  chart.lines.forEach((line, i) => {
    const many = line.x.length > SMOOTHED;
    if (many) element(svg, "path", { class: "raw", d: path(line, line.y), stroke: colour(i) });
    element(svg, "path", { class: "line", d: path(line, many ? smoothed(line.y) : line.y), stroke: colour(i) });
    if (line.x.length <= SMOOTHED) {
      line.x.forEach((x, k) => element(svg, "circle", { cx: across(x), cy: up(line.y[k]), r: 2.2, fill: colour(i) }));
    }
  });
  if (chart.section === "Validation" && marks.best !== null) {
    const at = chart.lines[0].x.indexOf(marks.best);
    if (at >= 0) {
      const ring = element(svg, "circle", { class: "best", cx: across(marks.best), cy: up(chart.lines[0].y[at]), r: 5.5 });
      element(ring, "title", {}, `the best update, ${marks.best}`);
    }
  }
  return { svg, across, updates: [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b) };
}

function nearest(values, wanted) {
  return values.reduce((best, value, i) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best), 0);
}

// Shows the values at one of the chart's updates, in a box beside the cursor.
function point(chart, drawn, index) {
  const update = drawn.updates[index], x = drawn.across(update);
  drawn.svg.querySelector(".cursor")?.remove();
  element(drawn.svg, "line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM });
  tip.replaceChildren();
  element(tip, "b", {}, `update ${update.toLocaleString("en")}`);
  for (const line of chart.lines) {
    const at = nearest(line.x, update);
    const when = line.x[at] === update ? "" : ` (update ${line.x[at]})`;
    element(tip, "div", {}, `${line.name}: ${shown(line.y[at])}${when}`);
  }
  tip.hidden = false;
  const box = drawn.svg.getBoundingClientRect(), beside = box.left + x + 12;
  tip.style.left = `${Math.max(4, beside + tip.offsetWidth > innerWidth ? box.left + x - 12 - tip.offsetWidth : beside)}px`;
  tip.style.top = `${Math.max(4, box.top + 8)}px`;
}

function hide(drawn) {
  drawn.svg.querySelector(".cursor")?.remove();
  tip.hidden = true;
}

function addChart(chart) {
  const place = [...document.querySelectorAll(".charts")].find((each) => each.dataset.section === chart.section);
  const card = element(place, "article", { class: "chart" });
  element(card, "h3", {}, chart.title);
  element(card, "p", {}, chart.note);
  const ends = chart.lines.map((line) => `${line.name}: ${shown(line.y[0])} at first, ${shown(line.y.at(-1))} at last`);
  element(card, "svg", { role: "img", tabindex: "0", "aria-label": `${chart.title} by update. ${ends.join("; ")}. Arrow keys read values.` });
  if (chart.lines.length > 1) {
    const legend = element(card, "ul", { class: "legend" });
    chart.lines.forEach((line, i) => {
      const item = element(legend, "li");
      element(item, "i").style.background = colour(i);
      item.append(line.name);
    });
  }
  let drawn = draw(chart, card), index = drawn.updates.length - 1;
  const svg = drawn.svg;
  new ResizeObserver(() => { drawn = draw(chart, card); }).observe(svg);
  svg.addEventListener("pointermove", (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    index = nearest(drawn.updates.map(drawn.across), x);
    point(chart, drawn, index);
  });
  svg.addEventListener("pointerleave", () => hide(drawn));
  svg.addEventListener("blur", () => hide(drawn));
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -drawn.updates.length, End: drawn.updates.length };
    if (event.key === "Escape") hide(drawn);
    if (!(event.key in moves)) return;
    event.preventDefault();
    index = Math.min(Math.max(index + moves[event.key], 0), drawn.updates.length - 1);
    point(chart, drawn, index);
  });
}

function addSlider() {
  const slider = document.getElementById("time"), picture = document.getElementById("picture");
  const when = document.getElementById("when"), play = document.getElementById("play");
  let timer = null;
  const show = () => {
    const grid = grids[Number(slider.value)];
    picture.src = grid.source;
    picture.alt = grid.alt;
    when.textContent = `update ${grid.update.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", when.textContent);
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶"; play.setAttribute("aria-label", "play through time"); };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === grids.length - 1) slider.value = "0";
    show();
    play.textContent = "❚❚";
    play.setAttribute("aria-label", "pause");
    timer = setInterval(() => {
      slider.value = String(Number(slider.value) + 1);
      show();
      if (Number(slider.value) === grids.length - 1) stop();
    }, 500);
  });
  document.querySelector(".slider").hidden = grids.length < 2;
}

charts.forEach(addChart);
if (grids.length) addSlider();
