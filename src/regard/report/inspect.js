"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const dialog = document.getElementById("head");
const view = document.getElementById("view");
const chosen = document.getElementById("chosen");
const ROW = 20, SHOWN = 0.05, LEVELS = 8, TOLD = 5;
const HINTS = {
  columns: "Choose a token to see what it looks at, and who looks at it.",
  picture: "Choose a patch to see what it looks at.",
};
const unpacked = new Map();
let now = null;

const percent = value => (100 * value).toFixed(value < 0.0995 ? 1 : 0) + "%";

function make(tag, attributes = {}, text = "") {
  const svg = ["svg", "g", "path", "rect", "image"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

function bytes(text) {
  return Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer;
}

function unpack(index) {
  if (!unpacked.has(index)) {
    const layer = DATA.layers[index];
    unpacked.set(index, {
      keys: new Uint16Array(bytes(layer.top_keys)),
      weights: new Uint8Array(bytes(layer.top_weights)),
      entropy: new Uint8Array(bytes(layer.entropy)),
      received: new Float32Array(bytes(layer.received)),
    });
  }
  return unpacked.get(index);
}

// All that the page draws of one head.
function headOf(index, number) {
  const layer = DATA.layers[index], arrays = unpack(index), kept = layer.kept;
  const queries = DATA.lines[layer.queries], keys = DATA.lines[layer.keys];
  const start = number * queries.labels.length * kept;
  return {
    index, number, layer, queries, keys,
    head: layer.heads[number],
    received: arrays.received.subarray(number * keys.labels.length, (number + 1) * keys.labels.length),
    entropy: query => arrays.entropy[number * queries.labels.length + query] / 255,
    looks: query => Array.from({length: kept}, (_, rank) => ({
      query,
      key: arrays.keys[start + query * kept + rank],
      weight: (arrays.weights[start + query * kept + rank] / 255) ** 2,
    })).filter(look => look.weight > 0),
  };
}

const label = (line, at) => line.labels[at].replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "␣";
const said = (line, at) => line.kinds[at] === "patch" ? `patch ${line.labels[at]}` : `“${label(line, at).trim() || "␣"}” (${at})`;

function open(index, number) {
  now = headOf(index, number);
  const {head, layer, keys} = now;
  const title = document.getElementById("head-title");
  const mark = make("span", {class: `cell ${head.role}`, "aria-hidden": "true"}, DATA.roles[head.role].letter);
  title.replaceChildren(mark, `Layer ${layer.title}, head ${head.head}: ${head.role}`);
  const entropy = `Entropy ${head.entropy.toFixed(2)} nats, ${percent(head.breadth)} of the greatest; largest weight ` +
    `${percent(head.peak)}` + (head.distance === null ? "" : `; mean distance ${head.distance.toFixed(1)}`);
  const windows = layer.windows > 1 ? ` It attends within ${layer.windows} windows: the numbers are their mean, the first is drawn.` : "";
  document.getElementById("head-text").textContent = `This head ${head.text}. ${entropy}.${windows}`;
  const names = {sink: `sink ${said(keys, head.sink_at)}`, ...(keys.grid ? {previous: "to the left", next: "to the right"} : {})};
  const rows = Object.entries(head.looks).map(([target, look]) => {
    const row = make("tr");
    row.append(make("th", {scope: "row"}, names[target] || target));
    for (const value of [look.share, look.most, look.chance]) row.append(make("td", {}, percent(value)));
    return row;
  });
  document.querySelector("#numbers tbody").replaceChildren(...rows);
  drawMap();
  const pictured = keys.grid && layer.queries === layer.keys;
  chosen.textContent = pictured ? HINTS.picture : HINTS.columns;
  if (pictured) drawPicture(); else drawColumns();
  const cells = [...document.querySelectorAll(".heads .cell")];
  const at = cells.findIndex(cell => +cell.dataset.layer === index && +cell.dataset.head === number);
  document.getElementById("before").disabled = at === 0;
  document.getElementById("after").disabled = at === cells.length - 1;
  now.cells = cells;
  now.at = at;
  focusable(cells[at]);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  dialog.style.setProperty("--bar", document.querySelector(".bar").offsetHeight + "px");
  title.focus();
  history.replaceState(null, "", `#layer-${index}-head-${number}`);
}

function drawMap() {
  const canvas = document.getElementById("map"), {queries, keys, head, layer} = now;
  const height = queries.labels.length, width = keys.labels.length, side = Math.max(1, Math.ceil(416 / width));
  canvas.width = width * side;
  canvas.height = height * side;
  canvas.setAttribute("aria-label", `Map of the largest weights of layer ${layer.title}, head ${head.head}`);
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  for (let query = 0; query < height; query++) {
    for (const {key, weight} of now.looks(query)) {
      pen.fillStyle = `rgb(0 58 96 / ${Math.sqrt(weight)})`;
      pen.fillRect(key * side, query * side, side, side);
    }
  }
}

// Lines of one strength are one path: thousands of elements would be slow.
function paths(looks, from, to, least) {
  const levels = Array.from({length: LEVELS}, () => []);
  for (const look of looks) {
    if (look.weight < least) continue;
    levels[Math.min(LEVELS - 1, Math.floor(look.weight * LEVELS))].push(`M${from(look.query)}L${to(look.key)}`);
  }
  return levels.flatMap((parts, level) => parts.length
    ? [make("path", {d: parts.join(""), "stroke-opacity": (0.12 + 0.88 * (level + 0.5) / LEVELS).toFixed(2)})] : []);
}

const every = () => now.queries.labels.flatMap((_, query) => now.looks(query));

function sides(side, at) {
  return side === "query" ? now.looks(at) : every().filter(look => look.key === at).sort((a, b) => b.weight - a.weight);
}

function tell(side, at, looks) {
  const {queries, keys} = now, least = 0.005;
  const strong = looks.filter(look => look.weight >= least).slice(0, TOLD);
  if (side === "query") {
    const list = strong.map(look => `${said(keys, look.key)} ${percent(look.weight)}`).join(", ");
    chosen.textContent = `${said(queries, at)} looks at ${list || "nothing in particular"}. Entropy ${percent(now.entropy(at))} of the greatest.`;
  } else {
    const list = strong.map(look => `${said(queries, look.query)} ${percent(look.weight)}`).join(", ");
    chosen.textContent = `${said(keys, at)} is looked at by ${list || "no token in particular"}; it gets ${percent(now.received[at])} of the others’ attention on average.`;
  }
}

function listed(line, name) {
  const list = make("ul", {role: "listbox", "aria-label": name});
  line.labels.forEach((_, at) => {
    const item = make("li", {role: "option", tabindex: at ? -1 : 0, "aria-selected": "false", "data-at": at, title: said(line, at)});
    item.textContent = label(line, at);
    if (line.kinds[at] === "special") item.classList.add("special-token");
    list.append(item);
  });
  return list;
}

function drawColumns() {
  const {queries, keys} = now;
  const left = listed(queries, "Tokens that look"), right = listed(keys, "Tokens that are looked at");
  const height = ROW * Math.max(queries.labels.length, keys.labels.length);
  const picture = make("svg", {viewBox: `0 0 100 ${height}`, preserveAspectRatio: "none", "aria-hidden": "true", style: `height:${height}px`});
  const from = query => `0 ${ROW * (query + 0.5)}`, to = key => `100 ${ROW * (key + 0.5)}`;
  const all = make("g", {class: "all"}), own = make("g", {class: "own"});
  all.append(...paths(every(), from, to, SHOWN));
  picture.append(all, own);
  const columns = make("div", {class: "columns"});
  columns.append(left, picture, right);
  function choose(side, at) {
    const looks = side === "query" ? now.looks(at) : sides(side, at);
    for (const item of columns.querySelectorAll("li")) {
      item.style.background = "";
      item.setAttribute("aria-selected", String((item.parentNode === left) === (side === "query") && +item.dataset.at === at));
    }
    for (const look of looks) {
      const item = side === "query" ? right.children[look.key] : left.children[look.query];
      item.style.background = `rgb(213 94 0 / ${(0.1 + 0.6 * look.weight).toFixed(2)})`;
    }
    columns.classList.add("picked");
    own.replaceChildren(...paths(looks, from, to, 0));
    tell(side, at, looks);
  }
  pickable(left, at => choose("query", at), 1);
  pickable(right, at => choose("key", at), 1);
  const note = make("p", {class: "soft"}, `Left looks at right. Lines from ${percent(SHOWN)} on, of the ${now.layer.kept} largest weights of each token.`);
  view.replaceChildren(note, columns);
}

function drawPicture() {
  const {queries, keys} = now, [rows, width] = keys.grid;
  const patches = keys.kinds.flatMap((kind, at) => kind === "patch" ? [at] : []), first = patches[0];
  const frame = make("div", {class: "picture"});
  const picture = make("svg", {viewBox: `0 0 ${width} ${rows}`, role: "listbox", "aria-label": "Patches of the picture"});
  const whole = DATA.layers.every(layer => DATA.lines[layer.keys].labels.length <= keys.labels.length) && now.layer.windows === 1;
  if (PICTURE && whole) picture.append(make("image", {href: PICTURE, x: 0, y: 0, width, height: rows, preserveAspectRatio: "none"}));
  const squares = patches.map((at, place) => make("rect", {
    x: place % width, y: Math.floor(place / width), width: 1, height: 1, role: "option", tabindex: place ? -1 : 0,
    "aria-selected": "false", "aria-label": said(keys, at), "data-at": at,
  }));
  const own = make("g");
  picture.append(...squares, own);
  const others = keys.kinds.flatMap((kind, at) => kind === "patch" ? [] : [at]);
  const chips = make("ul", {class: "chips", role: "listbox", "aria-label": "Other tokens"});
  others.forEach((at, place) => chips.append(make("li", {role: "option", tabindex: place ? -1 : 0, "aria-selected": "false", "data-at": at}, label(keys, at))));
  const items = [...squares, ...chips.children];
  function shade(strength) {
    for (const item of items) {
      const value = strength.get(+item.dataset.at) || 0;
      if (item.tagName === "rect") item.style.fillOpacity = (0.8 * value).toFixed(3);
      else item.style.background = value ? `rgb(213 94 0 / ${(0.8 * value).toFixed(2)})` : "";
    }
  }
  const middle = at => `${(at - first) % width + 0.5} ${Math.floor((at - first) / width) + 0.5}`;
  function choose(at) {
    const looks = now.looks(at), most = Math.max(...looks.map(look => look.weight));
    for (const item of items) item.setAttribute("aria-selected", String(+item.dataset.at === at));
    shade(new Map(looks.map(look => [look.key, look.weight / most])));
    const drawn = at < first ? [] : looks.filter(look => look.key >= first).map(look => ({...look, weight: look.weight / most}));
    own.replaceChildren(...paths(drawn, middle, middle, 0));
    tell("query", at, looks);
  }
  const top = Math.max(...now.received);
  shade(new Map([...now.received].map((value, at) => [at, value / top])));
  pickable(picture, choose, width);
  pickable(chips, choose, 1);
  frame.append(picture);
  const note = make("p", {class: "soft"}, "Shaded is what is looked at: by all, until a patch is chosen; then by that one.");
  view.replaceChildren(note, ...(others.length ? [chips] : []), frame);
}

// One of the items can be reached with Tab; arrows go on from there.
function pickable(list, choose, across) {
  const items = [...list.querySelectorAll("[role=option]")];
  const go = item => {
    for (const other of items) other.setAttribute("tabindex", -1);
    item.setAttribute("tabindex", 0);
    item.focus({preventScroll: item.tagName === "rect"});
    choose(+item.dataset.at);
  };
  list.addEventListener("click", event => {
    const item = event.target.closest("[role=option]");
    if (item) go(item);
  });
  list.addEventListener("keydown", event => {
    const at = items.indexOf(event.target.closest("[role=option]"));
    const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across, Home: -at, End: items.length - 1 - at, Enter: 0, " ": 0};
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const item = items[at + steps[event.key]];
    if (item) go(item);
  });
}

function focusable(cell) {
  for (const other of cell.closest(".heads").querySelectorAll(".cell")) other.tabIndex = -1;
  cell.tabIndex = 0;
}

for (const grid of document.querySelectorAll(".heads")) {
  const rows = [...grid.querySelectorAll("[role=row]")].map(row => [...row.querySelectorAll(".cell")]);
  focusable(rows[0][0]);
  grid.addEventListener("keydown", event => {
    const row = rows.findIndex(cells => cells.includes(event.target));
    if (row < 0) return;
    const column = rows[row].indexOf(event.target), last = rows[row].length - 1;
    const places = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, last],
    };
    if (!(event.key in places)) return;
    event.preventDefault();
    const [y, x] = places[event.key], cells = rows[y];
    const cell = cells && x >= 0 ? cells[Math.min(x, cells.length - 1)] : null;
    if (cell && x <= last) { focusable(cell); cell.focus(); }
  });
}

document.addEventListener("click", event => {
  const button = event.target.closest("button[data-head]");
  if (button) open(+button.dataset.layer, +button.dataset.head);
});
for (const [name, step] of [["before", -1], ["after", 1]]) {
  document.getElementById(name).addEventListener("click", event => {
    const cell = now.cells[now.at + step];
    open(+cell.dataset.layer, +cell.dataset.head);
    if (!event.currentTarget.disabled) event.currentTarget.focus();
  });
}
document.getElementById("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => {
  history.replaceState(null, "", location.pathname + location.search);
  now.cells[now.at].focus();
});

const asked = /^#layer-(\d+)-head-(\d+)$/.exec(location.hash);
if (asked && DATA.layers[+asked[1]]?.heads[+asked[2]]) open(+asked[1], +asked[2]);
