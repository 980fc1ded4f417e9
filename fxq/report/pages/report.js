"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const tip = document.getElementById("tip");

// ---- elements and numbers

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "text", "line", "title", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function section(title, text, ...children) {
  const made = make("section", {}, make("h2", {}, title), ...(text ? [make("p", {}, text)] : []), ...children);
  page.append(made);
  return made;
}

const count = (n) => n.toLocaleString("en-US");
const decibel = (n) => (n === null ? "exact" : `${n.toFixed(2)} dB`);
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

function size(bytes) {
  for (const [unit, scale] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (bytes >= scale) return `${(bytes / scale).toPrecision(3)} ${unit}`;
  return `${bytes} B`;
}

function duration(seconds) {
  if (seconds < 120) return `${seconds.toFixed(1)} s`;
  return seconds < 7200 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function quantile(values, q) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
}

// ---- colours: dark to light through blue, green and yellow, also for those who do not see red

const RAMP = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];

function ramp(t) {
  const at = Math.max(0, Math.min(1, t)) * (RAMP.length - 1), low = Math.min(RAMP.length - 2, Math.floor(at));
  return `rgb(${RAMP[low].map((a, i) => Math.round(a + (RAMP[low + 1][i] - a) * (at - low))).join(",")})`;
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const redraws = [];

// ---- heat maps: one canvas each, so that 61 x 384 cells are no more work than 4 x 8

function sizedCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

// rows, columns: labels. value(r, c): a number, or null where there is nothing. colour(v). label(r, c): for the tip.
function heatmap(map) {
  const canvas = make("canvas", { role: "img", "aria-label": map.description });
  const holder = make("div", { class: "map" }, canvas);
  const place = {};
  function draw() {
    const width = holder.clientWidth || 800, few = map.columns.length <= 16;
    const head = few ? headHeight(map.columns, width) : 18;
    const left = 8 + Math.max(...map.rows.map((r) => String(r).length)) * 7;
    // Slanted headings lean over the last column; what is said of a row stands right of it.
    const right = map.aside ? 34 : head > 20 ? head * 0.58 : 0;
    const cell = (width - left - right) / map.columns.length;
    const row = Math.min(Math.max(6, Math.min(26, cell)), Math.max(8, 420 / map.rows.length));
    const context = sizedCanvas(canvas, width, head + row * map.rows.length);
    Object.assign(place, { left, head, cell, row });
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = style("--soft");
    headings(context, map.columns, place, few);
    const step = Math.ceil(12 / row);
    context.textAlign = "right";
    map.rows.forEach((name, r) => {
      if (r % step === 0) context.fillText(name, left - 5, head + r * row + row / 2 + 4);
    });
    const gap = cell > 6 && row > 6 ? 1 : 0;
    if (map.aside) {
      const most = Math.max(...map.rows.map((_, r) => map.aside(r)));
      context.textAlign = "left";
      context.fillStyle = style("--bad");
      map.rows.forEach((name, r) => {
        const n = map.aside(r), y = head + r * row;
        if (row >= 12 && n) context.fillText(count(n), width - right + 6, y + row / 2 + 4);
        else context.fillRect(width - right + 4, y, (right - 6) * n / most, row - 1);
      });
    }
    for (let r = 0; r < map.rows.length; r++)
      for (let c = 0; c < map.columns.length; c++) {
        const value = map.value(r, c);
        if (value === null || value === undefined) continue;
        context.fillStyle = map.colour(value);
        context.fillRect(left + c * cell, head + r * row, Math.max(cell - gap, 0.5), row - gap);
      }
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - place.left) / place.cell);
    const r = Math.floor((event.clientY - box.top - place.head) / place.row);
    const inside = r >= 0 && c >= 0 && r < map.rows.length && c < map.columns.length;
    const text = inside ? map.label(r, c) : null;
    if (text) showTip(text, event);
    else tip.hidden = true;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  redraws.push(draw);
  queueMicrotask(draw); // once the page is put together; frames do not come in a hidden tab
  return { element: holder, draw };
}

function headHeight(columns, width) {
  const longest = Math.max(...columns.map((c) => String(c).length)) * 6.2;
  return width / columns.length > longest + 12 ? 20 : Math.min(190, longest * 0.86 + 16);
}

function headings(context, columns, { left, head, cell }, few) {
  if (!few) {
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((s) => s * cell > 34) || 256;
    context.textAlign = "left";
    for (let c = 0; c < columns.length; c += step) context.fillText(columns[c], left + c * cell, head - 5);
    return;
  }
  const slanted = head > 20;
  columns.forEach((name, c) => {
    context.save();
    context.translate(left + (c + 0.5) * cell, head - 6);
    if (slanted) context.rotate(-Math.PI / 3.4);
    context.textAlign = slanted ? "left" : "center";
    context.fillText(name, 0, 0);
    context.restore();
  });
}

