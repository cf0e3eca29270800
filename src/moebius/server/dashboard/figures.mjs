// What the page computes, without the page: nothing here knows a document.

/** A server-sent event stream's events, out of pieces of its text. */
export class EventParser {
  #rest = "";

  /** The events that this piece completes: {name, data}. */
  take(text) {
    const blocks = (this.#rest + text).split("\n\n");
    this.#rest = blocks.pop();
    return blocks.map(parseEvent).filter((event) => event.data !== "");
  }
}

function parseEvent(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event.name = line.slice(7);
    if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  return event;
}

/** The last values of something, oldest first; null where there was none. */
export class History {
  constructor(size) {
    this.size = size;
    this.values = [];
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > this.size) this.values.shift();
  }

  /** Of the last `count` values. */
  last(count) {
    return this.values.slice(-count);
  }
}

/** Joins lists of [value, count] pairs into one, by value. */
export function joined(lists) {
  const counts = new Map();
  for (const [value, count] of lists.flat()) counts.set(value, (counts.get(value) ?? 0) + count);
  return [...counts].sort((a, b) => a[0] - b[0]);
}

/** The value that a share of all [value, count] pairs does not exceed; null of none. */
export function quantile(pairs, share) {
  const all = pairs.reduce((sum, [, count]) => sum + count, 0);
  let left = share * all;
  for (const [value, count] of pairs) {
    left -= count;
    if (left <= 0) return value;
  }
  return null;
}

/** The sum of counts over the sum of seconds; null where no time passed. */
export function rate(frames, count) {
  const seconds = frames.reduce((sum, frame) => sum + frame.seconds, 0);
  if (!(seconds > 0)) return null;
  return frames.reduce((sum, frame) => sum + count(frame), 0) / seconds;
}

/** A share of 1; null of nothing. */
export const ratio = (part, whole) => (whole > 0 ? part / whole : null);

/** Layers' pairs of several frames together: [{layer, topK, pairs, tokens}]. */
export function summed(frames) {
  const layers = new Map();
  for (const { layer, top_k: topK, pairs } of frames.flat()) {
    const known = layers.get(layer);
    if (known?.pairs.length === pairs.length) pairs.forEach((n, e) => (known.pairs[e] += n));
    else layers.set(layer, { layer, topK, pairs: [...pairs] });
  }
  const found = [...layers.values()];
  for (const each of found) each.tokens = each.pairs.reduce((a, b) => a + b, 0) / each.topK;
  return found;
}

/** Each expert's load as a multiple of an even one; null where there was none. */
export function relative(pairs) {
  const mean = pairs.reduce((a, b) => a + b, 0) / pairs.length;
  return mean > 0 ? pairs.map((n) => n / mean) : null;
}

/** Where a load lies between a quarter of an even one (-1) and four times it (1). */
export function lean(load) {
  return Math.max(-1, Math.min(1, Math.log2(Math.max(load, 0.01)) / 2));
}

/** The busiest expert of all layers, and how many get less than a tenth of an even load. */
export function extremes(layers) {
  let busiest = null;
  let dead = 0;
  for (const { layer, pairs } of layers) {
    const loads = relative(pairs) ?? [];
    loads.forEach((load, expert) => {
      if (load < 0.1) dead += 1;
      if (busiest === null || load > busiest.load) busiest = { layer, expert, load };
    });
  }
  return { busiest, dead };
}

/** The least round number that is not below the value: 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of 10. */
export function roundTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  const steps = [1, 1.5, 2, 3, 4, 5, 6, 8, 10];
  return steps.map((step) => step * power).find((top) => top >= value * (1 - 1e-9));
}

/** How many points a chart of so many values has room for: a minute's at first, five in the end. */
export const span = (count, most) => [60, 120, 180].find((room) => count <= room) ?? most;

/** An SVG path through values from left to right, 1 unit apart, the last at `size - 1`; `top` is at
 * y 0 and 0 at `height`. A null is a gap. With `close` the area below each run is closed. */
export function path(values, { size, top, height, close = false }) {
  const first = size - values.length;
  const y = (value) => (height * (1 - Math.min(value / top, 1))).toFixed(2);
  let text = "";
  let start = null;
  const end = (at) => {
    if (close && start !== null) text += `L${at} ${height}L${start} ${height}Z`;
    else if (at === start) text += "h0"; // a dot, where line ends are round
    start = null;
  };
  values.forEach((value, i) => {
    const x = first + i;
    if (value === null) return end(x - 1);
    text += `${start === null ? "M" : "L"}${x} ${y(value)}`;
    start ??= x;
  });
  end(size - 1);
  return text;
}

const COMMAS = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** A number in at most five characters or so: 0, 0.42, 7.3, 418, 1,204, 38.1 k, 2.4 M. */
export function short(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toFixed(1)} G`;
  if (size >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  if (size >= 100 || Number.isInteger(value)) return COMMAS.format(value);
  return size >= 1 ? value.toFixed(1) : value.toFixed(2);
}

/** [number, unit] of milliseconds. */
export function duration(milliseconds) {
  if (milliseconds === null) return ["–", ""];
  if (milliseconds >= 60_000) return [(milliseconds / 60_000).toFixed(1), "min"];
  if (milliseconds >= 1000) return [(milliseconds / 1000).toFixed(2), "s"];
  return [milliseconds >= 100 ? milliseconds.toFixed(0) : milliseconds.toPrecision(2), "ms"];
}

/** Bytes with a binary unit. */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = count;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 || size >= 100 ? size.toFixed(0) : size.toFixed(1)} ${units[unit]}`;
}

/** A share of 1 as a percentage. */
export function percent(share) {
  if (share === null) return "–";
  return share > 0 && share < 0.1 ? `${(100 * share).toFixed(1)} %` : `${(100 * share).toFixed(0)} %`;
}

/** How often something happened, as a word. */
export const times = (count) => (count === 1 ? "once" : `${short(count)} times`);

/** Seconds to wait before attempt `n`, the first being 0. */
export const patience = (n) => Math.min(2 ** n, 15);
