// The live page: shows what comes over one stream of events, and remembers five minutes of it.

import {
  EventParser, History, bytes, duration, extremes, joined, lean, path, patience, percent, quantile,
  rate, ratio, relative, roundTop, short, span, summed, times,
} from "./figures.mjs";

const HISTORY = 300;
const RECENT = 10; // frames that figures are of
const LATENCY = 30; // frames that latencies are of
const SMOOTH = 5; // frames that a point of a line is of
const HIDDEN_MS = 60_000; // a page that nobody sees lets go of the stream
const SILENT_MS = 10_000; // without a frame for so long the stream is lost
const STATES = { ready: "ready", not_ready: "not ready", draining: "draining" };

const byId = (id) => document.getElementById(id);
const frames = new History(HISTORY);
let key = null; // in this page alone: never stored, never in an address
let facts = null;
let attempt = 0;
let stream = null;
let hideTimer = null;

// The stream

async function connect() {
  if (stream !== null) return;
  const controller = (stream = new AbortController());
  let problem = null;
  try {
    problem = await listen(controller);
  } catch {
    problem = "The server cannot be reached.";
  }
  if (stream === controller) stream = null;
  if (problem === null || document.hidden) return;
  const seconds = patience(attempt++);
  say("lost", "not connected", `${problem} What is shown is old; trying again in ${seconds} s.`);
  setTimeout(connect, 1000 * seconds);
}

/** Reads the stream to its end; says why it ended, or null where it shall not be tried again. */
async function listen(controller) {
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  const request = { headers, signal: controller.signal, cache: "no-store", credentials: "omit" };
  const response = await fetch("v1/live", request);
  if (response.status === 401) return askForKey();
  if (!response.ok) return (await refusal(response)) ?? `The server says ${response.status}.`;
  byId("ask").hidden = true;
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const silence = setTimeout(() => controller.abort(), SILENT_MS);
    const { done, value } = await reader.read().finally(() => clearTimeout(silence));
    if (done) return "The server has ended the stream.";
    for (const event of parser.take(value)) take(event);
  }
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return `The server says: ${error.message}.`;
  } catch {
    return null;
  }
}

function askForKey() {
  byId("refusal").hidden = key === null;
  key = null;
  byId("ask").hidden = false;
  byId("figures").hidden = true;
  say("waiting", "needs a key", "");
  byId("key").focus();
  return null;
}

function take({ name, data }) {
  attempt = 0;
  if (name === "facts") {
    const told = JSON.parse(data);
    // Another server, or another model: what was seen before is not its own.
    if (facts !== null && facts.fingerprint !== told.fingerprint) frames.values = [];
    facts = told;
    showFacts();
  } else if (name === "frame") {
    frames.push(JSON.parse(data));
    frames.values.at(-1).point = point(frames.last(SMOOTH));
    if (!document.hidden) show();
  }
}

/** What lines show of one moment. */
function point(recent) {
  const sum = (name) => recent.reduce((total, frame) => total + frame.counts[name], 0);
  const latencies = (name) => {
    const bins = joined(recent.map((frame) => frame.heard[name]));
    return [quantile(bins, 0.5), quantile(bins, 0.99)];
  };
  return {
    drawn: rate(recent, (frame) => frame.counts.generation_tokens),
    first_token: latencies("first_token"),
    between_tokens: latencies("between_tokens"),
    hits: ratio(sum("prefix_hits"), sum("prefix_queries")),
  };
}

// What is shown

function say(kind, text, notice) {
  byId("state").className = `state ${kind}`;
  byId("state").textContent = text;
  byId("notice").textContent = notice;
  byId("notice").hidden = notice === "";
  byId("figures").classList.toggle("old", kind === "lost");
}

function show() {
  const now = frames.values.at(-1);
  const { state } = now.heard;
  say(state, STATES[state] ?? state, state === "draining" ? drainingText(now) : "");
  byId("figures").hidden = false;
  showAxes();
  showTokens();
  showLatency(byId("first"), "first_token");
  showLatency(byId("between"), "between_tokens");
  showHits();
  showBatch(now);
  showMemory(now);
  showExperts();
  showRanks(now);
}

function drainingText(now) {
  return `The server is shutting down: ${now.heard.calls} calls are still answered, and none is taken.`;
}

function showAxes() {
  const minutes = span(frames.values.length, HISTORY) / 60;
  for (const element of document.querySelectorAll(".since")) {
    element.textContent = minutes === 1 ? "1 minute ago" : `${minutes} minutes ago`;
  }
}

