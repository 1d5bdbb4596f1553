/* The dashboard.
 *
 * The node publishes samples of its counters into a realm of its own; the page polls for them with a cursor, as every
 * client of PushUp does. Counters are as they stand since the node began. A point of a chart is the difference of two
 * samples, so a sample that was missed makes a point wider and no figure wrong. What others wrote goes into the page as
 * text only; the policy the page is sent with forbids HTML.
 */

const HOLD_S = 25;
const GRACE_S = 10; // An answer this late after the hold does not come any more.
const BACKOFF_MIN_S = 0.5;
const BACKOFF_MAX_S = 10;
const PUBLISH_TIMEOUT_S = 10;
const KEPT_S = 3600;
const STEP_MIN_S = 0.5; // Samples closer than this are the same moment.
const BREAK_S = 15; // Where samples are further apart than this, a line ends.
const NOW_S = 3; // Rates are means over so long,
const LAG_S = 10; // and percentiles are of the deliveries in so long.
const SILENT_S = 5;
const BINS = 160;
const LOG_LINES = 200;

const ENDS = {
  message: "with messages",
  timeout: "timed out, empty",
  gap: "told of a gap",
  closed: "channel closed",
  drain: "node drained",
  gone: "client left",
  error: "failed",
};

const CUT = {
  slow: "cut: slow to ask",
  idle: "cut: idle",
  unread: "cut: did not read",
  flood: "cut: too many from one address",
};

const $ = (id) => document.getElementById(id);
const element = (name, text = "", attributes = {}) => {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const say = (id, text) => {
  if ($(id).textContent !== text) $(id).textContent = text;
};

// Numbers for people

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const count = (number) => (number == null ? "–" : number < 1e6 ? whole.format(number) : short.format(number));
const rate = (number) => (number > 0 && number < 9.95 ? number.toFixed(1) : count(number));
const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${tenth.format(share * 100)} %`);
const bytes = (number) => (number == null ? "–" : number < 1e9 ? `${whole.format(number / 1e6)} MB` : `${tenth.format(number / 1e9)} GB`);
const many = (number, thing) => `${count(number)} ${thing}${number === 1 ? "" : "s"}`;

function lag(seconds) {
  if (seconds == null) return "–";
  if (seconds === Infinity) return "> 10 s";
  if (seconds < 0.01) return `${tenth.format(seconds * 1e3)} ms`;
  return seconds < 1 ? `${whole.format(seconds * 1e3)} ms` : `${tenth.format(seconds)} s`;
}

function duration(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d`;
}

const clock = (ms) => new Date(ms).toLocaleTimeString([], { timeStyle: "medium", hourCycle: "h23" });
const spell = (seconds) => (seconds < 3600 ? `last ${seconds / 60} min` : "last hour");

// Requests

const HUNG = Symbol("hung");
const WOKEN = Symbol("woken");

/** An exchange that failed. `refused`: the server said no, and will say so again. */
class Failure extends Error {
  constructor(message, { refused = false, retryAfter = 0 } = {}) {
    super(message);
    this.refused = refused;
    this.retryAfter = retryAfter;
  }
}

/** Send a request; its answer's JSON. Rejects with a Failure, or with WOKEN if that is what `controller` was told. */
async function exchange(url, options, seconds, controller = new AbortController()) {
  const timer = setTimeout(() => controller.abort(HUNG), seconds * 1000);
  try {
    const response = await fetch(url, { ...options, cache: "no-store", signal: controller.signal });
    if (!response.ok) throw await refusal(response);
    return await response.json();
  } catch (error) {
    if (controller.signal.reason === WOKEN) throw WOKEN;
    if (controller.signal.reason === HUNG) throw new Failure("The node does not answer.");
    if (error instanceof Failure) throw error;
    if (error instanceof SyntaxError) throw new Failure("Something answered that is not PushUp.");
    throw new Failure(navigator.onLine ? "The connection to this node is lost." : "This browser is offline.");
  } finally {
    clearTimeout(timer);
  }
}

