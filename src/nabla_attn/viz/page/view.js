"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const [TIME, ROWS, COLUMNS] = data.blocks;
const COUNT = TIME * ROWS * COLUMNS;
const STRIDE = Math.ceil(COUNT / 8);
const AXES = {step: data.steps, layer: data.layers, head: data.heads};
const state = {step: 0, layer: 0, head: 0, block: 0, isHeld: false, direction: "out"};
const PLAY_MILLISECONDS = 900;
let masks, scores, canvases = [], timer = 0;

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function mapIndex(head) {
  return (state.step * AXES.layer.length + state.layer) * AXES.head.length + head;
}

function isKept(head, query, key) {
  const byte = masks[(mapIndex(head) * COUNT + query) * STRIDE + (key >> 3)];
  return (byte >> (7 - (key & 7))) & 1;
}

function score(head, query, key) {
  const byte = scores[(mapIndex(head) * COUNT + query) * COUNT + key];
  return byte === 0 ? 0 : 2 ** ((byte / 255 - 1) * data.scoreBits);
}

// The last stop of the head slider stands for all recorded heads.
function shownHeads() {
  return state.head < AXES.head.length ? [state.head] : AXES.head.map((_, index) => index);
}

// Share of the shown heads that keep the pair, for every block.
function shares() {
  const heads = shownHeads();
  const result = new Float32Array(COUNT);
  for (let other = 0; other < COUNT; other++) {
    const [query, key] = state.direction === "out" ? [state.block, other] : [other, state.block];
    for (const head of heads) result[other] += isKept(head, query, key) / heads.length;
  }
  return result;
}

function place(block) {
  const inFrame = ROWS * COLUMNS;
  return [Math.floor(block / inFrame), Math.floor((block % inFrame) / COLUMNS), block % COLUMNS];
}

// The latent frames that blocks of one place in time hold: the last of a ragged grid hold fewer.
function frameNames(time) {
  const first = time * data.block[0] + 1;
  const last = Math.min(first + data.block[0] - 1, data.grid[0]);
  return last > first ? `frames ${first}–${last}` : `frame ${first}`;
}