function showTip(text, event) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, window.innerWidth - box.width - 4))}px`;
  tip.style.top = `${event.clientY + 18 + box.height > window.innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
}

function legend(low, high, colour, ...more) {
  const bar = make("canvas", { width: 160, height: 10 });
  const context = bar.getContext("2d");
  for (let x = 0; x < 160; x++) {
    context.fillStyle = colour(x / 159);
    context.fillRect(x, 0, 1, 10);
  }
  return make("div", { class: "legend" }, low, bar, high, ...more);
}

// ---- sections

// Of a narrower range of decibels colours would show differences that mean nothing.
const LEAST_RANGE = 2;

function heading() {
  page.append(
    make("h1", {}, report.title),
    make("div", { class: "soft" }, `quantized with ${report.spec} by fxq ${report.fxq}`),
  );
  const s = report.summary, tiles = make("div", { class: "tiles" });
  const tile = (value, text, bad = false) =>
    tiles.append(make("div", { class: bad ? "tile bad" : "tile" }, make("b", {}, value), make("span", {}, text)));
  if (s.sqnr_db !== null) tile(decibel(s.sqnr_db), "weights against the original (SQNR); the worst " + decibel(s.worst_sqnr_db));
  if (s.perplexity_before !== null)
    tile(`${s.perplexity_before.toPrecision(3)} → ${s.perplexity_after.toPrecision(3)}`, "perplexity before and after, as served");
  if (s.kl_divergence != null) tile(s.kl_divergence.toPrecision(2), `nats per token from the source (KL), ${(100 * s.top1_agreement).toFixed(1)} % first choices alike`);
  if (s.output_bytes)
    tile(`${(100 * s.output_bytes / s.source_bytes).toFixed(1)} %`, `of the size: ${size(s.source_bytes)} became ${size(s.output_bytes)}`);
  if (s.bits_per_weight) tile(s.bits_per_weight.toFixed(3), "bits per quantized weight, scales included");
  if (s.tensors_quantized !== null) tile(count(s.tensors_quantized), `tensors quantized, ${count(s.tensors_excluded)} modules left as they are`);
  if (s.experts && s.dead_experts !== null) tile(count(s.dead_experts), `of ${plural(s.experts, "expert")} reached by no token`, s.dead_experts > 0);
  tile(s.calibration_tokens ? count(s.calibration_tokens) : "none", "tokens of calibration");
  page.append(tiles);
}

function warnings() {
  if (!report.warnings.length) return;
  const list = make("ul", {}, ...report.warnings.map((text) => make("li", {}, text)));
  section(plural(report.warnings.length, "warning"), "", list).classList.add("warnings");
}

const values = (weight) => weight.sqnr_db.filter((v) => v !== null);

function sqnrMap() {
  const columns = [...new Set(report.weights.map((w) => w.projection))];
  const rows = [...new Set(report.weights.map((w) => w.layer))];
  const at = new Map(report.weights.map((w) => [`${w.layer}|${w.projection}`, w]));
  const pick = (r, c) => at.get(`${rows[r]}|${columns[c]}`);
  const all = report.weights.map(values).filter((v) => v.length);
  if (!all.length) return;
  const high = Math.max(...all.map(median)), low = Math.min(high - LEAST_RANGE, ...all.map(median));
  const colour = (v) => ramp((v - low) / (high - low || 1));
  const map = heatmap({
    rows, columns, colour,
    description: `SQNR of ${plural(report.weights.length, "weight")} by layer and projection, ${decibel(low)} to ${decibel(high)}`,
    value: (r, c) => { const w = pick(r, c); return w && values(w).length ? median(values(w)) : null; },
    label: (r, c) => {
      const w = pick(r, c);
      if (!w) return null;
      const v = values(w);
      if (!v.length) return `${w.name}: exact`;
      return v.length === 1 ? `${w.name}: ${decibel(v[0])}`
        : `${w.name}: median ${decibel(median(v))}, least ${decibel(quantile(v, 0))} of ${v.length} experts`;
    },
  });
  section("How close the weights are", "Signal to quantization noise of every quantized weight, by layer (down) and projection (across); experts by their median. Higher is better, and 6 dB halve the error. NVFP4 is at 18 to 22 dB.",
    map.element, legend(decibel(low), decibel(high), ramp));
}