/** The Failure that an answer other than 2xx means; its sentence is the problem document's, if there is one. */
async function refusal(response) {
  const { status, headers } = response;
  const problem = await response.json().catch(() => null);
  const detail = typeof problem?.detail === "string" ? problem.detail : `it answered ${status}`;
  const refused = status >= 400 && status < 500 && status !== 408 && status !== 429;
  return new Failure(`The node says: ${detail}.`, { refused, retryAfter: Number(headers.get("Retry-After")) || 0 });
}

/** Full jitter: anything between nothing and a ceiling that doubles with every failure. */
const backoff = (failures) => Math.random() * Math.min(BACKOFF_MIN_S * 2 ** failures, BACKOFF_MAX_S);

const sleepers = new Set();

/** Resolve after `wait` seconds, or when something happens that makes another try worth while. */
function pause(wait) {
  return new Promise((resolve) => {
    const rise = () => {
      clearTimeout(timer);
      sleepers.delete(rise);
      resolve();
    };
    const timer = wait === Infinity ? 0 : setTimeout(rise, wait * 1000);
    sleepers.add(rise);
  });
}

const rouse = () => sleepers.forEach((rise) => rise());

/** Long polls, one after the other, with the cursor of each answer. The base of the figures and of the console. */
class Follower {
  constructor(path, parameters, start, tell) {
    this.path = path;
    this.parameters = parameters;
    this.cursor = start;
    this.tell = tell;
    this.live = true;
    this.follow();
  }

  /** Ask anew at once: what is in flight may hang on a network that is gone. Nothing is lost, the cursor stays. */
  wake() {
    this.polling?.abort(WOKEN);
    rouse();
  }

  stop() {
    this.live = false;
    this.wake();
  }

  async follow() {
    let failures = 0;
    while (this.live) {
      if (this.rests?.()) {
        await pause(Infinity);
        continue;
      }
      // After a failure it does not wait: the answer says that the node is there again. Nor does the first, which
      // brings the cursor that makes a gap known.
      const hold = failures || typeof this.cursor !== "number" || !this.cursor ? 0 : HOLD_S;
      const query = new URLSearchParams({ ...this.parameters, start: this.cursor, timeout: hold });
      this.polling = new AbortController();
      let answer;
      try {
        answer = await exchange(`${this.path}?${query}`, {}, hold + GRACE_S, this.polling);
        if (!Number.isSafeInteger(answer?.next)) throw new Failure("Something answered that is not PushUp.");
      } catch (failure) {
        if (!this.live) return;
        if (failure === WOKEN) continue;
        const wait = failure.retryAfter + (failure.refused ? BACKOFF_MAX_S : backoff(failures));
        failures++;
        this.tell.failure(failure, wait);
        await pause(wait);
        continue;
      }
      if (!this.live) return;
      failures = 0;
      this.tell.answer(answer);
      this.cursor = answer.next;
    }
  }
}

// Samples

let realm = null; // null: the node's own.
let feed = null;
let samples = []; // As they came, each with `at` in seconds.
let points = []; // What charts show: {at, parked, publications, …}.
let tables = null;
let rates = new Map(); // Of each node, by its name.
let received = 0;
let gaps = 0;
let range = 600;
let failed = null;

const age = (sample, other) => sample.at - other.at;

/** The latest sample of this run of the node that is at least `seconds` older than the last; else the oldest. */
function before(seconds) {
  const last = samples.at(-1);
  let found = null;
  for (let i = samples.length - 2; i >= 0 && samples[i].started === last.started; i--) {
    found = samples[i];
    if (age(last, found) >= seconds - STEP_MIN_S / 2) break;
  }
  return found;
}

const per = (name, last, first) => (first ? Math.max(0, last[name] - first[name]) / age(last, first) : null);