function color(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

// Edges of a block in the picture: the last ones of a ragged grid are smaller.
function box(row, column, width, height) {
  const [, tokenRows, tokenColumns] = data.grid;
  const [, blockRows, blockColumns] = data.block;
  const x0 = column * blockColumns / tokenColumns * width;
  const y0 = row * blockRows / tokenRows * height;
  const x1 = Math.min(1, (column + 1) * blockColumns / tokenColumns) * width;
  const y1 = Math.min(1, (row + 1) * blockRows / tokenRows) * height;
  return [x0, y0, x1 - x0, y1 - y0];
}

function draw() {
  const lit = shares();
  const chosen = color("--chosen"), shade = color("--shade"), line = color("--line"), accent = color("--accent");
  canvases.forEach((canvas, time) => {
    const context = canvas.getContext("2d");
    const {width, height} = canvas;
    context.clearRect(0, 0, width, height);
    for (let row = 0; row < ROWS; row++) {
      for (let column = 0; column < COLUMNS; column++) {
        const block = (time * ROWS + row) * COLUMNS + column;
        const edges = box(row, column, width, height);
        if (lit[block] < 1) {
          context.globalAlpha = 1 - lit[block];
          context.fillStyle = shade;
          context.fillRect(...edges);
          context.globalAlpha = 1;
        }
        const thick = lit[block] > 0 ? 2 : 1;
        context.lineWidth = thick;
        context.strokeStyle = lit[block] > 0 ? accent : line;
        context.strokeRect(edges[0] + thick / 2, edges[1] + thick / 2, edges[2] - thick, edges[3] - thick);
      }
    }
    const [chosenTime, row, column] = place(state.block);
    if (chosenTime === time) {
      const [x, y, w, h] = box(row, column, width, height);
      context.lineWidth = 4;
      context.strokeStyle = chosen;
      context.strokeRect(x + 2, y + 2, w - 4, h - 4);
    }
  });
  return lit;
}

function percent(value) { return value >= .01 ? `${(100 * value).toFixed(1)} %` : `${(100 * value).toPrecision(2)} %`; }

function describe(lit, pointed) {
  const kept = lit.reduce((sum, value) => sum + (value > 0), 0);
  const [time, row, column] = place(state.block);
  const verb = state.direction === "out" ? "attends" : "is attended by";
  let text = `Block ${frameNames(time)}, row ${row + 1}, column ${column + 1} ${verb} ${kept} of ${COUNT} blocks`;
  if (shownHeads().length > 1) text += ` in some of ${shownHeads().length} heads`;
  text += ".";
  if (pointed !== undefined && data.scoreBits && shownHeads().length === 1) {
    const head = state.head;
    const pair = state.direction === "out" ? [state.block, pointed] : [pointed, state.block];
    const value = score(head, ...pair);
    let rank = 1;
    for (let key = 0; key < COUNT; key++) rank += score(head, pair[0], key) > value;
    const [t, r, c] = place(pointed);
    text += ` Block ${frameNames(t)}, row ${r + 1}, column ${c + 1}: score ${percent(value)}, `
      + `rank ${rank} of ${COUNT}, ${isKept(head, ...pair) ? "kept" : "dropped"}.`;
  }
  $("status").textContent = text;
}

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function drawHeat(id, values, name) {
  const [steps, layers] = data.counts;
  const left = 26, bottom = 30, width = 320, height = Math.min(170, Math.max(90, layers * 14));
  const cellWidth = (width - left) / steps, cellHeight = height / layers;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height + bottom}`);
  svg.setAttribute("role", "img");
  const all = values.flat().filter((value) => value !== null);
  const mean = all.reduce((sum, value) => sum + value, 0) / all.length;
  svg.setAttribute("aria-label", `${name} by step and layer: mean ${percent(mean)}, `
    + `lowest ${percent(Math.min(...all))}, highest ${percent(Math.max(...all))}`);
  for (let step = 0; step < steps; step++) {
    for (let layer = 0; layer < layers; layer++) {
      const value = values[step][layer];
      const isRecorded = data.steps.includes(step) && data.layers.includes(layer);
      const rect = element("rect", {
        x: left + step * cellWidth, y: layer * cellHeight,
        width: Math.max(.5, cellWidth - (cellWidth > 4 ? 1 : 0)),
        height: Math.max(.5, cellHeight - (cellHeight > 4 ? 1 : 0)),
        style: `fill: color-mix(in oklab, var(--high) ${100 * (value ?? 0)}%, var(--low))`,
        class: isRecorded ? "recorded" : "unrecorded",
      }, svg);
      let text = `step ${step}, layer ${layer}: ${value === null ? "not run" : percent(value)}`;
      if (id === "heat-recall") text += `, at best ${percent(data.best[step][layer] ?? 0)}`;
      element("title", {}, rect, text + (isRecorded ? "" : " (map not recorded)"));
      if (isRecorded) {
        rect.addEventListener("click", () => {
          set("step", data.steps.indexOf(step));
          set("layer", data.layers.indexOf(layer));
        });
      }
    }
  }
  const here = data.steps[state.step], there = data.layers[state.layer];
  element("rect", {class: "here", x: left + here * cellWidth, y: there * cellHeight,
    width: cellWidth, height: cellHeight}, svg);
  element("text", {x: left, y: height + 13}, svg, "step 0");
  element("text", {x: width, y: height + 13, "text-anchor": "end"}, svg, `${steps - 1}`);
  element("text", {x: 0, y: 10}, svg, "0");
  element("text", {x: 0, y: height - 2}, svg, `${layers - 1}`);
  element("text", {x: left, y: height + 26}, svg, `layer 0 on top; mean ${percent(mean)}, here `
    + `${values[here][there] === null ? "not run" : percent(values[here][there])}`);
  $(id).replaceChildren(svg);
}

function drawHistogram() {
  const counts = [];
  for (const head of shownHeads()) {
    for (let query = 0; query < COUNT; query++) {
      let kept = 0;
      for (let key = 0; key < COUNT; key++) kept += isKept(head, query, key);
      counts.push(kept);
    }
  }
  const numBins = Math.min(24, COUNT), bins = new Array(numBins).fill(0);
  for (const kept of counts) bins[Math.ceil(kept * numBins / COUNT) - 1]++;
  const width = 320, height = 90, most = Math.max(...bins);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height + 18}`);
  svg.setAttribute("role", "img");
  const sorted = counts.slice().sort((a, b) => a - b);
  const summary = `fewest ${sorted[0]}, median ${sorted[counts.length >> 1]}, most ${sorted[counts.length - 1]}`;
  svg.setAttribute("aria-label", `Kept blocks per row: ${summary} of ${COUNT}`);
  bins.forEach((number, bin) => {
    const tall = number / most * height;
    const rect = element("rect", {x: bin * width / numBins, y: height - tall,
      width: width / numBins - 1.5, height: tall, rx: 1.5}, svg);
    const low = Math.floor(bin * COUNT / numBins) + 1, high = Math.floor((bin + 1) * COUNT / numBins);
    element("title", {}, rect, `${low} to ${high} blocks: ${number} rows`);
  });
  element("text", {x: 0, y: height + 14}, svg, "1");
  element("text", {x: width, y: height + 14, "text-anchor": "end"}, svg, `all ${COUNT}`);
  $("rows-note").textContent = summary;
  $("histogram").replaceChildren(svg);
}

function label(name) {
  const values = AXES[name];
  const total = data.counts[["step", "layer", "head"].indexOf(name)];
  if (name === "head" && state.head === values.length) return `all ${values.length}`;
  return `${values[state[name]]} of 0–${total - 1}`;
}

function update() {
  for (const name of Object.keys(AXES)) {
    $(name).value = state[name];
    $(name).setAttribute("aria-valuetext", label(name));
    $(`${name}-value`).textContent = label(name);
  }
  $(state.direction).checked = true;
  $("legend-some").hidden = shownHeads().length === 1;
  describe(draw());
  drawHeat("heat-density", data.density, "Density");
  drawHeat("heat-recall", data.recall, "True recall");
  drawHistogram();
}