function showFacts() {
  document.title = `${facts.model} · Moebius`;
  byId("model").textContent = facts.model;
  const exact = facts.fingerprint.endsWith("-approx") ? "off" : "on";
  list(byId("facts"), [
    ["a block", `${facts.block_size} tokens`],
    ["all blocks", `${bytes(facts.kv_bytes)} ${facts.kv_dtype}`],
    ["context", `${short(facts.context)} tokens`],
  ]);
  byId("foot").textContent =
    `Moebius ${facts.version} · batch invariant: ${exact} · ${facts.fingerprint} · ` +
    "figures of the last 10 seconds, latencies of the last 30";
}

function showTokens() {
  const recent = frames.last(RECENT);
  const drawn = rate(recent, (frame) => frame.counts.generation_tokens);
  const computed = rate(recent, (frame) => frame.counts.step_tokens);
  tile(byId("tokens"), [short(drawn), "a second"], `${short(computed)} computed in all`);
  const values = frames.values.map((frame) => frame.point.drawn);
  spark(byId("tokens"), [{ values, area: true }]);
}

function showLatency(element, name) {
  const bins = joined(frames.last(LATENCY).map((frame) => frame.heard[name]));
  const [tail, tailUnit] = duration(quantile(bins, 0.99));
  const count = bins.reduce((sum, [, n]) => sum + n, 0);
  const text = count === 0 ? "none of late" : `99 % within ${tail} ${tailUnit}`;
  tile(element, duration(quantile(bins, 0.5)), text);
  const line = (i) => frames.values.map((frame) => frame.point[name][i]);
  spark(element, [{ values: line(0), area: true }, { values: line(1), line: "line-thin" }]);
}

function showHits() {
  const sum = (list, name) => list.reduce((total, frame) => total + frame.counts[name], 0);
  const all = frames.values;
  const share = ratio(sum(all, "prefix_hits"), sum(all, "prefix_queries"));
  const text = share === null ? "no prompt of late" : `${short(sum(all, "prefix_hits"))} prompt tokens found`;
  tile(byId("hits"), [percent(share), ""], text);
  const values = all.map((frame) => frame.point.hits);
  spark(byId("hits"), [{ values, area: true }], 1);
}

function showBatch(now) {
  byId("running").textContent = short(now.running);
  byId("most").textContent = now.most_running ? `of ${short(now.most_running)} at most` : "";
  byId("waiting").textContent = short(now.waiting);
  byId("deferred").textContent = now.deferred ? `(${short(now.deferred)} for a common prefix)` : "";
  const running = frames.values.map((frame) => frame.running);
  const all = frames.values.map((frame) => frame.running + frame.waiting);
  const top = Math.max(roundTop(1.05 * Math.max(...all)), 4);
  byId("batch").querySelector(".top").textContent = short(top);
  chart(byId("batch").querySelector("svg"), top, [
    { values: all, area: "area-two", line: "line-two" },
    { values: running, area: "ground" },
    { values: running, area: "area-one", line: "line-one" },
  ]);
  const recent = frames.last(RECENT);
  const sum = (count) => recent.reduce((total, frame) => total + count(frame), 0);
  const steps = sum((frame) => frame.counts.steps);
  const total = (name) => Object.values(name).reduce((a, b) => a + b, 0);
  list(byId("steps"), [
    ["steps a second", short(rate(recent, (frame) => frame.counts.steps))],
    ["tokens a step", short(ratio(sum((frame) => frame.counts.step_tokens), steps))],
    ["preempted", perMinute((frame) => frame.counts.preemptions)],
    ["finished", perMinute((frame) => total(frame.heard.finished))],
    ["refused", perMinute((frame) => total(frame.heard.refused))],
    ["engines lost", short(now.restarts)],
  ]);
}

/** How often something happened in the last minute. */
function perMinute(count) {
  return `${short(frames.last(60).reduce((sum, frame) => sum + count(frame), 0))} / min`;
}

function showMemory(now) {
  room(byId("blocks"), now.blocks, "blocks");
  const share = (part) => (frame) => ratio(part(frame.blocks), frame.blocks.total);
  const used = frames.values.map(share((blocks) => blocks.used));
  const held = frames.values.map(share((blocks) => blocks.used + blocks.cached));
  chart(byId("memory").querySelector("svg"), 1, [
    { values: held, area: "area-one" },
    { values: used, area: "area-one", line: "line-one" },
  ]);
  byId("states").hidden = now.states.total === 0;
  if (now.states.total) room(byId("states").querySelector(".room"), now.states, "slots");
}