/** The value that `share` of what was counted between two histograms does not exceed, within its bucket in a line. */
function quantile(share, last, first) {
  const bounds = tables?.bounds;
  if (!bounds || !first) return null;
  const counts = last.map((total, i) => total - first[i]);
  const wanted = counts.at(-1) * share;
  if (!counts.at(-1)) return null;
  const i = counts.findIndex((total) => total >= wanted);
  if (i >= bounds.length) return Infinity;
  const [low, below] = i ? [bounds[i - 1], counts[i - 1]] : [0, 0];
  return low + (bounds[i] - low) * ((wanted - below) / (counts[i] - below));
}

function addSample(sample) {
  const previous = samples.at(-1);
  if (previous && age(sample, previous) < STEP_MIN_S) return;
  samples.push(sample);
  const same = previous?.started === sample.started ? previous : null;
  const wider = before(LAG_S);
  points.push({
    at: sample.at,
    parked: sample.parked,
    publications: per("publications", sample, same),
    deliveries: per("deliveries", sample, same),
    p50: quantile(0.5, sample.lag, wider?.lag),
    p99: quantile(0.99, sample.lag, wider?.lag),
    loop: meanLoop(sample, same),
  });
  while (age(sample, samples[0]) > KEPT_S) samples.shift();
  while (age(sample, points[0]) > KEPT_S) points.shift();
}

function meanLoop(last, first) {
  const turns = first ? last.loop.at(-1) - first.loop.at(-1) : 0;
  return turns > 0 ? Math.max(0, last.loop_sum - first.loop_sum) / turns : null;
}

/** Rates of every node, from two of its heartbeats. */
function addTables(data) {
  const first = !tables;
  tables = data;
  if (first) {
    // Only now are the bounds of the histograms known.
    const old = samples;
    [samples, points] = [[], []];
    old.forEach(addSample);
  }
  const known = rates;
  rates = new Map();
  for (const node of data.nodes) {
    let entry = known.get(node.name);
    if (!entry || entry.last.started !== node.started) {
      entry = { last: node, publications: null, deliveries: null };
    } else if (node.seen > entry.last.seen) {
      const seconds = (node.seen - entry.last.seen) / 1e6;
      const of = (name) => Math.max(0, node[name] - entry.last[name]) / seconds;
      entry = { last: node, publications: of("publications"), deliveries: of("deliveries") };
    }
    rates.set(node.name, entry);
  }
}

const telling = {
  answer({ messages, gap, next }) {
    if (gap) gaps++;
    received += messages.length;
    for (const { id, channels: [channel], data } of messages) {
      (channel.startsWith("tables:") ? addTables : addSample)({ ...data, at: id / 1e6 });
    }
    failed = null;
    $("trouble").hidden = true;
    say("cursor", String(next));
    say("samples", `${many(received, "message")}, ${many(gaps, "gap")}`);
    show();
  },
  failure(failure, wait) {
    failed = failure;
    if ($("reason").textContent !== failure.message) say("reason", failure.message);
    say("again", `Next try in ${wait < 1 ? "a moment" : many(Math.round(wait), "second")}.`);
    $("trouble").hidden = false;
    showState();
  },
};

function begin() {
  feed?.stop();
  samples = [];
  points = [];
  tables = null;
  rates = new Map();
  feed = new Follower("/dashboard/poll", realm === null ? {} : { realm }, 0, telling);
  feed.rests = () => document.hidden;
}

// Charts

const SVG = "http://www.w3.org/2000/svg";