function expertMap() {
  const stacks = report.weights.filter((w) => w.sqnr_db.length > 1);
  if (!stacks.length) return;
  const projections = [...new Set(stacks.map((w) => w.projection))];
  const columns = Array.from({ length: Math.max(...stacks.map((w) => w.sqnr_db.length)) }, (_, i) => i);
  const all = stacks.flatMap(values).sort((a, b) => a - b);
  const high = quantile(all, 0.995), low = Math.min(high - LEAST_RANGE, quantile(all, 0.005));
  let shown = projections[0];
  const mine = () => stacks.filter((w) => w.projection === shown);
  const map = heatmap({
    get rows() { return mine().map((w) => w.layer); },
    columns,
    colour: (v) => ramp((v - low) / (high - low || 1)),
    description: "SQNR of every expert by layer",
    value: (r, c) => mine()[r].sqnr_db[c],
    label: (r, c) => { const w = mine()[r]; return c < w.sqnr_db.length ? `${w.name}, expert ${c}: ${decibel(w.sqnr_db[c])}` : null; },
  });
  section("Experts one by one", "The same for every expert (across) of every layer (down).",
    picker(projections, (name) => { shown = name; map.draw(); }), map.element, legend(`${decibel(low)} and less`, `${decibel(high)} and more`, ramp));
}

function picker(names, choose) {
  const buttons = names.map((name, i) => make("button", { type: "button", "aria-pressed": String(i === 0) }, name));
  buttons.forEach((button, i) => button.addEventListener("click", () => {
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    choose(names[i]);
  }));
  return make("div", { class: "pick" }, ...buttons);
}

function tokenMap() {
  if (!report.tokens.length) return;
  const rows = report.tokens.map((l) => l.layer);
  const columns = Array.from({ length: Math.max(...report.tokens.map((l) => l.tokens.length)) }, (_, i) => i);
  let most = 1, dead = 0;
  for (const layer of report.tokens) for (const n of layer.tokens) { most = Math.max(most, n); dead += n === 0; }
  const colour = (n) => (n === 0 ? style("--bad") : ramp(0.08 + 0.92 * Math.log1p(n) / Math.log1p(most)));
  const map = heatmap({
    rows, columns, colour,
    description: `Tokens per expert; ${plural(dead, "expert")} saw none`,
    value: (r, c) => report.tokens[r].tokens[c],
    aside: dead ? (r) => report.tokens[r].tokens.filter((n) => n === 0).length : null,
    label: (r, c) => {
      const layer = report.tokens[r];
      if (c >= layer.tokens.length) return null;
      return `${layer.name}, expert ${c}: ${layer.tokens[c] === 0 ? "no token; its weights are scaled by their own maximum, its input by its fellows'" : plural(layer.tokens[c], "token")}`;
    },
  });
  const swatch = make("span", { class: "swatch" });
  const recolour = () => { swatch.style.background = style("--bad"); };
  redraws.push(recolour);
  recolour();
  section("Who saw data", "Tokens that calibration routed to every expert (across) of every layer (down). An expert that no token reached still has sound scales, but more or other text would give its inputs better ones.",
    map.element,
    legend("1 token", plural(most, "token"), (t) => ramp(0.08 + 0.92 * t), make("span", {}, swatch, `no token: ${plural(dead, "expert")}${dead ? ", counted at the right" : ""}`)));
}

function scaleHistogram() {
  const { steps, counts } = report.scales;
  const total = counts.reduce((a, b) => a + b, 0);
  if (!total) return;
  const width = Math.max(280, Math.min(900, page.clientWidth - 60)), height = 200, base = 164, most = Math.max(...counts);
  const used = counts.map((n, i) => [n, i]).filter(([n]) => n > total * 1e-5).map(([, i]) => i);
  const from = Math.min(...used, steps.indexOf(0)) - 1, to = Math.max(...used, steps.indexOf(0)) + 1;
  const shown = steps.map((s, i) => i).filter((i) => i >= from && i <= to);
  const bar = (width - 20) / shown.length;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "histogram of chosen block scales against the plain maximum" });
  shown.forEach((i, n) => {
    const h = (base - 16) * counts[i] / most, x = 10 + n * bar;
    const share = 100 * counts[i] / total;
    svg.append(make("rect", { x: x + 1, y: base - h, width: Math.max(1, bar - 2), height: h, class: steps[i] === 0 ? "mark" : "bar" },
      make("title", {}, `${ratio(steps[i])}: ${share.toFixed(2)} % of blocks`)));
    if (share >= 0.5 && bar > 30) svg.append(make("text", { x: x + bar / 2, y: base - h - 4, "text-anchor": "middle" }, `${share.toFixed(share < 10 ? 1 : 0)} %`));
    const each = Math.ceil(44 / bar);
    if (steps[i] % each === 0) svg.append(make("text", { x: x + bar / 2, y: base + 15, "text-anchor": "middle" }, steps[i] === 0 ? "max" : (steps[i] > 0 ? "+" : "−") + Math.abs(steps[i])));
  });
  svg.append(make("line", { x1: 10, x2: width - 10, y1: base, y2: base }));
  svg.append(make("text", { x: width / 2, y: height - 4, "text-anchor": "middle" }, width > 520 ? "steps of FP8 below and above the scale that reaches the block's maximum; 8 steps are a factor of 2" : "FP8 steps from the block's maximum; 8 are a factor of 2"));
  const searched = counts.some((n, i) => n && steps[i] !== 0);
  section("Chosen scales against the plain maximum",
    searched ? `Where the search of least squared error put the block scales: ${count(total)} blocks sampled. Left of the middle the largest weights of a block are clipped so that the others are finer; right of it the grid fits better with room at the top.`
      : `Every scale reaches its block's maximum: this spec does not search (${count(total)} blocks sampled).`, svg);
}