/** How much of something is used, cached and free: figures and a bar. */
function room(element, { used, cached, total }, what) {
  if (!element.firstChild) {
    const legend = make("p", "legend");
    for (const kind of ["one", "cached"]) {
      const part = make("span", "part");
      part.append(make("i", `key ${kind}`), make("b"), make("span"));
      legend.append(part);
    }
    const bar = make("div", "bar");
    bar.append(make("i"), make("i"));
    element.append(legend, bar);
  }
  const [usedFigure, cachedFigure] = element.querySelectorAll("b");
  usedFigure.textContent = percent(ratio(used, total));
  usedFigure.nextSibling.textContent = `in use, ${short(used)} of ${short(total)} ${what}`;
  cachedFigure.textContent = percent(ratio(cached, total));
  cachedFigure.nextSibling.textContent = "cached";
  const [first, second] = element.querySelectorAll(".bar i");
  first.style.width = `${100 * (ratio(used, total) ?? 0)}%`;
  second.style.width = `${100 * (ratio(cached, total) ?? 0)}%`;
}

// Experts

let heat = null; // what the canvas shows: {layers, left, cell, row}

function showExperts() {
  let layers = summed(frames.last(RECENT).map((frame) => frame.layers));
  let of = "of the last 10 seconds";
  if (!layers.some((each) => each.tokens > 0)) {
    layers = summed([facts?.window ?? []]);
    of = `of the last ${short(facts?.window_steps ?? 0)} steps before this page`;
  }
  byId("experts").hidden = layers.length === 0;
  if (layers.length === 0) return;
  const tokens = Math.max(...layers.map((each) => each.tokens));
  byId("experts-of").textContent = tokens ? `by ${short(tokens)} tokens ${of}` : "no token yet";
  drawHeat(layers);
  showCell(null);
}

function drawHeat(layers) {
  const canvas = byId("experts").querySelector(".heat canvas");
  const width = canvas.clientWidth;
  const row = Math.max(5, Math.min(22, Math.floor(440 / layers.length)));
  const left = 30;
  const experts = Math.max(...layers.map((each) => each.pairs.length));
  const height = row * layers.length + 18;
  const pen = sharp(canvas, width, height);
  const cell = (width - left) / experts;
  const gap = cell > 5 && row > 6 ? 1 : 0;
  const tint = tints();
  const every = Math.ceil(13 / row);
  layers.forEach((each, y) => {
    const loads = relative(each.pairs);
    each.pairs.forEach((_, expert) => {
      pen.fillStyle = tint(loads === null ? 0 : lean(loads[expert]));
      pen.fillRect(left + expert * cell, y * row, Math.max(cell - gap, 0.5), row - gap);
    });
    if (y % every === 0) label(pen, each.layer, left - 8, y * row + row / 2, "right");
  });
  const step = Math.max(roundTop(Math.ceil((44 * experts) / (width - left))), 1);
  for (let expert = 0; expert < experts; expert += step) {
    label(pen, expert, left + (expert + 0.5) * cell, height - 7, "center");
  }
  heat = { layers, left, cell, row };
}

function label(pen, text, x, y, align) {
  pen.fillStyle = colour("--quiet");
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = align;
  pen.textBaseline = "middle";
  pen.fillText(text, x, y);
}