/** A ceiling that people read easily: a power of ten, times a round number. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

class Chart {
  constructor(holder, { title, series, format, least, most = false }) {
    this.holder = holder;
    this.title = title;
    this.series = series;
    this.format = format;
    this.least = least;
    this.most = most; // Of several samples in one bin the largest counts, not the mean.
    this.svg = document.createElementNS(SVG, "svg");
    for (const [name, value] of Object.entries({ viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" })) {
      this.svg.setAttribute(name, value);
    }
    this.paths = series.map((name) => ["area", "line"].map((kind) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", kind);
      path.setAttribute("data-series", name);
      this.svg.append(path);
      return path;
    }));
    this.top = element("span", "", { class: "top-value", "aria-hidden": "true" });
    this.from = element("span", "", { class: "from", "aria-hidden": "true" });
    this.rule = element("i", "", { class: "rule", hidden: "", "aria-hidden": "true" });
    this.tip = element("span", "", { class: "tip", hidden: "", "aria-hidden": "true" });
    holder.append(this.svg, this.top, this.from, this.rule, this.tip);
    holder.addEventListener("pointermove", (event) => {
      const box = holder.getBoundingClientRect();
      point(Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1));
    });
    holder.addEventListener("pointerleave", () => point(null));
  }

  /** Show the bins from `start` to `end`, in seconds. */
  draw(start, end) {
    const width = range / BINS;
    const lists = this.series.map((name) => this.bin(name, width, start));
    const values = lists.flat().map(([, value]) => value);
    const finite = values.filter(Number.isFinite);
    const top = ceiling(Math.max(this.least, ...finite));
    const x = (at) => (100 * (at - start)) / (end - start);
    const y = (value) => 98 - 92 * Math.min(value / top, 1);
    lists.forEach((list, i) => {
      const runs = [];
      for (const [at, value] of list) {
        if (!runs.length || at - runs.at(-1).at(-1)[0] > Math.max(BREAK_S, width * 3)) runs.push([]);
        runs.at(-1).push([at, value]);
      }
      const line = runs.map((run) => "M" + run.map(([at, value]) => `${x(at).toFixed(2)} ${y(value).toFixed(2)}`).join("L"));
      const area = runs.map((run, j) => `${line[j]}L${x(run.at(-1)[0]).toFixed(2)} 100L${x(run[0][0]).toFixed(2)} 100Z`);
      this.paths[i][0].setAttribute("d", area.join(""));
      this.paths[i][1].setAttribute("d", line.join(""));
    });
    this.lists = lists;
    this.start = start;
    this.end = end;
    this.top.textContent = this.format(top);
    this.from.textContent = `${range < 3600 ? `${range / 60} min` : "1 h"} ago`;
    this.holder.toggleAttribute("data-empty", values.length < 2);
    const spoken = lists.map((list, i) => {
      if (!list.length) return "";
      const all = list.map(([, value]) => value);
      const named = this.series.length > 1 ? `${this.series[i]} ` : "";
      return `${named}now ${this.format(all.at(-1))}, between ${this.format(Math.min(...all))} and ${this.format(Math.max(...all))}`;
    });
    this.svg.setAttribute("aria-label", `${this.title}, ${spell(range)}: ${spoken.filter(Boolean).join("; ") || "nothing yet"}`);
  }

  /** [time, value] of each bin that has samples. Bins lie at fixed times, so that what is past does not flicker. */
  bin(name, width, start) {
    const list = [];
    let slot = null;
    let sum = 0;
    let number = 0;
    for (const sample of points) {
      const value = sample[name];
      if (value == null || sample.at < start) continue;
      const own = Math.floor(sample.at / width);
      if (own !== slot) {
        [slot, sum, number] = [own, 0, 0];
        list.push([sample.at, value]);
      }
      number++;
      sum = this.most ? Math.max(sum, value) : sum + value;
      list[list.length - 1] = [sample.at, this.most ? sum : sum / number];
    }
    return list;
  }

  /** Say what was at this share of the width. */
  point(share) {
    const at = this.start + share * (this.end - this.start);
    const near = this.lists.map((list) => list.reduce(
      (best, item) => (!best || Math.abs(item[0] - at) < Math.abs(best[0] - at) ? item : best), null));
    const found = near.find(Boolean);
    const shown = found && Math.abs(found[0] - at) <= BREAK_S;
    this.rule.hidden = this.tip.hidden = !shown;
    if (!shown) return;
    const x = (found[0] - this.start) / (this.end - this.start);
    this.rule.style.left = `${x * 100}%`;
    this.tip.dataset.side = x > 0.5 ? "left" : "right";
    this.tip.style.left = `${x * 100}%`;
    const values = near.map((item, i) => item && (this.series.length > 1 ? `${this.series[i]} ` : "") + this.format(item[1]));
    this.tip.textContent = `${values.filter(Boolean).join(", ")} at ${clock(found[0] * 1000)}`;
  }
}