function ratio(step) {
  return step === 0 ? "the block's maximum" : `${Math.abs(step)} ${Math.abs(step) === 1 ? "step" : "steps"} ${step < 0 ? "below" : "above"}`;
}

function worst() {
  if (!report.worst.length) return;
  const most = Math.max(...report.worst.map((w) => w.noise));
  const rows = report.worst.map((w) => make("div", { class: "row" },
    make("code", { class: "name" }, w.name + (w.expert === null ? "" : ` · expert ${w.expert}`)),
    make("span", { class: "number" }, decibel(w.sqnr_db)),
    make("div", { class: "track", title: `noise ${(100 * w.noise).toFixed(2)} % of the signal, its fellows' ${(100 * w.typical).toFixed(2)} %` },
      make("i", { style: `width:${100 * w.noise / most}%` }), make("b", { style: `left:${100 * w.typical / most}%` })),
    make("div", { class: "why" }, w.reason)));
  section("The worst weights, and why", "Bars: noise as a share of the signal's power; the mark is where weights of the same projection are.", make("div", { class: "rows" }, ...rows));
}

function parts(title, text, items) {
  const total = items.reduce((sum, item) => sum + item.value, 0);
  if (!total) return;
  const bar = make("div", { class: "stack" }), names = make("div", { class: "legend" });
  items.filter((item) => item.value > 0).forEach((item, i, list) => {
    const colour = ramp(list.length < 2 ? 0.4 : 0.15 + 0.75 * i / (list.length - 1));
    bar.append(make("i", { style: `width:${100 * item.value / total}%;background:${colour}`, title: item.text }));
    names.append(make("span", {}, make("span", { class: "swatch", style: `background:${colour}` }), item.text));
  });
  section(title, text, bar, names);
}

function sizes() {
  const { weights, scales, untouched } = report.sizes;
  parts("Where the bytes are", "", [
    { value: weights, text: `packed weights ${size(weights)}` },
    { value: scales, text: `their scales ${size(scales)}` },
    { value: untouched, text: `left as they were ${size(untouched)}` },
  ]);
}

function timings() {
  const { seconds, peak_host_bytes: host, peak_device_bytes: device } = report.measured;
  const memory = [host && `${size(host)} of memory`, device && `${size(device)} on the GPU`].filter(Boolean).join(", ");
  parts("Where the time went", memory && `At most ${memory}.`,
    Object.entries(seconds).map(([name, value]) => ({ value, text: `${name} ${duration(value)}` })));
}

function table(heads, rows) {
  const cell = (tag, text) => make(tag, typeof text === "number" ? { class: "number" } : {}, typeof text === "number" ? count(text) : text);
  return make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", {}, text)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text) => cell("td", text))))));
}

function lists() {
  if (report.groups.length)
    section("Linears that share their scales", "Engines merge them, so they have one global scale and one input scale.",
      table(["weights", "groups"], report.groups.map((g) => [make("code", {}, g.linears), g.count])));
  if (report.rewritten.length) {
    const total = report.rewritten.reduce((sum, r) => sum + r.count, 0);
    const untied = report.untied.length ? ` ${report.untied.join(", ")}: its tensor is shared in the source, its own here.` : "";
    section(`${plural(total, "tensor")} rewritten by passes`, `The checkpoint holds what passes of the spec computed here, not the source's values.${untied}`,
      table(["name", "tensors"], report.rewritten.map((r) => [make("code", {}, r.name), r.count])));
  }
  if (report.excluded.length)
    section("Left as they are", "",
      table(["name", "tensors", "why"], report.excluded.map((e) => [make("code", {}, e.name), e.count, e.reason])));
}

heading();
warnings();
sqnrMap();
expertMap();
tokenMap();
scaleHistogram();
worst();
sizes();
timings();
lists();

let width = window.innerWidth;
const redraw = () => redraws.forEach((draw) => draw());
window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; redraw(); } });
window.addEventListener("beforeprint", redraw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