/** A line about the cell under the pointer, or about all. */
function showCell(event) {
  const { layers, left, cell, row } = heat;
  const y = event === null ? -1 : Math.floor(event.offsetY / row);
  const expert = event === null ? -1 : Math.floor((event.offsetX - left) / cell);
  const pairs = layers[y]?.pairs;
  let text;
  if (pairs?.[expert] !== undefined) {
    const load = relative(pairs)?.[expert] ?? null;
    text = `layer ${layers[y].layer}, expert ${expert}: ${short(load)} × an even load, ${short(pairs[expert])} pairs`;
  } else {
    const { busiest, dead } = extremes(layers);
    if (busiest === null) text = "rows are layers, columns experts";
    else {
      text = `busiest: layer ${busiest.layer}, expert ${busiest.expert}, ${short(busiest.load)} × an even load; `;
      text += dead === 1 ? "1 gets" : `${short(dead)} get`;
      text += " less than a tenth of one. Rows are layers, columns experts.";
    }
    byId("experts").querySelector(".heat canvas").setAttribute("aria-label", text);
  }
  byId("cell").textContent = text;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Colours from less (-1) by even (0) to more (1). */
function tints() {
  const parts = (name) => colour(name).match(/\w\w/g).map((hex) => parseInt(hex, 16));
  const [less, even, more] = ["--less", "--even", "--more"].map(parts);
  return (lean) => {
    const end = lean < 0 ? less : more;
    const mixed = even.map((from, i) => Math.round(from + (end[i] - from) * Math.abs(lean)));
    return `rgb(${mixed.join(" ")})`;
  };
}

/** A canvas's pen, in CSS pixels, as sharp as the screen. */
function sharp(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  return pen;
}

function drawScale() {
  const canvas = byId("experts").querySelector(".scale canvas");
  const pen = sharp(canvas, 120, 10);
  const tint = tints();
  for (let x = 0; x < 120; x += 1) {
    pen.fillStyle = tint((x - 59.5) / 59.5);
    pen.fillRect(x, 0, 1, 10);
  }
}

// Ranks

function showRanks(now) {
  byId("ranks").hidden = now.group === null;
  if (now.group === null) return;
  const recent = frames.last(RECENT).filter((frame) => frame.group?.ranks.length === now.group.ranks.length);
  const sum = (i, name) => recent.reduce((total, frame) => total + frame.group.ranks[i][name], 0);
  const seconds = recent.reduce((total, frame) => total + frame.seconds, 0);
  const work = now.group.ranks.map((_, i) => sum(i, "pairs"));
  const all = work.reduce((a, b) => a + b, 0);
  byId("ranks-of").textContent = imbalanceText(recent, now.group);
  const rows = now.group.ranks.map((rank, i) => {
    const share = ratio(work[i], all);
    const perSecond = (name) => (seconds > 0 ? `${bytes(sum(i, name) / seconds)}/s` : "–");
    const bar = make("div", "bar");
    const part = make("i");
    part.style.width = `${100 * (share ?? 0)}%`;
    bar.append(part);
    const name = rank.computing ? `${rank.rank}` : `${rank.rank} (away)`;
    const waits = percent(seconds > 0 ? sum(i, "seconds_waited") / seconds : null);
    return [name, bar, percent(share), perSecond("bytes_out"), perSecond("bytes_in"), waits];
  });
  byId("ranks").querySelector("tbody").replaceChildren(...rows.map(tableRow));
}

function imbalanceText(recent, group) {
  const values = recent.flatMap((frame) => frame.group.imbalance.map(([, value]) => value));
  const moves = `experts have moved ${times(group.moves)}, the group was formed ${times(group.epoch)}`;
  if (values.length === 0) return moves;
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  return `the busiest has ${mean.toFixed(2)} × the mean in a layer, ${Math.max(...values).toFixed(2)} × at most; ${moves}`;
}

function tableRow(cells) {
  const row = make("tr");
  cells.forEach((content, i) => {
    const cell = make("td", i === 1 ? "work" : "");
    cell.append(content);
    row.append(cell);
  });
  return row;
}

// Pieces

function make(tag, className = "") {
  const element = document.createElement(tag);
  element.className = className;
  return element;
}

function tile(element, [value, unit], text) {
  element.querySelector(".big span").textContent = value;
  element.querySelector(".big small").textContent = unit;
  element.querySelector(".quiet").textContent = text;
}

function list(element, entries) {
  element.replaceChildren(
    ...entries.map(([name, value]) => {
      const entry = make("div");
      entry.append(make("dt"), make("dd"));
      entry.firstChild.textContent = name;
      entry.lastChild.textContent = value;
      return entry;
    }),
  );
}

function spark(element, series, top = null) {
  const largest = Math.max(...series.flatMap(({ values }) => values.filter((value) => value !== null)), 0);
  const shown = series.map(({ values, area, line = "line-one" }) => ({
    values, line, area: area ? "area-one" : undefined,
  }));
  chart(element.querySelector("svg"), top ?? (largest || 1) * 1.05, shown);
}

/** Draws series over the page's memory: {values, area, line}, the latter two being classes. */
function chart(svg, top, series) {
  const height = 100;
  const size = span(frames.values.length, HISTORY);
  svg.setAttribute("viewBox", `0 0 ${size - 1} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const pieces = series.flatMap(({ values, area, line }) => [
    ...(area ? [[area, path(values, { size, top, height, close: true })]] : []),
    ...(line ? [[line, path(values, { size, top, height })]] : []),
  ]);
  while (svg.childElementCount < pieces.length) {
    svg.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  }
  pieces.forEach(([kind, d], i) => {
    svg.children[i].setAttribute("class", kind);
    svg.children[i].setAttribute("d", d);
  });
}

// What the reader does

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  connect();
});

const canvas = byId("experts").querySelector(".heat canvas");
canvas.addEventListener("pointermove", (event) => heat && showCell(event));
canvas.addEventListener("pointerleave", () => heat && showCell(null));

window.addEventListener("resize", () => frames.values.length && showExperts());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawScale();
  if (frames.values.length) showExperts();
});

document.addEventListener("visibilitychange", () => {
  clearTimeout(hideTimer);
  if (document.hidden) {
    hideTimer = setTimeout(() => stream?.abort(), HIDDEN_MS);
  } else {
    if (frames.values.length) show();
    connect();
  }
});

drawScale();
connect();