let pointed = null;

function point(share) {
  pointed = share;
  for (const chart of charts) {
    if (share === null || !chart.lists) chart.rule.hidden = chart.tip.hidden = true;
    else chart.point(share);
  }
}

const perSecond = (value) => `${rate(value)}/s`;
const charts = [
  { name: "parked", title: "Parked polls", series: ["parked"], format: count, least: 5 },
  { name: "publications", title: "Publications per second", series: ["publications"], format: perSecond, least: 5 },
  { name: "deliveries", title: "Deliveries per second", series: ["deliveries"], format: perSecond, least: 5 },
  { name: "lag", title: "Delivery lag", series: ["p99", "p50"], format: lag, least: 0.01, most: true },
  { name: "loop", title: "Event loop lag", series: ["loop"], format: lag, least: 0.005, most: true },
].map((chart) => new Chart(document.querySelector(`[data-chart="${chart.name}"]`), chart));

// What is shown

function show() {
  showState();
  showTables();
  if (!samples.length) return;
  showFigures();
  showEnds();
  showRefused();
  const end = samples.at(-1).at;
  for (const chart of charts) chart.draw(end - range, end);
  if (pointed !== null) point(pointed);
}

function showState() {
  const last = samples.at(-1);
  const state = failed ? "lost" : last ? last.state : "connecting";
  document.body.dataset.state = failed ? "lost" : "live";
  if ($("state").dataset.state !== state) {
    $("state").dataset.state = state;
    $("state").textContent = failed ? (navigator.onLine ? "no connection" : "offline") : state;
  }
  if (!last) return;
  const name = tables?.node ?? "this node";
  const as = failed ? `as of ${clock(last.at * 1000)}` : `up ${duration(last.at - last.started / 1e6)}`;
  say("about", `${name}, version ${last.version}, ${as}`);
  document.title = `${failed ? "(lost) " : ""}${name}, PushUp dashboard`;
}

function showFigures() {
  const last = samples.at(-1);
  const recent = before(NOW_S);
  say("parked", count(last.parked));
  say("publications", rate(per("publications", last, recent)));
  say("deliveries", rate(per("deliveries", last, recent)));
  const wider = before(LAG_S);
  const [p50, p99] = [0.5, 0.99].map((share) => quantile(share, last.lag, wider?.lag));
  say("p50", lag(p50));
  say("p99", lag(p99));
  say("lag-note", p99 === null ? `no deliveries in the last ${LAG_S} s` : `in the last ${LAG_S} s`);
  say("loop", lag(meanLoop(last, wider)));
  say("cpu", wider ? percent(per("cpu", last, wider)) : "–");
  say("memory", bytes(last.memory));
  say("connections", count(last.connections));
  for (const side of ["lane", "web"]) say(side, wider ? `${rate(per(side, last, wider))}/s` : "–");
}

function showTables() {
  if (!tables) return;
  showRealms();
  showNodes();
  showChannels();
}

function showRealms() {
  const names = tables.realms;
  $("realm-field").hidden = names.length < 2;
  if ($("realm").childElementCount === names.length) return;
  $("realm").replaceChildren(...names.map((name) => element("option", name, { value: name })));
  if (realm !== null) $("realm").value = realm;
}

/** A row of a table; each cell knows its column's name, which a narrow screen shows beside it. */
function row(columns, cells) {
  const made = element("tr", "", { role: "row" });
  cells.forEach((cell, i) => {
    const holder = element("td", typeof cell === "string" ? cell : "", { role: "cell", "data-column": columns[i] });
    if (typeof cell !== "string") holder.append(cell);
    made.append(holder);
  });
  return made;
}

const columns = (table) => [...$(table).tHead.rows[0].cells].map((cell) => cell.textContent);

