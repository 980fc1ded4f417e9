"use strict";
const content = JSON.parse(document.getElementById("data").textContent);
const [graphPane, nodePane] = [document.getElementById("graph"), document.getElementById("node")];
const [stageBox, sinceBox, searchBox] = ["stage", "since", "search"].map((id) => document.getElementById(id));
const AT_ONCE = 200; // rows put on the page at a time

let lines, stages, stage, since = null, chosen = null;

// ---- the data

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const nameOf = (line) => (line.startsWith("%") ? line.slice(1, line.indexOf(" ")) : "output");

function parsed(line) {
  const match = /^%(\w+) : (.*?) = (.*)$/s.exec(line);
  if (!match) return { name: "output", type: "", call: line, op: "return", parameter: null };
  const [, name, type, call] = match;
  const parameter = call.startsWith("@") ? call.slice(1) : null;
  return { name, type, call, op: parameter ? "parameter" : call.slice(0, call.indexOf("(")), parameter };
}

const inputsOf = (line) => [...new Set([...line.slice(line.indexOf(" = ") + 1).matchAll(/%(\w+)/g)].map((m) => m[1]))];

// A stage with its order spelt out, its nodes by name, and (when first asked for) who reads whom.
function open(index) {
  const made = stages[index];
  if (made.order) return made;
  made.order = [];
  for (let i = 0; i < made.runs.length; i += 2)
    for (let n = 0; n < made.runs[i + 1]; n++) made.order.push(made.runs[i] + n);
  made.at = new Map(made.order.map((line, place) => [nameOf(lines[line]), place]));
  return made;
}

function usersOf(index) {
  const made = open(index);
  if (!made.users) {
    made.users = new Map();
    for (const line of made.order)
      for (const input of inputsOf(lines[line])) {
        if (!made.users.has(input)) made.users.set(input, []);
        made.users.get(input).push(nameOf(lines[line]));
      }
  }
  return made.users;
}

// added, changed: places in the stage; removed: lines of the earlier one. sums: both, counted from the start.
function changes(from, to) {
  const before = open(from), after = open(to);
  const kind = after.order.map((line) => {
    const place = before.at.get(nameOf(lines[line]));
    return place === undefined ? "added" : before.order[place] === line ? "" : "changed";
  });
  const removed = before.order.filter((line) => !after.at.has(nameOf(lines[line])));
  const sums = { added: [0], changed: [0] };
  for (const k of kind) for (const which of ["added", "changed"]) sums[which].push(sums[which].at(-1) + (k === which));
  return { kind, removed, sums };
}

// ---- elements

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function row(line, mark = "") {
  const { name, type, op, call, parameter } = parsed(lines[line]);
  const rest = parameter ? `@${parameter}` : call.slice(op === "return" ? 0 : op.length);
  const made = make("button", { type: "button", class: `line ${mark}`, title: lines[line].slice(0, 600) },
    ...(op === "return" ? [] : [`%${name} `, make("span", { class: "type" }, type), " = "]),
    ...(parameter || op === "return" ? [] : [make("span", { class: "op" }, op)]), rest.slice(0, 300));
  if (name === chosen) made.setAttribute("aria-current", "true");
  made.dataset.name = name;
  made.addEventListener("click", () => choose(name));
  return made;
}

// Appends make(i) for all i below count, AT_ONCE of them now and the rest when asked.
function append(parent, count, makeRow, from = 0) {
  const until = Math.min(count, from + AT_ONCE);
  for (let i = from; i < until; i++) parent.append(makeRow(i));
  if (until === count) return;
  const more = make("button", { type: "button", class: "more" }, `${(count - until).toLocaleString("en-US")} more`);
  more.addEventListener("click", () => { more.remove(); append(parent, count, makeRow, until); });
  parent.append(more);
}

// start, end: the places it holds, for `reveal`; none in a list of changes.
function foldRow(label, marks, fill, start = -1, end = -1) {
  const made = make("button", { type: "button", class: "fold", "aria-expanded": "false", "data-start": start, "data-end": end }, label, ...marks);
  const inside = make("div", { class: "inside" });
  inside.hidden = true;
  made.addEventListener("click", () => {
    if (!inside.childElementCount) fill(inside);
    inside.hidden = !inside.hidden;
    made.setAttribute("aria-expanded", String(!inside.hidden));
  });
  const both = document.createDocumentFragment();
  both.append(made, inside);
  return both;
}

// ---- the folded graph

const leaves = (shape) => shape.reduce((sum, item) => sum + (typeof item === "number" ? item : item[0] * leaves(item[1])), 0);