function set(name, value) {
  const most = AXES[name].length - (name === "head" && AXES.head.length > 1 ? 0 : 1);
  state[name] = (value + most + 1) % (most + 1);
  update();
}

function playOrPause() {
  clearInterval(timer);
  timer = timer ? 0 : setInterval(() => set("step", state.step + 1), PLAY_MILLISECONDS);
  $("play").textContent = timer ? "Pause" : "Play steps";
}

function choose(block, isHeld) {
  state.block = state.pointed = block;
  state.isHeld = isHeld;
  describe(draw());
}

// Tells the score of another block; the chosen one stays.
function point(block) {
  state.pointed = block;
  describe(shares(), block);
}

function blockAt(event, time) {
  const edges = event.target.getBoundingClientRect();
  const token = (share, tokens) => Math.min(tokens - 1, Math.max(0, Math.floor(share * tokens)));
  const column = token((event.clientX - edges.left) / edges.width, data.grid[2]);
  const row = token((event.clientY - edges.top) / edges.height, data.grid[1]);
  return (time * ROWS + Math.floor(row / data.block[1])) * COLUMNS + Math.floor(column / data.block[2]);
}

function buildFrames() {
  const [width, height] = [data.grid[2], data.grid[1]];
  const across = TIME <= 3 ? TIME : TIME <= 8 ? 3 : TIME <= 15 ? 4 : 6;
  $("frames").style.gridTemplateColumns = `repeat(${across}, minmax(0, 1fr))`;
  data.frames.forEach((source, time) => {
    const figure = document.createElement("figure");
    figure.className = "frame";
    const image = new Image();
    image.src = source;
    image.alt = `Latent ${frameNames(time)} of ${data.grid[0]}`;
    image.style.aspectRatio = `${width} / ${height}`;
    const canvas = document.createElement("canvas");
    canvas.width = 480;
    canvas.height = Math.round(480 * height / width);
    canvas.style.aspectRatio = `${width} / ${height}`;
    canvas.setAttribute("aria-hidden", "true");
    canvas.addEventListener("pointermove", (event) => {
      const pointed = blockAt(event, time);
      if (state.isHeld) point(pointed);
      else if (pointed !== state.block) choose(pointed, false);
    });
    canvas.addEventListener("click", (event) => choose(blockAt(event, time), true));
    const caption = document.createElement("figcaption");
    caption.textContent = `latent ${frameNames(time)}`;
    figure.append(image, canvas, caption);
    $("frames").append(figure);
    canvases.push(canvas);
  });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isRange = event.target.type === "range" || event.target.type === "radio";
  const back = event.shiftKey ? -1 : 1;
  const [time, row, column] = place(event.shiftKey ? state.pointed : state.block);
  const go = (t, r, c) => {
    const inside = t >= 0 && t < TIME && r >= 0 && r < ROWS && c >= 0 && c < COLUMNS;
    const block = (t * ROWS + r) * COLUMNS + c;
    if (inside && event.shiftKey) point(block);
    else if (inside) choose(block, true);
  };
  const actions = {
    s: () => set("step", state.step + back), l: () => set("layer", state.layer + back),
    h: () => set("head", state.head + back),
    d: () => { state.direction = state.direction === "out" ? "in" : "out"; update(); },
    p: () => { if (!$("play").disabled) playOrPause(); },
    escape: () => { state.isHeld = false; },
  };
  if (!isRange) {
    Object.assign(actions, {
      arrowleft: () => go(time, row, column - 1), arrowright: () => go(time, row, column + 1),
      arrowup: () => go(time, row - 1, column), arrowdown: () => go(time, row + 1, column),
      pageup: () => go(time - 1, row, column), pagedown: () => go(time + 1, row, column),
    });
  }
  const action = actions[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  action();
}

async function start() {
  [masks, scores] = await Promise.all([unpack(data.masks), unpack(data.scores)]);
  $("prompt").textContent = data.prompt && `“${data.prompt}”`;
  $("facts").textContent = [...data.facts, `${data.blocks.join("×")} blocks of ${data.block.join("×")} tokens`].join(" · ");
  for (const name of Object.keys(AXES)) {
    $(name).max = AXES[name].length - (name === "head" && AXES.head.length > 1 ? 0 : 1);
    $(name).disabled = $(name).max === "0";
    $(name).addEventListener("input", () => set(name, Number($(name).value)));
  }
  for (const radio of document.getElementsByName("direction")) {
    radio.addEventListener("change", () => { state.direction = radio.value; update(); });
  }
  $("play").disabled = AXES.step.length === 1;
  $("play").addEventListener("click", playOrPause);
  buildFrames();
  state.block = state.pointed = (Math.floor(TIME / 2) * ROWS + Math.floor(ROWS / 2)) * COLUMNS + Math.floor(COLUMNS / 2);
  document.addEventListener("keydown", onKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
  update();
  document.body.dataset.ready = "yes";
}

start();