function showNodes() {
  const { nodes, trouble, at } = tables;
  const heads = columns("nodes");
  const total = { parked: 0, connections: 0, publications: 0, deliveries: 0 };
  const rows = nodes.map((heard) => {
    // Of itself the node knows more than its last heartbeat said.
    const { parked, connections } = heard.name === tables.node ? (samples.at(-1) ?? heard) : heard;
    const node = { ...heard, parked, connections };
    const silent = at - node.seen / 1e6;
    const state = silent > SILENT_S ? "silent" : node.state;
    const entry = rates.get(node.name);
    const quiet = state === "silent";
    if (!quiet) {
      for (const name of ["parked", "connections"]) total[name] += node[name];
      for (const name of ["publications", "deliveries"]) total[name] += entry[name] ?? 0;
    }
    const pill = element("span", quiet ? `silent for ${duration(silent)}` : state, { class: "pill", "data-state": state });
    const made = row(heads, [
      nodeName(node),
      pill,
      node.version,
      quiet ? "–" : duration(at - node.started / 1e6),
      quiet ? "–" : count(node.parked),
      quiet ? "–" : count(node.connections),
      quiet ? "–" : rate(entry.publications),
      quiet ? "–" : rate(entry.deliveries),
    ]);
    made.dataset.node = node.name;
    made.dataset.state = state;
    return made;
  });
  if (!trouble || rows.length) update($("nodes").tBodies[0], rows);
  $("nodes-empty").hidden = nodes.length > 0;
  say("nodes-empty", trouble ? `The list of nodes cannot be had: ${trouble}.` : "No node has been heard of in the last minute.");
  const live = rows.filter((made) => made.dataset.state !== "silent").length;
  say("nodes-note", nodes.length ? `${many(live, "node")}, ${tables.broker}` : tables.broker);
  const foot = $("nodes").tFoot;
  foot.hidden = live < 2;
  update(foot, live < 2 ? [] : [row(heads, [
    "All nodes", "", "", "", count(total.parked), count(total.connections), rate(total.publications), rate(total.deliveries),
  ])]);
  const all = (text) => (live < 2 ? "" : `${text} on all ${live} nodes`);
  say("parked-all", all(count(total.parked)) || "waiting on this node");
  say("publications-all", all(`${rate(total.publications)}/s`) || "made through this node");
  say("deliveries-all", all(`${rate(total.deliveries)}/s`) || "messages in answers");
}

/** The node's name; that of another node leads to its own dashboard. */
function nodeName(node) {
  const name = element("span", node.name, { class: "name" });
  if (node.name === tables.node) {
    name.append(" ", element("span", "this one", { class: "tag" }));
  } else if (node.admin_address && !/^(0\.0\.0\.0|\[::\]):/.test(node.admin_address)) {
    const link = element("a", node.name, { href: `http://${node.admin_address}/`, title: "Its own dashboard" });
    name.replaceChildren(link);
  }
  return name;
}

function showChannels() {
  const { channels, at } = tables;
  const heads = columns("channels");
  const most = Math.max(1, ...channels.map((channel) => channel.parked));
  const rows = channels.map(({ channel, parked, messages, last }) => {
    const polls = element("span", count(parked), { class: "meter" });
    polls.style.setProperty("--share", parked / most);
    const button = element("button", "Listen", { type: "button", class: "small", "aria-label": `Listen on ${channel}` });
    button.dataset.listen = channel;
    const made = row(heads, [
      element("bdi", String(channel), { class: "channel" }),
      polls,
      count(messages),
      last === null ? "–" : at - last / 1e6 < 1 ? "just now" : `${duration(at - last / 1e6)} ago`,
      button,
    ]);
    made.dataset.channel = channel;
    return made;
  });
  const focused = document.activeElement?.dataset.listen;
  update($("channels").tBodies[0], rows);
  if (focused && document.activeElement?.dataset.listen !== focused) {
    // Its row has moved; the focus moves with it.
    [...document.querySelectorAll("[data-listen]")]
      .find((button) => button.dataset.listen === focused)?.focus({ preventScroll: true });
  }
  $("channels").hidden = !rows.length;
  $("channels-empty").hidden = rows.length > 0;
  say("channels-note", tables.more ? `of those polled here and the first ${count(tables.listed)} by name` : "");
}