function marksOf(start, count) {
  if (!stage.change) return [];
  return ["added", "changed"].flatMap((which) => {
    const n = stage.change.sums[which][start + count] - stage.change.sums[which][start];
    return n ? [make("span", { class: `mark ${which}` }, `${which === "added" ? "+" : "~"}${n.toLocaleString("en-US")}`)] : [];
  });
}

// One row an item of the shape: single lines, or what repeats.
function fill(parent, shape, start) {
  const rows = [];
  for (const item of shape) {
    if (typeof item === "number") {
      for (let i = 0; i < item; i++) { const place = start + i; rows.push(() => placeRow(place)); }
      start += item;
    } else {
      const [count, inner] = item, size = leaves(inner), first = start;
      rows.push(() => repeats(count, inner, size, first));
      start += count * size;
    }
  }
  append(parent, rows.length, (i) => rows[i]());
}

function placeRow(place) {
  const made = row(stage.order[place], stage.change ? stage.change.kind[place] : "");
  made.dataset.place = place;
  return made;
}

// Open whatever hides a node, and bring it into view.
function reveal(name) {
  const place = stage.at.get(name);
  if (place === undefined || searchBox.value.trim()) return;
  for (;;) {
    const shown = graphPane.querySelector(`[data-place="${place}"]`);
    if (shown) return shown.scrollIntoView({ block: "center" });
    const hides = (fold) => Number(fold.dataset.start) <= place && place < Number(fold.dataset.end);
    const closed = [...graphPane.querySelectorAll('.fold[aria-expanded="false"]')].find(hides);
    const next = closed || [...graphPane.querySelectorAll(".more")].at(-1);
    if (!next) return;
    next.click();
  }
}

function repeats(count, inner, size, first) {
  const label = make("b", {}, `${count} × `);
  const what = labelOf(first, size, first + size);
  const text = size === 1 ? `${what.label} …` : `${what.label} …   ${size.toLocaleString("en-US")} nodes: ${what.sample}`;
  return foldRow(make("span", {}, label, text), marksOf(first, count * size), (inside) => append(inside, count, (k) => {
    const start = first + k * size;
    if (size === 1) return placeRow(start);
    const other = k === 0 ? first + size : first;
    return foldRow(labelOf(start, size, other).label, marksOf(start, size), (deeper) => fill(deeper, inner, start), start, start + size);
  }), first, first + count * size);
}

// What a repetition is about: its first name with a number by which it differs from another repetition, up to there.
function labelOf(start, size, other) {
  const sample = [];
  let label = null;
  for (let i = 0; i < size; i++) {
    const { op, parameter, name } = parsed(lines[stage.order[start + i]]);
    if (parameter && (label === null || !label.parameter)) {
      const until = differs(parameter, parsed(lines[stage.order[other + i]]).parameter || "");
      if (until) label = { text: parameter.slice(0, until), parameter: true };
    } else if (label === null && !/^\w+?_?\d*$/.test(name.replace(/_e\d+.*$/, "_e"))) {
      const until = differs(name, nameOf(lines[stage.order[other + i]]));
      if (until) label = { text: `%${name.slice(0, until)}`, parameter: false };
    }
    if (!parameter && !sample.includes(op)) sample.push(op);
    if (label?.parameter && sample.length > 6) break;
  }
  const notable = sample.filter((op) => op.startsWith("fxq.") || /linear|mm|attention|topk|embedding/.test(op));
  return { label: label ? label.text : `%${nameOf(lines[stage.order[start]])}`, sample: (notable.length ? notable : sample).slice(0, 5).join(", ") };
}

function differs(text, other) {
  const numbers = /\d+/g, theirs = other.match(numbers) || [];
  let match, i = 0;
  while ((match = numbers.exec(text))) if (match[0] !== theirs[i++]) return match.index + match[0].length;
  return 0;
}

// ---- views

function show() {
  const index = Number(stageBox.value);
  stage = open(index);
  since = sinceBox.value === "" ? null : Number(sinceBox.value);
  stage.change = since === null ? null : changes(since, index);
  graphPane.replaceChildren();
  const words = searchBox.value.trim();
  if (words) showFound(words);
  else if (stage.change) showChanges();
  if (!words) {
    graphPane.append(note(`${stage.order.length.toLocaleString("en-US")} nodes after ${stage.name}`));
    fill(graphPane, stage.folds, 0);
  }
}

const note = (text) => make("div", { class: "note" }, text);

