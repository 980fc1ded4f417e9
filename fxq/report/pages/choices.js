"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "line", "text", "circle", "polyline", "title", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const loss = (v) => (v === 0 ? "0" : v.toPrecision(3));
const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(2)} MB`);

// ---- what it came to

const chosen = data.chosen;
page.append(make("h1", {}, document.title));
page.append(make("p", {},
  `Chosen: ${chosen.bits.toFixed(2)} bits a weight, ${size(chosen.bytes)}. By what its groups lose alone the model should lose ${loss(chosen.loss)}` +
  (chosen.measured === null ? "." : `; it loses ${loss(chosen.measured)} (measured on the same text).`)));

// ---- the frontier: size against loss on a logarithmic scale

function frontier() {
  const points = data.frontier.filter((p) => p.loss > 0), width = 760, height = 320, left = 70, bottom = 40;
  if (!points.length) return;
  const marks = [...points, chosen, ...(chosen.measured ? [{ ...chosen, loss: chosen.measured }] : [])].filter((p) => p.loss > 0);
  const bits = marks.map((p) => p.bits), logs = marks.map((p) => Math.log10(p.loss));
  const span = (values) => [Math.min(...values), Math.max(Math.max(...values), Math.min(...values) + 1e-9)];
  const [x0, x1] = span(bits), [y0, y1] = span(logs);
  const x = (p) => left + ((p.bits - x0) / (x1 - x0)) * (width - left - 20);
  const y = (p) => height - bottom - ((Math.log10(p.loss) - y0) / (y1 - y0)) * (height - bottom - 20);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "size against loss" });
  for (let i = 0; i <= 4; i++) {
    const p = { bits: x0 + ((x1 - x0) * i) / 4, loss: 10 ** (y0 + ((y1 - y0) * i) / 4) };
    svg.append(make("line", { class: "axis", x1: left, x2: width - 20, y1: y(p), y2: y(p) }));
    svg.append(make("text", { x: left - 8, y: y(p) + 4, "text-anchor": "end" }, loss(p.loss)));
    svg.append(make("text", { x: x(p), y: height - bottom + 20, "text-anchor": "middle" }, p.bits.toFixed(2)));
  }
  svg.append(make("text", { x: width / 2, y: height - 4, "text-anchor": "middle" }, "bits a weight"));
  svg.append(make("polyline", { class: "frontier", points: points.map((p) => `${x(p)},${y(p)}`).join(" ") }));
  const mark = (p, kind, text) => make("circle", { class: kind, cx: x(p), cy: y(p), r: kind === "point" ? 3 : 6 }, make("title", {}, text));
  for (const p of points) svg.append(mark(p, "point", `${p.bits.toFixed(2)} bits, ${size(p.bytes)}: ${loss(p.loss)}`));
  if (chosen.loss > 0) svg.append(mark(chosen, "chosen", `chosen, predicted: ${loss(chosen.loss)}`));
  if (chosen.measured > 0) svg.append(mark({ ...chosen, loss: chosen.measured }, "measured", `chosen, measured: ${loss(chosen.measured)}`));
  page.append(make("h2", {}, "Size against loss"), svg,
    make("p", { class: "soft" }, "The line is predicted by what groups lose alone. The full circle is what was chosen, the ring what the whole model loses."));
}
frontier();

// ---- the heat map: a row a group, a column a format; darker is worse

const RAMP = [[247, 252, 245], [199, 233, 192], [254, 217, 118], [253, 141, 60], [227, 74, 51]];

function colour(v, low, high) {
  if (!(v > 0)) return "rgb(247,252,245)";
  const t = ((Math.log(v) - low) / Math.max(high - low, 1e-9)) * (RAMP.length - 1), at = Math.max(0, Math.min(RAMP.length - 1.001, t));
  const i = Math.floor(at);
  return `rgb(${RAMP[i].map((a, c) => Math.round(a + (RAMP[i + 1][c] - a) * (at - i))).join(",")})`;
}

const formats = [...new Set(data.groups.flatMap((g) => Object.keys(g.losses)))];
const all = data.groups.flatMap((g) => Object.values(g.losses)).filter((v) => v > 0).map(Math.log);
const [low, high] = [Math.min(...all), Math.max(...all)];
const body = make("tbody");
for (const group of data.groups) {
  const row = make("tr", { title: group.parameters.join("\n") },
    make("td", {}, group.layer === null ? "" : String(group.layer)), make("td", {}, group.projections),
    make("td", { class: "number" }, group.numbers.toLocaleString("en-US")));
  for (const format of formats) {
    const value = group.losses[format];
    const cell = make("td", { class: `cell${group.chosen === format ? " chosen" : ""}` }, value === undefined ? "" : loss(value));
    if (value !== undefined) cell.style.background = colour(value, low, high);
    row.append(cell);
  }
  row.append(make("td", { class: "soft" }, group.fixed ? "settled by the spec" : ""));
  body.append(row);
}
const names = ["layer", "weights", "numbers", ...formats, ""];
page.append(make("h2", {}, "What each group loses alone"),
  make("p", { class: "soft" }, "By format; the framed cell is what was chosen."),
  make("table", {}, make("thead", {}, make("tr", {}, ...names.map((n) => make("th", {}, n)))), body));