/** Put rows in the place of others, cell by cell, so that what has the focus or is selected stays. */
function update(body, rows) {
  rows.forEach((fresh, i) => {
    const old = body.rows[i];
    if (!old || old.dataset.node !== fresh.dataset.node || old.dataset.channel !== fresh.dataset.channel) {
      if (old) old.replaceWith(fresh);
      else body.append(fresh);
      return;
    }
    Object.assign(old.dataset, fresh.dataset);
    [...fresh.cells].forEach((cell, j) => {
      if (!old.cells[j].isEqualNode(cell)) old.cells[j].replaceWith(cell);
    });
  });
  while (body.rows.length > rows.length) body.rows[body.rows.length - 1].remove();
}

function period() {
  const first = before(range);
  return first && { first, last: samples.at(-1) };
}

function legend(id, items) {
  const list = $(id);
  list.replaceChildren(...items.map(({ key, name, value, share }) => {
    const item = element("li", "", { "data-key": key });
    item.append(element("span", name, { class: "what" }), element("span", value, { class: "amount" }),
      element("span", share, { class: "soft share" }));
    return item;
  }));
}

function showEnds() {
  say("ends-period", spell(range));
  const span = period();
  const ended = Object.keys(ENDS)
    .map((key) => ({ key, number: span ? (span.last.ends[key] ?? 0) - (span.first.ends[key] ?? 0) : 0 }))
    .filter(({ number }) => number > 0);
  const all = ended.reduce((sum, { number }) => sum + number, 0);
  $("ends-empty").hidden = all > 0;
  $("ends-bar").hidden = !all;
  $("ends-bar").replaceChildren(...ended.map(({ key, number }) => {
    const part = element("i", "", { "data-key": key });
    part.style.flexGrow = number / all;
    return part;
  }));
  legend("ends", ended.map(({ key, number }) => (
    { key, name: ENDS[key], value: count(number), share: percent(number / all) }
  )));
}

function showRefused() {
  const span = period();
  const last = samples.at(-1);
  const first = span?.first ?? last;
  const items = [["refused", (code) => code.replaceAll("_", " ")], ["cut", (reason) => CUT[reason] ?? `cut: ${reason}`]]
    .flatMap(([kind, name]) => Object.entries(last[kind]).map(([key, number]) => (
      { key, name: name(key), recent: number - (first[kind][key] ?? 0), number }
    )))
    .sort((a, b) => b.recent - a.recent || b.number - a.number);
  $("refused-empty").hidden = items.length > 0;
  say("refused-period", spell(range) + (tables?.realms.length > 1 ? ", all realms" : ""));
  legend("refused", items.map(({ key, name, recent, number }) => (
    { key, name, value: count(recent), share: `${count(number)} since start` }
  )));
}

// The console

let pending = null; // May have arrived although no answer came; asked again it goes under the same key.

const scope = () => (realm === null ? "" : `?${new URLSearchParams({ realm })}`);

/** What is in the field, as the text of a JSON value: it is one already, or it becomes a string. */
function readData() {
  const text = $("data").value.trim();
  try {
    const value = JSON.parse(text);
    return { json: text, kind: value === null ? "null" : Array.isArray(value) ? "array" : typeof value };
  } catch {
    return { json: JSON.stringify(text), kind: "text" };
  }
}

function uniqueKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function publish() {
  // As text, not by way of a JavaScript value: numbers keep all their digits.
  const publication = `"channels":[${JSON.stringify($("publish-channel").value)}],"data":${readData().json}`;
  const path = `/dashboard/publish${scope()}`;
  if (pending?.same !== path + publication) pending = { same: path + publication, key: uniqueKey() };
  const body = `{${publication},"key":"${pending.key}"}`;
  const began = performance.now();
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body };
    const { id } = await exchange(path, options, PUBLISH_TIMEOUT_S);
    pending = null;
    outcome("published", `Stored as ${id}, ${lag((performance.now() - began) / 1000)}.`);
  } catch (failure) {
    if (failure.refused) pending = null;
    outcome("failed", failure.message);
  }
}

function outcome(kind, text) {
  $("outcome").dataset.outcome = kind;
  $("outcome").textContent = text;
}

let listener = null;

function listen(channel, start) {
  unlisten();
  $("log").replaceChildren();
  $("listen-channel").value = channel;
  $("toggle").textContent = "Stop";
  heard(`Listening on ${channel}.`);
  let number = 0;
  let lost = false;
  listener = new Follower("/dashboard/listen", { ...(realm === null ? {} : { realm }), channel }, start, {
    answer({ messages, gap, closed, next }) {
      if (gap) note("gap", "Messages may be missing here (gap).");
      for (const message of messages) note("message", JSON.stringify(message.data), message);
      if (closed) note("closed", `The channel ${closed.join(", ")} was closed.`);
      number += messages.length;
      lost = false;
      heard(`Listening on ${channel}: ${many(number, "message")}, cursor ${next}.`);
    },
    failure(failure) {
      heard(`${failure.message} Trying again.`);
      if (!lost) note("lost", failure.message);
      lost = true;
    },
  });
}

function heard(text) {
  say("listening", text);
}

function unlisten() {
  listener?.stop();
  listener = null;
  $("toggle").textContent = "Listen";
}

/** A line of the log; the newest is the last, and stays in sight if the last was. */
function note(kind, text, message) {
  const log = $("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 20;
  const item = element("li", "", { "data-note": kind });
  if (message) item.append(element("time", clock(message.id / 1000), { title: `id ${message.id}` }));
  item.append(element("code", text, { dir: "auto" }));
  log.append(item);
  while (log.childElementCount > LOG_LINES) log.firstElementChild.remove();
  if (follows) log.scrollTop = log.scrollHeight;
}

// The page

$("publish").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = $("send");
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  outcome("trying", "Publishing…");
  try {
    await publish();
  } finally {
    button.ariaDisabled = "false";
  }
});

$("data").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("publish").requestSubmit();
});

$("data").addEventListener("input", () => {
  say("kind", $("data").value.trim() ? `sent as ${readData().kind}` : "JSON, or plain text");
});

$("listen").addEventListener("submit", (event) => {
  event.preventDefault();
  if (listener) {
    unlisten();
    heard("Stopped.");
  } else {
    listen($("listen-channel").value, $("start").value === "latest" ? "latest" : 0);
  }
});

$("channels").addEventListener("click", (event) => {
  const channel = event.target.closest("[data-listen]")?.dataset.listen;
  if (!channel) return;
  listen(channel, 0);
  $("publish-channel").value ||= channel;
  $("console").scrollIntoView({ block: "nearest" });
  $("toggle").focus({ preventScroll: true });
});

for (const choice of document.querySelectorAll("[name=range]")) {
  choice.addEventListener("change", () => {
    range = Number(choice.value);
    show();
  });
}

function readFragment() {
  const wanted = new URLSearchParams(location.hash.slice(1)).get("realm");
  if (wanted === realm && feed) return;
  realm = wanted;
  if (realm !== null) $("realm").value = realm;
  unlisten();
  begin();
}

$("realm").addEventListener("change", () => {
  location.hash = new URLSearchParams({ realm: $("realm").value });
});

const wake = () => {
  feed.wake();
  listener?.wake();
};

$("retry").addEventListener("click", wake);
addEventListener("online", wake);
addEventListener("offline", wake);
addEventListener("hashchange", readFragment);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) feed.polling?.abort(WOKEN);
  else rouse();
});

range = Number(document.querySelector("[name=range]:checked").value);
readFragment();