function showFound(words) {
  const pattern = words.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join(".*");
  const test = new RegExp(pattern.replace(/^%/, "%?"), "i");
  const found = [];
  stage.order.forEach((line, place) => {
    const { name, op, parameter } = parsed(lines[line]);
    if (test.test(name) || test.test(op) || (parameter && test.test(parameter))) found.push(place);
  });
  graphPane.append(note(`${found.length.toLocaleString("en-US")} of ${stage.order.length.toLocaleString("en-US")} nodes`));
  append(graphPane, found.length, (i) => placeRow(found[i]));
}

// Changed nodes by kind, alike ones together.
function showChanges() {
  const { kind, removed } = stage.change, before = stages[since];
  const added = [], changed = [];
  kind.forEach((k, place) => { if (k === "added") added.push(stage.order[place]); else if (k) changed.push(stage.order[place]); });
  graphPane.append(note(`since ${before.name}: ${added.length} added, ${changed.length} changed, ${removed.length} removed`));
  for (const [which, list] of [["added", added], ["changed", changed], ["removed", removed]])
    for (const group of alike(list))
      graphPane.append(foldRow(make("span", {}, make("b", {}, `${group.length} × `), parsed(lines[group[0]]).op + " " + parsed(lines[group[0]]).type),
        [make("span", { class: `mark ${which}` }, which)],
        (inside) => append(inside, group.length, (i) => row(group[i], which))));
}

function alike(list) {
  const groups = new Map();
  for (const line of list) {
    const { op, type } = parsed(lines[line]);
    if (!groups.has(`${op} ${type}`)) groups.set(`${op} ${type}`, []);
    groups.get(`${op} ${type}`).push(line);
  }
  return [...groups.values()].sort((a, b) => b.length - a.length);
}

function choose(name) {
  chosen = name;
  for (const element of graphPane.querySelectorAll("[aria-current]")) element.removeAttribute("aria-current");
  for (const element of graphPane.querySelectorAll(`[data-name="${CSS.escape(name)}"]`)) element.setAttribute("aria-current", "true");
  const history = stages.map((_, index) => { const made = open(index), place = made.at.get(name); return place === undefined ? null : made.order[place]; });
  const shown = Number(stageBox.value), line = history[shown] ?? history.find((l) => l !== null);
  if (line === undefined || line === null) return;
  const { type, op, parameter } = parsed(lines[line]);
  const facts = make("dl");
  const fact = (label, text) => facts.append(make("dt", {}, label), make("dd", {}, text));
  if (type) fact("type", type);
  fact("operator", op);
  if (parameter) fact("parameter", parameter);
  const first = history.findIndex((l) => l !== null);
  fact("made by", stages[first].name);
  const edits = stages.filter((_, i) => i > first && history[i] !== null && history[i] !== history[i - 1] && history[i - 1] !== null);
  if (edits.length) fact("changed by", edits.map((s) => s.name).join(", "));
  const gone = history.findIndex((l, i) => i > first && l === null);
  if (gone > 0) fact("removed by", stages[gone].name);
  nodePane.replaceChildren(make("h2", { class: "mono" }, `%${name}`), facts);
  titled("line", make("pre", { class: "mono" }, lines[line]));
  const old = since !== null ? history[since] : null;
  if (old !== null && old !== undefined && old !== line) titled(`line after ${stages[since].name}`, make("pre", { class: "mono" }, lines[old]));
  links("input", inputsOf(lines[line]));
  links("user", usersOf(history[shown] === null ? first : shown).get(name) || []);
}

function titled(title, ...children) {
  nodePane.append(make("h3", {}, title), ...children);
}

function links(title, names) {
  const list = make("div");
  append(list, names.length, (i) => {
    const link = make("a", { href: "#", class: "mono" }, `%${names[i]}`);
    link.addEventListener("click", (event) => { event.preventDefault(); reveal(names[i]); choose(names[i]); });
    return make("div", {}, link);
  });
  titled(`${names.length} ${title}${names.length === 1 ? "" : "s"}`, list);
}

async function start() {
  ({ lines, stages } = await unpack(content.packed));
  document.querySelector("h1").textContent = content.title;
  stages.forEach((s, i) => {
    stageBox.append(make("option", { value: i }, i ? `after ${s.name}` : s.name));
    sinceBox.append(make("option", { value: i }, s.name));
  });
  sinceBox.prepend(make("option", { value: "" }, "–"));
  stageBox.value = String(stages.length - 1);
  const compared = stages.findIndex((s) => s.name === content.compared);
  sinceBox.value = compared < 0 ? "" : String(compared);
  nodePane.append(note("Choose a node to see its type, what made it, what it reads and what reads it."));
  for (const box of [stageBox, sinceBox]) box.addEventListener("change", show);
  let waiting;
  searchBox.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(show, 150); });
  show();
  document.body.dataset.ready = "yes";
}

start();
