/* The JavaScript client of PushUp: one ES module without dependencies, for browsers and for Node.js.
 *
 *     const pushup = new PushUp();
 *     for await (const message of pushup.subscribe(["news"])) console.log(message.data);
 *
 * From the server to the application:
 *
 *     Wire      one request and its answer
 *     Carrier   answers one after the other: by polls, Server-Sent Events or WebSocket
 *     Feed      one carrier for all its members, each of them a subscription with a cursor of its own
 *     Tabs      who of the tabs of an origin has the feeds, and what the others hear of it
 *     Subscription   what was received, until the application has taken it
 *
 * What a feed tells is a fact: "these are all messages of your channels from `start` to `next`". A subscription takes a
 * fact only if it begins no later than what it has, and of it only what it has not. So whatever comes twice, from two
 * tabs that both think they lead, say, is taken once; and a hole is never skipped, but asked for again.
 */

const HOLD_S = 25;
const GRACE_S = 10; // An answer this late does not come any more.
const BACKOFF_BASE_S = 0.5;
const BACKOFF_CAP_S = 30;
const RETRY_MAX_S = 86_400; // More would be too much for a timer, and end at once.
const HASTY_S = 0.1; // What ends sooner with nothing to say must not be asked for in a tight loop.
const FIRST_S = 5; // A stream's first answer comes at once, unless something on the way keeps it back.
const SILENCE_S = 45; // A stream has a heartbeat; after this long it is dead.
const CHECK_S = 5; // A timer stands still while a laptop sleeps, so the clock is looked at in between.
const BUFFER_MAX = 1000;
const URL_MAX = 2000;
const STREAM_URL_MAX = 8000;
const CHANNELS_MAX = 100;
const NEAR_US = 10e6; // Cursors this close to each other share a request.
const TRIES_MAX = 3;
const PING_S = 10;
const QUIET_S = 30;
const PONG_S = 5;
const PUBLISH_S = 60;

const TRANSPORTS = ["ws", "events", "poll"];
const EVENTS = ["message", "gap", "closed", "error", "state"];
const PASSES = new Set([408, 425, 429]);
const CHANGED = Symbol("changed");
const SILENT = Symbol("silent");

/** What went wrong. `status` and `code` are the problem document's; status 0: there was no answer. */
export class PushUpError extends Error {
  constructor(message, { status = 0, code = "", problem = null, retryAfter = 0, token } = {}) {
    super(message);
    this.name = "PushUpError";
    this.status = status;
    this.code = code;
    this.problem = problem;
    this.retryAfter = retryAfter;
    Object.defineProperty(this, "token", { value: token, enumerable: false }); // Not into anybody's log.
  }
}

const told = (problem, more = {}) =>
  new PushUpError(problem?.detail ?? "The server refused.", {
    status: problem?.status ?? 0,
    code: problem?.code ?? "",
    retryAfter: problem?.retry_after ?? 0,
    problem,
    ...more,
  });

/** Whether the same request would be refused again. */
const isFinal = (error) => error.status >= 400 && error.status < 500 && !PASSES.has(error.status);

/** `Retry-After` in seconds: it is a number of them or a date. */
function retrySeconds(header) {
  if (!header) return 0;
  const wait = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Math.min(Math.max(wait, 0) || 0, RETRY_MAX_S);
}

/** Full jitter: anything between nothing and a ceiling that doubles with every failure. */
const backoff = (failures) => Math.random() * Math.min(BACKOFF_BASE_S * 2 ** failures, BACKOFF_CAP_S);

const isInteger = (channel) => /^\d+$/.test(channel);

function unique() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Names as text: an integer channel is its digits. */
function channelNames(channels) {
  const names = [...new Set((Array.isArray(channels) ? channels : [channels]).map(String))];
  if (!names.length || names.includes("")) throw new TypeError("name at least one channel");
  return names;
}

const report = (error) => (globalThis.reportError ? reportError(error) : console.error(error));

/** A signal that follows another one, and also ends when nothing was heard for some seconds. */
class Watch {
  #controller = new AbortController();
  #outer;
  #relay;
  #timer;
  #due;

  constructor(outer, seconds) {
    this.#outer = outer;
    this.#relay = () => this.#controller.abort(outer.reason);
    if (outer.aborted) this.#relay();
    outer.addEventListener("abort", this.#relay);
    this.touch(seconds);
  }

  get signal() {
    return this.#controller.signal;
  }

  get silent() {
    return this.signal.reason === SILENT;
  }

  touch(seconds) {
    clearTimeout(this.#timer);
    this.#due = Date.now() + seconds * 1000;
    this.#check();
  }

  done() {
    clearTimeout(this.#timer);
    this.#outer.removeEventListener("abort", this.#relay);
  }

  #check() {
    const rest = this.#due - Date.now();
    if (rest <= 0) this.#controller.abort(SILENT);
    else this.#timer = setTimeout(() => this.#check(), Math.min(rest, CHECK_S * 1000));
  }
}

/** Sleep, for `least` seconds in any case and then for up to `more`, which `rouse` cuts short. */
class Pause {
  #sleepers = new Set();

  async sleep(least, more, signal) {
    const until = Date.now() + (least + more) * 1000;
    if (least) await this.#wait(least, signal, false);
    const rest = (until - Date.now()) / 1000;
    if (rest > 0 && !signal.aborted) await this.#wait(rest, signal, true);
  }

  rouse() {
    for (const rise of this.#sleepers) rise();
  }

  #wait(seconds, signal, light) {
    return new Promise((resolve) => {
      const rise = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", rise);
        this.#sleepers.delete(rise);
        resolve();
      };
      const timer = setTimeout(rise, seconds * 1000);
      signal.addEventListener("abort", rise);
      if (signal.aborted) rise();
      else if (light) this.#sleepers.add(rise);
    });
  }
}

/** One request and its answer. It holds the token, and asks for another one when that has expired. */
class Wire {
  #token;
  #held = null;
  #doubtful = false; // The token is a second one in a row, and nothing has been answered with it.
  #credentials;
  #foreign; // Whether a browser asks the server for permission before it shows a token.

  constructor({ url = globalThis.location?.origin, realm, token, credentials = "same-origin" }) {
    if (!url) throw new TypeError("name the server: new PushUp({ url })");
    const base = new URL(url, globalThis.location?.href).href.replace(/\/+$/, "");
    this.base = realm ? `${base}/realms/${encodeURIComponent(realm)}` : base;
    this.#token = token;
    this.#credentials = credentials;
    this.#foreign = Boolean(globalThis.location) && new URL(base).origin !== globalThis.location.origin;
  }

  /** The token to show; undefined if there is none. Rejects if the function that has it does. */
  async token() {
    if (typeof this.#token !== "function") return this.#token;
    const asked = (this.#held ??= (async () => this.#token())());
    try {
      return await asked;
    } catch (error) {
      if (this.#held === asked) this.#held = null;
      throw new PushUpError(`There is no token: ${error?.message ?? error}`);
    }
  }

  /** Whether to try again after this error, as another token will be asked for or is there already. */
  async renews(error) {
    if (error.status !== 401 || typeof this.#token !== "function") return false;
    const held = await this.#held?.catch(() => null);
    if (held !== error.token) return true;
    if (this.#doubtful) return false;
    this.#doubtful = true;
    this.#held = null;
    return true;
  }

  /** Something was answered. */
  trust() {
    this.#doubtful = false;
  }

  url(path, channels, start, more = "") {
    const query = channels.map((channel) => `channel=${encodeURIComponent(channel)}&`).join("");
    return `${this.base}${path}?${query}start=${start}${more}`;
  }

  /** Send it; its answer if that is 2xx. Rejects with a PushUpError, or with CHANGED if `watch` ends for that. */
  async fetch(url, body, watch) {
    const token = await this.token();
    const options = { cache: "no-store", credentials: this.#credentials, signal: watch.signal };
    // No other header field: a browser would ask the server of another origin for permission first.
    if (token) options.headers = { Authorization: `Bearer ${token}` };
    if (body !== undefined) Object.assign(options, { method: "POST", body });
    try {
      const response = await fetch(url, options);
      if (!response.ok) throw await this.#refusal(response, token);
      this.trust();
      return response;
    } catch (error) {
      throw translate(error, watch);
    }
  }

  async json(url, body, seconds, signal) {
    const watch = new Watch(signal, seconds);
    try {
      const response = await this.fetch(url, body, watch);
      return await response.json();
    } catch (error) {
      throw translate(error, watch);
    } finally {
      watch.done();
    }
  }

  /** The answer of one poll that waits `hold` seconds at most. */
  async poll(channels, start, hold, signal) {
    let url = this.url("/poll", channels, start, `&timeout=${hold}`);
    let body;
    // The browser remembers a permission by the URL, so that must not change with the cursor.
    if (url.length > URL_MAX || (this.#token && this.#foreign)) {
      url = `${this.base}/poll`;
      body = JSON.stringify({ channels, start, timeout: hold });
    }
    return checked(await this.json(url, body, hold + GRACE_S, signal));
  }

  async #refusal(response, token) {
    const { status, headers } = response;
    const problem = await response.json().catch(() => null);
    const retryAfter = retrySeconds(headers.get("Retry-After"));
    return told(problem ?? { detail: `The server answered ${status}.` }, { status, retryAfter, token });
  }
}

function translate(error, watch) {
  if (error instanceof PushUpError) return error;
  if (watch.silent) return new PushUpError("No answer came in time.");
  if (watch.signal.aborted) return CHANGED;
  if (error instanceof SyntaxError) return new PushUpError("Something answered that is not PushUp.");
  return new PushUpError("The server cannot be reached.");
}

function checked(answer) {
  if (Number.isSafeInteger(answer?.next) && Array.isArray(answer.messages)) return answer;
  throw new PushUpError("Something answered that is not PushUp.");
}

/** Answers one after the other. With `auto` it finds out what gets through: WebSocket, events, polls. */
class Carrier {
  #wire;
  #order;
  #through = null; // What an answer came by.
  #failed = 0;

  constructor(wire, transport) {
    if (transport !== "auto" && !TRANSPORTS.includes(transport)) {
      throw new TypeError(`transport is poll, events, ws or auto, not ${transport}`);
    }
    if (transport === "ws" && !globalThis.WebSocket) throw new TypeError("there is no WebSocket here");
    this.#wire = wire;
    this.#order = transport === "auto" ? TRANSPORTS : [transport];
  }

  /** Answers from `start` on, until the server ends them; a poll has one. Throws a PushUpError or CHANGED. */
  async *open(channels, start, hold, signal) {
    const long = this.#wire.url("/events", channels, start).length > STREAM_URL_MAX;
    const order = long ? ["poll"] : this.#through ? [this.#through] : this.#order;
    for (const transport of order) {
      let heard = false;
      try {
        for await (const answer of this[transport](channels, start, hold, signal)) {
          heard = true;
          this.#failed = 0;
          this.#through = transport;
          yield answer;
        }
        return;
      } catch (error) {
        if (error === CHANGED) throw error;
        if (++this.#failed >= TRIES_MAX) this.#through = null;
        if (heard || transport === "poll" || (error.code && error.code !== "not_found")) throw error;
        // A page is not told why a WebSocket failed. A poll is, and if it is answered the fault is in the transport.
        const answer = await this.#wire.poll(channels, start, 0, signal);
        yield { ...answer, instead: true };
        start = answer.next;
        if (transport === order.at(-1)) throw error;
      }
    }
  }

  async *poll(channels, start, hold, signal) {
    yield await this.#wire.poll(channels, start, hold, signal);
  }

  async *events(channels, start, hold, signal) {
    const watch = new Watch(signal, FIRST_S);
    let reader;
    try {
      const response = await this.#wire.fetch(this.#wire.url("/events", channels, start), undefined, watch);
      if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
        throw new PushUpError("Something answered that is not PushUp.");
      }
      reader = response.body.getReader();
      const blocks = new Blocks(await this.#wire.token());
      const decoder = new TextDecoder();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        for (const answer of blocks.feed(decoder.decode(value, { stream: true }))) yield answer;
        watch.touch(blocks.begun ? SILENCE_S : FIRST_S);
      }
    } catch (error) {
      throw translate(error, watch);
    } finally {
      watch.done();
      reader?.cancel().catch(() => {});
    }
  }

  async *ws(channels, start, hold, signal) {
    if (!globalThis.WebSocket) throw new PushUpError("There is no WebSocket here.");
    const token = await this.#wire.token();
    if (signal.aborted) throw CHANGED;
    const query = token ? `?token=${encodeURIComponent(token)}` : "";
    const watch = new Watch(signal, FIRST_S);
    const socket = new WebSocket(`${this.#wire.base.replace(/^http/, "ws")}/ws${query}`);
    const frames = [];
    let notify = () => {};
    const push = (frame) => {
      frames.push(frame);
      notify();
    };
    watch.signal.addEventListener("abort", () => push({ fails: translate(null, watch) }));
    socket.onopen = () => socket.send(JSON.stringify({ subscribe: channels, start }));
    socket.onmessage = ({ data }) => push(data);
    socket.onclose = ({ code }) => push({ code });
    try {
      for (;;) {
        while (!frames.length) await new Promise((resolve) => (notify = resolve));
        if (watch.signal.aborted) throw translate(null, watch);
        const frame = frames.shift();
        if (typeof frame !== "string") {
          const end = ended(frame, token);
          if (end) throw end;
          return;
        }
        const said = JSON.parse(frame);
        if (said.error) throw told(said.error, { token });
        watch.touch(SILENCE_S);
        if (said.messages) {
          this.#wire.trust();
          yield checked(said);
        }
      }
    } catch (error) {
      throw translate(error, watch);
    } finally {
      watch.done();
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
    }
  }
}

/** What the end of a WebSocket means; nothing if it is to come back at once. */
function ended({ fails, code }, token) {
  if (fails) return fails;
  if (code === 1001) return null;
  if (code === 4401) return new PushUpError("The token was refused.", { status: 401, code: "unauthorized", token });
  if (code === 4400) return new PushUpError("The server understood nothing.", { status: 400, code: "invalid_request" });
  return new PushUpError(code === 1013 ? "The server is busy." : "The connection broke.");
}

/** Server-Sent Events as answers. */
class Blocks {
  #token;
  #rest = "";
  #pending = { messages: [] };
  begun = false; // Whether there was a cursor.

  constructor(token) {
    this.#token = token;
  }

  *feed(text) {
    const blocks = (this.#rest + text).split("\n\n");
    this.#rest = blocks.pop();
    for (const block of blocks) {
      const { id, event, data } = fields(block);
      if (event === "gap") yield* this.#flush();
      if (event === "gap") this.#pending.gap = true;
      else if (event === "closed") this.#pending.closed = [...(this.#pending.closed ?? []), ...JSON.parse(data).closed];
      else if (event === "error") {
        yield* this.#flush();
        throw told(JSON.parse(data), { token: this.#token });
      } else if (data !== undefined) this.#pending.messages.push(JSON.parse(data));
      if (id !== undefined) this.#pending.next = Number(id);
    }
    yield* this.#flush();
  }

  *#flush() {
    if (this.#pending.next === undefined) return;
    const answer = checked(this.#pending);
    this.#pending = { messages: [] };
    this.begun = true;
    yield answer;
  }
}

function fields(block) {
  const found = {};
  for (const line of block.split("\n")) {
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (name) found[name] = name === "data" && found.data !== undefined ? `${found.data}\n${value}` : value;
  }
  return found;
}

/** One carrier for several members. It tells facts, errors and its state to `tell`; members come and go. */
class Feed {
  #wire;
  #carrier;
  #tell;
  #overfull;
  #members = new Map();
  #asked = []; // The members that the request in flight is for.
  #turn = new AbortController();
  #idle = new AbortController(); // Ends when there are no members.
  #pause = new Pause();
  #failures = 0;
  #proved = false; // Whether the last request was answered. Until then none waits, so that it shows.
  #splits = 0;
  #running = false;

  constructor(wire, carrier, tell, overfull) {
    this.#wire = wire;
    this.#carrier = carrier;
    this.#tell = tell;
    this.#overfull = overfull;
  }

  get size() {
    return this.#members.size;
  }

  has(id) {
    return this.#members.has(id);
  }

  channels(...more) {
    return new Set([...this.#members.values()].flatMap((member) => member.channels).concat(more));
  }

  join(id, channels, cursor) {
    const only = this.#members.size === 0 || (this.#members.size === 1 && this.#members.has(id));
    // Only who has a cursor can be told of a gap, so who has none asks for one first, without waiting.
    const near = only && typeof cursor === "number" && cursor > 0;
    this.#members.set(id, { id, channels: [...channels], cursor, near, alone: false, known: false });
    if (this.#idle.signal.aborted) this.#idle = new AbortController();
    this.#pause.rouse();
    this.#turn.abort(CHANGED);
    if (!this.#running) this.#run();
  }

  leave(id) {
    this.#members.delete(id);
    if (!this.#members.size) this.empty();
  }

  /** Take the members out, to put them elsewhere. */
  empty() {
    const members = [...this.#members.values()];
    this.#members.clear();
    this.#turn.abort(CHANGED);
    this.#idle.abort();
    return members;
  }

  /** Another try is worth while; `anew`: what is in flight may hang on a network that is gone. */
  wake(anew) {
    this.#pause.rouse();
    if (!anew) return;
    this.#proved = false;
    this.#turn.abort(CHANGED);
  }

  async #run() {
    this.#running = true;
    let hasty = 0;
    await null; // Who joins in the same breath comes along.
    while (this.#members.size) {
      const signal = (this.#turn = new AbortController()).signal;
      const began = Date.now();
      try {
        const news = await this.#ask(this.#proved ? HOLD_S : 0, signal);
        this.#failures = 0;
        hasty = news || Date.now() - began > HASTY_S * 1000 ? 0 : hasty + 1;
        // A node that drains answers early once. Who always does is not asked in a tight loop.
        if (hasty > 1) await this.#pause.sleep(0, backoff(hasty - 2), this.#idle.signal);
      } catch (error) {
        if (error === CHANGED || signal.aborted) continue;
        const failure = error instanceof PushUpError ? error : new PushUpError(`Unexpected: ${error?.message}`);
        if (await this.#settle(failure)) continue;
        this.#proved = false;
        this.#say(globalThis.navigator?.onLine === false ? "offline" : "waiting", failure);
        await this.#pause.sleep(failure.retryAfter, backoff(this.#failures++), this.#idle.signal);
      }
    }
    this.#running = false;
  }

  /** One turn: answers for some members. Whether they held anything, or were not meant to wait. */
  async #ask(hold, signal) {
    const late = this.#late();
    if (late) {
      const { cursor } = late[0];
      this.#asked = late;
      const answer = await this.#wire.poll(channelsOf(late), cursor, 0, signal);
      this.#hand(late, cursor, answer);
      const near = [...this.#members.values()].filter((member) => member.near);
      const most = Math.max(...near.map((member) => member.cursor));
      for (const member of late) member.near = !answer.messages.length || answer.next >= most - NEAR_US;
      return true;
    }
    const members = (this.#asked = [...this.#members.values()]);
    const channels = channelsOf(members);
    let start = Math.min(...members.map((member) => member.cursor));
    let news = hold === 0;
    for await (const answer of this.#carrier.open(channels, start, hold, signal)) {
      if (signal.aborted) throw CHANGED;
      if (answer.gap && members.length > 1) {
        // It may not be everybody's. Each asks by itself.
        for (const member of members) member.near = false;
        return true;
      }
      if (!answer.instead) this.#failures = 0;
      news ||= answer.messages.length > 0 || Boolean(answer.closed);
      this.#hand(members, start, answer);
      start = answer.next;
      if (signal.aborted || !this.#members.size) throw CHANGED;
    }
    return news;
  }

  /** Members that have to come near the others first and can ask together, or nothing. */
  #late() {
    const late = [...this.#members.values()].filter((member) => !member.near);
    if (!late.length) return null;
    const [first] = late;
    // Without a cursor there is no gap, so several may ask at once.
    if (first.alone || (first.cursor !== "latest" && first.cursor !== 0)) return [first];
    return late.filter((member) => member.cursor === first.cursor && !member.alone);
  }

  #hand(members, start, { messages, next, gap = false, closed }) {
    if (members.length > 1) this.#splits = 0;
    const gone = (closed ?? []).map(String).filter(isInteger);
    for (const member of members) {
      member.cursor = typeof member.cursor === "number" ? Math.max(member.cursor, next) : next;
      member.known = true;
      member.alone = false;
      member.channels = member.channels.filter((channel) => !gone.includes(channel));
      if (!member.channels.length) this.#members.delete(member.id);
    }
    this.#proved = true;
    this.#tell({ for: members.map((member) => member.id), fact: { start, messages, next, gap, closed } });
  }

  #say(state, failure) {
    this.#tell({ for: [...this.#members.keys()], state, failure: plain(failure) });
  }

  /** Deal with a failure that is not overcome by waiting. Whether it was one. */
  async #settle(failure) {
    if (await this.#wire.renews(failure)) return true;
    if (!isFinal(failure)) return false;
    if (failure.status === 401) {
      this.#tell({ refused: failure });
      return true;
    }
    const members = this.#asked.filter((member) => this.#members.get(member.id) === member);
    if (members.length > 1) {
      if (this.#splits++) return false;
      // Whose fault is it? Each asks by itself.
      for (const member of members) Object.assign(member, { near: false, alone: true });
      if (failure.status === 413) this.#overfull(this);
      return true;
    }
    for (const member of members) {
      const channel = String(failure.problem?.channel ?? "");
      if (failure.code === "channel_not_found" && member.known && member.channels.includes(channel)) {
        // It was closed while nobody asked.
        this.#hand([member], member.cursor, { messages: [], next: member.cursor, closed: [Number(channel)] });
      } else {
        this.#members.delete(member.id);
        this.#tell({ for: [member.id], failed: plain(failure) });
      }
    }
    return true;
  }
}

const channelsOf = (members) => [...new Set(members.flatMap((member) => member.channels))].sort();
const plain = ({ message, status, code, problem, retryAfter }) => ({ message, status, code, problem, retryAfter });

/** As many feeds as the number of channels in one request makes necessary: usually one. */
class Feeds {
  #make;
  #feeds = [];
  #limit = CHANNELS_MAX;

  constructor(wire, carrier, tell) {
    const overfull = (feed) => {
      this.#limit = Math.max(1, feed.channels().size >> 1);
      for (const { id, channels, cursor } of feed.empty()) this.join(id, channels, cursor);
    };
    this.#make = () => new Feed(wire, carrier, tell, overfull);
  }

  join(id, channels, cursor) {
    this.leave(id);
    let feed = this.#feeds.find((feed) => !feed.size || feed.channels(...channels).size <= this.#limit);
    if (!feed) this.#feeds.push((feed = this.#make()));
    feed.join(id, channels, cursor);
  }

  leave(id) {
    for (const feed of this.#feeds) if (feed.has(id)) feed.leave(id);
    this.#feeds = this.#feeds.filter((feed) => feed.size);
  }

  wake(anew) {
    for (const feed of this.#feeds) feed.wake(anew);
  }

  close() {
    for (const feed of this.#feeds) feed.empty();
    this.#feeds = [];
  }
}

/** The same for all tabs of the origin: the one that holds the lock has the feeds, and tells the others.
 *
 * Each tab also holds a lock of its own, so that whoever leads learns when it has gone. A leader that says nothing any
 * more (frozen by the browser) loses the lock to who asked in vain.
 */
class Tabs {
  #name;
  #makeFeeds;
  #tell;
  #joined = new Map();
  #channel;
  #feeds = null; // There are some while this tab leads.
  #closed = new AbortController();
  #queued = null;
  #release = () => {};
  #watched = new Map();
  #heard = Date.now();
  #timer;
  #tab = unique();

  constructor(name, makeFeeds, tell) {
    this.#name = name;
    this.#makeFeeds = makeFeeds;
    this.#tell = tell;
    this.#channel = new BroadcastChannel(name);
    this.#channel.onmessage = ({ data }) => this.#hear(data);
    this.#timer = setInterval(() => this.#check(), PING_S * 1000);
  }

  /** Hold this tab's own lock and queue for the other one. Rejects where locks are not to be had. */
  open() {
    const { signal } = this.#closed;
    const closed = new Promise((resolve) => signal.addEventListener("abort", resolve));
    return new Promise((resolve, reject) => {
      const hold = () => {
        this.#queue();
        resolve();
        return closed;
      };
      navigator.locks.request(`${this.#name}:${this.#tab}`, { signal }, hold).catch(reject);
    });
  }

  join(id, channels, cursor) {
    this.#joined.set(id, { channels, cursor });
    if (this.#feeds) this.#feeds.join(id, channels, cursor);
    else this.#ask(id);
  }

  leave(id) {
    this.#joined.delete(id);
    if (this.#feeds) this.#feeds.leave(id);
    else this.#post({ leave: id });
  }

  wake(anew) {
    if (this.#feeds) this.#feeds.wake(anew);
    else this.#post({ wake: true });
  }

  close() {
    for (const id of this.#joined.keys()) if (!this.#feeds) this.#post({ leave: id });
    this.#joined.clear();
    clearInterval(this.#timer);
    this.#resign();
    this.#closed.abort();
    this.#queued?.abort();
    this.#channel.close();
  }

  /** Where a subscription stands, which is what another leader has to be told. */
  note(id, channels, cursor) {
    if (this.#joined.has(id)) this.#joined.set(id, { channels, cursor });
  }

  #ask(id) {
    this.#post({ join: id, ...this.#joined.get(id), tab: this.#tab });
  }

  #post(said) {
    if (!this.#closed.signal.aborted) this.#channel.postMessage(said);
  }

  async #lock(name, options, run) {
    try {
      await navigator.locks.request(name, options, run);
    } catch (error) {
      if (error.name !== "AbortError") report(error);
    }
  }

  async #queue(steal = false) {
    if (this.#closed.signal.aborted) return;
    this.#queued?.abort();
    const queued = (this.#queued = new AbortController());
    await this.#lock(this.#name, steal ? { steal } : { signal: queued.signal }, () => this.#lead());
    if (queued.signal.aborted || this.#closed.signal.aborted) return;
    // Another tab has taken the lock away.
    this.#resign();
    this.#rejoin();
    this.#queue();
  }

  #lead() {
    if (this.#closed.signal.aborted) return undefined;
    this.#feeds = this.#makeFeeds((event) => {
      // An error of the leader's own token is no business of others: who leads next has another one.
      if (!event.refused && this.#watched.size) this.#post(event);
      this.#tell(event);
    });
    for (const [id, { channels, cursor }] of this.#joined) this.#feeds.join(id, channels, cursor);
    this.#post({ leads: this.#tab });
    return new Promise((resolve) => (this.#release = resolve));
  }

  #resign() {
    this.#feeds?.close();
    this.#feeds = null;
    for (const { stop } of this.#watched.values()) stop.abort();
    this.#watched.clear();
    this.#release();
    this.#heard = Date.now();
  }

  #rejoin() {
    for (const id of this.#joined.keys()) this.#ask(id);
  }

  #hear(said) {
    if (this.#closed.signal.aborted) return;
    if (said.join) this.#welcome(said);
    else if (said.leave) this.#feeds?.leave(said.leave);
    else if (said.wake) this.#feeds?.wake(false);
    else if (said.ping) {
      if (this.#feeds) this.#post({ pong: true });
    } else {
      this.#heard = Date.now();
      if (said.leads) {
        if (this.#feeds) this.#resign();
        this.#rejoin();
      } else if (!said.pong) this.#tell(said);
    }
  }

  #welcome({ join, channels, cursor, tab }) {
    if (!this.#feeds) return;
    if (!this.#watched.has(tab)) this.#watch(tab);
    this.#watched.get(tab).ids.add(join);
    this.#feeds.join(join, channels, cursor);
  }

  /** Learn when a tab has gone, which does not always say so. */
  #watch(tab) {
    const ids = new Set();
    const stop = new AbortController();
    this.#watched.set(tab, { ids, stop });
    this.#lock(`${this.#name}:${tab}`, { signal: stop.signal }, () => {
      if (this.#watched.get(tab)?.stop !== stop) return;
      this.#watched.delete(tab);
      for (const id of ids) this.#feeds.leave(id);
    });
  }

  async #check() {
    if (this.#feeds || !this.#joined.size || Date.now() - this.#heard < QUIET_S * 1000) return;
    const asked = Date.now();
    this.#rejoin();
    this.#post({ ping: true });
    await new Promise((resolve) => setTimeout(resolve, (PONG_S + Math.random() * PONG_S) * 1000));
    if (this.#feeds || this.#heard >= asked || this.#closed.signal.aborted) return;
    this.#queue(true);
  }
}

const TAKE = Symbol("take");

/** Messages of some channels, from a cursor on. Read it by iterating, or by `on("message")`. */
class Subscription {
  #channels;
  #names;
  #line;
  #storage;
  #key;
  #next; // Where what was received ends.
  #cursor; // Where what was handed over ends.
  #hand = null; // Where it ends when the application asks for the next message.
  #queue = [];
  #iterating = false;
  #waiters = [];
  #listeners = new Map();
  #state = "connecting";
  #inStep = false; // Whether a fact was taken since it joined.
  #paused = false;
  #pumping = false;
  #ended = false;

  constructor(channels, start, line, storage, key) {
    this.#channels = this.#names = channels;
    this.#line = line;
    this.#storage = storage;
    this.#key = key;
    this.#next = this.#cursor = start;
  }

  get channels() {
    return [...this.#names];
  }

  get cursor() {
    return this.#cursor;
  }

  get state() {
    return this.#state;
  }

  /** Call back for messages, gaps, closed channels, errors or states. Returns a function that ends it. */
  on(type, callback) {
    if (!EVENTS.includes(type)) throw new TypeError(`there is no event ${type}`);
    if (type === "message" && this.#iterating) throw new TypeError("this subscription is being iterated over");
    if (!this.#listeners.has(type)) this.#listeners.set(type, new Set());
    this.#listeners.get(type).add(callback);
    queueMicrotask(() => this.#pump());
    return () => this.#listeners.get(type).delete(callback);
  }

  [Symbol.asyncIterator]() {
    if (this.#listeners.get("message")?.size) throw new TypeError("this subscription is read by on('message')");
    this.#iterating = true;
    return {
      next: () => this.#ask(),
      return: async (value) => {
        this.close();
        return { done: true, value };
      },
      [Symbol.asyncIterator]() {
        return this;
      },
    };
  }

  /** Take part no more. What was received and not taken is dropped, and the cursor says so. */
  close() {
    if (this.#state !== "closed") this.#line.leave(this);
    this.#queue = [];
    this.#finish();
  }

  /** What only the client does. */
  [TAKE] = {
    next: () => this.#next,
    join: () => {
      this.#inStep = false;
      if (!this.#paused && !this.#ended) this.#line.join(this, this.#channels, this.#next);
    },
    fact: (fact) => this.#fact(fact),
    state: (state, error) => {
      if (!this.#ended) this.#change(state, error);
    },
    fail: (error) => {
      this.#ended = true;
      this.#line.leave(this);
      this.#queue.push({ type: "error", value: error });
      this.#pump();
    },
  };

  #fact({ start, messages, next, gap, closed }) {
    if (this.#paused || this.#ended) return;
    if (typeof start !== "number" || start === 0 || typeof this.#next !== "number") {
      if (start !== this.#next) return;
    } else if (start > this.#next) {
      if (this.#inStep) this[TAKE].join();
      return;
    }
    this.#inStep = true;
    const from = typeof this.#next === "number" ? this.#next : 0;
    if (gap) this.#queue.push({ type: "gap", value: { from, next } });
    for (const message of messages) {
      if (message.id < from || !message.channels.some((channel) => this.#channels.includes(String(channel)))) continue;
      this.#queue.push({ type: "message", value: message });
    }
    const gone = closed?.filter((channel) => this.#channels.includes(String(channel)));
    if (gone?.length) this.#queue.push({ type: "closed", value: gone });
    this.#next = Math.max(from, next);
    if (this.#queue.at(-1)?.type === "next") this.#queue.pop();
    this.#queue.push({ type: "next", value: this.#next });
    if (gone?.length) this.#lose(gone.map(String).filter(isInteger));
    this.#line.note(this, this.#channels, this.#next);
    this.#change("open");
    this.#pump();
    if (this.#queue.length > BUFFER_MAX && !this.#ended) {
      this.#paused = true;
      this.#line.leave(this, true);
    }
  }

  /** Integer channels that were closed never come back. */
  #lose(gone) {
    this.#channels = this.#channels.filter((channel) => !gone.includes(channel));
    if (this.#channels.length) return;
    this.#ended = true;
    this.#line.leave(this);
    this.#queue.push({ type: "end" });
  }

  #ask() {
    if (this.#hand !== null) this.#move(this.#hand);
    this.#hand = null;
    return new Promise((resolve, reject) => {
      this.#waiters.push({ resolve, reject });
      if (this.#state === "closed") this.#finish();
      else this.#pump();
    });
  }

  #pump() {
    if (this.#pumping) return;
    this.#pumping = true;
    while (this.#queue.length && this.#pass(this.#queue[0]));
    this.#pumping = false;
    if (this.#paused && this.#queue.length < BUFFER_MAX / 2) {
      this.#paused = false;
      this[TAKE].join();
    }
  }

  /** Hand the first item of the queue over, if there is somebody to take it. */
  #pass(item) {
    const { type, value } = item;
    const listens = this.#listeners.get(type)?.size > 0;
    const read = this.#iterating || this.#listeners.get("message")?.size > 0;
    // The application still has the message before in hand, or nobody reads yet.
    if (type === "message" && this.#iterating ? !this.#waiters.length : this.#hand !== null) return false;
    if (!read && (type === "message" || (EVENTS.includes(type) && !listens))) return false;
    if (type === "error") return this.#break(item, listens);
    this.#queue.shift();
    if (type === "message" && this.#iterating) {
      this.#hand = value.id + 1;
      this.#waiters.shift().resolve({ done: false, value });
    } else if (type === "message") {
      this.#emit(type, value);
      this.#move(value.id + 1);
    } else if (type === "next") this.#move(value);
    else if (type === "end") this.#finish();
    else {
      if (!listens && type === "gap") {
        console.warn(`PushUp: messages of ${this.#names.join(", ")} may have been missed; on("gap") would tell`);
      }
      this.#emit(type, value);
    }
    return true;
  }

  /** The end by an error: thrown where it is iterated, also if it was listened to. */
  #break(item, listens) {
    if (!item.told) {
      item.told = true;
      if (listens) this.#emit("error", item.value);
      else if (!this.#iterating) report(item.value);
    }
    if (this.#iterating && !this.#waiters.length && this.#state !== "closed") return false;
    this.#queue.shift();
    this.#waiters.shift()?.reject(item.value);
    this.#finish();
    return true;
  }

  #move(cursor) {
    if (cursor === this.#cursor || this.#state === "closed") return;
    this.#cursor = cursor;
    try {
      this.#storage?.setItem(this.#key, String(cursor));
    } catch (error) {
      report(error);
    }
  }

  #emit(type, ...values) {
    for (const callback of [...(this.#listeners.get(type) ?? [])]) {
      try {
        callback(...values);
      } catch (error) {
        report(error);
      }
    }
  }

  #change(state, error = null) {
    if (state === this.#state || this.#state === "closed") return;
    this.#state = state;
    this.#emit("state", state, error);
  }

  #finish() {
    this.#ended = true;
    this.#change("closed");
    for (const { resolve } of this.#waiters.splice(0)) resolve({ done: true, value: undefined });
  }
}

/** What a shared feed is shared by: the same server, and the same rights there. */
async function shareName(base, token, credentials, transport) {
  const text = JSON.stringify([base, credentials, transport, token ? identity(token) : null]);
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return `pushup:${Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

/** Whose token it is and what it allows. A later one of the same person is the same to us. */
function identity(token) {
  try {
    const claims = JSON.parse(atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/")));
    const { iss, aud, sub, pushup } = claims;
    if (sub !== undefined) return JSON.stringify([iss, aud, sub, pushup]);
  } catch {
    // It is no JSON Web Token: then nothing is known of it but itself.
  }
  return token;
}

const canShare = () => Boolean(
  globalThis.document && globalThis.navigator?.locks && globalThis.BroadcastChannel && globalThis.crypto?.subtle,
);

/** A PushUp server, as seen from here. */
export class PushUp {
  #wire;
  #options;
  #storage;
  #subscriptions = new Map();
  #ids = new Map();
  #source = null;
  #opening = null;
  #closed = new AbortController();
  #pause = new Pause();
  #page = new AbortController();
  #line;

  constructor({ transport = "poll", share = true, storage = null, ...server } = {}) {
    this.#wire = new Wire(server);
    new Carrier(this.#wire, transport); // It refuses a transport that does not exist.
    this.#options = { transport, share, credentials: server.credentials };
    this.#storage = storage;
    this.#line = {
      join: (subscription, channels, cursor) => this.#source?.join(this.#ids.get(subscription), channels, cursor),
      leave: (subscription, forNow = false) => this.#leave(subscription, forNow),
      note: (subscription, channels, cursor) => this.#source?.note?.(this.#ids.get(subscription), channels, cursor),
    };
  }

  subscribe(channels, { start = "latest" } = {}) {
    if (this.#closed.signal.aborted) throw new TypeError("this client is closed");
    const names = channelNames(channels);
    if (start !== "latest" && !(Number.isSafeInteger(start) && start >= 0)) {
      throw new TypeError(`start is a cursor or "latest", not ${start}`);
    }
    const key = `pushup:${this.#wire.base}:${JSON.stringify([...names].sort())}`;
    const kept = this.#storage?.getItem(key);
    const from = /^\d+$/.test(kept ?? "") ? Number(kept) : start;
    const subscription = new Subscription(names, from, this.#line, this.#storage, key);
    const id = unique();
    this.#subscriptions.set(id, subscription);
    this.#ids.set(subscription, id);
    if (this.#subscriptions.size === 1) this.#watchPage();
    if (this.#source) subscription[TAKE].join();
    else if (!this.#opening) this.#open();
    return subscription;
  }

  /** Publish, and try again for up to a minute if that may help; the key makes sure that it is published once. */
  async publish(channels, data, { key = unique() } = {}) {
    const body = JSON.stringify({ channels: channelNames(channels), data, key });
    if (data === undefined) throw new TypeError("undefined is not JSON");
    const { signal } = this.#closed;
    const until = Date.now() + PUBLISH_S * 1000;
    for (let failures = 0; ; failures++) {
      try {
        if (signal.aborted) throw CHANGED;
        const { id } = await this.#wire.json(`${this.#wire.base}/publish`, body, GRACE_S, signal);
        return { id };
      } catch (error) {
        if (error === CHANGED || signal.aborted) throw new PushUpError("The client was closed.", { code: "closed" });
        if (await this.#wire.renews(error)) continue;
        const wait = backoff(failures);
        if (isFinal(error) || Date.now() + (error.retryAfter + wait) * 1000 > until) throw error;
        await this.#pause.sleep(error.retryAfter, wait, signal);
      }
    }
  }

  /** End everything: subscriptions, requests, locks. */
  close() {
    this.#closed.abort();
    for (const subscription of [...this.#subscriptions.values()]) subscription.close();
  }

  async #open() {
    const opening = (this.#opening = new AbortController());
    const tell = (event) => this.#hear(event);
    const { transport, share, credentials } = this.#options;
    const makeFeeds = (hear) => new Feeds(this.#wire, new Carrier(this.#wire, transport), hear);
    if (!share || !canShare()) {
      this.#begin(makeFeeds(tell));
      return;
    }
    for (let failures = 0; ; failures++) {
      try {
        const name = await shareName(this.#wire.base, await this.#wire.token(), credentials, transport);
        if (!opening.signal.aborted) await this.#meet(new Tabs(name, makeFeeds, tell), opening.signal);
        return;
      } catch (error) {
        if (opening.signal.aborted) return;
        if (!(error instanceof PushUpError)) {
          this.#begin(makeFeeds(tell)); // A sandboxed page has no locks, though it looks as if it had.
          return;
        }
        for (const subscription of this.#subscriptions.values()) subscription[TAKE].state("waiting", error);
        await this.#pause.sleep(0, backoff(failures), opening.signal);
        if (opening.signal.aborted) return;
      }
    }
  }

  async #meet(tabs, signal) {
    const close = () => tabs.close();
    signal.addEventListener("abort", close);
    try {
      await tabs.open();
    } catch (error) {
      close();
      throw error;
    }
    signal.removeEventListener("abort", close);
    if (!signal.aborted) this.#begin(tabs);
  }

  #begin(source) {
    this.#source = source;
    for (const subscription of this.#subscriptions.values()) subscription[TAKE].join();
  }

  #shut() {
    this.#opening?.abort();
    this.#source?.close();
    this.#opening = this.#source = null;
  }

  #leave(subscription, forNow) {
    const id = this.#ids.get(subscription);
    if (id === undefined) return;
    this.#source?.leave(id);
    if (forNow) return;
    this.#ids.delete(subscription);
    this.#subscriptions.delete(id);
    if (this.#subscriptions.size) return;
    this.#shut();
    this.#page.abort();
  }

  #hear({ for: ids, fact, state, failure, failed, refused }) {
    const addressed = refused ? [...this.#subscriptions.keys()] : ids;
    for (const id of addressed) {
      const inner = this.#subscriptions.get(id)?.[TAKE];
      if (!inner) continue;
      if (fact) inner.fact(fact);
      else if (state) inner.state(state, new PushUpError(failure.message, failure));
      else inner.fail(refused ?? new PushUpError(failed.message, failed));
    }
  }

  /** A page goes on when it is hidden; frozen, or kept for the way back, it lets others lead and comes back later. */
  #watchPage() {
    const { signal } = (this.#page = new AbortController());
    const listen = (target, type, callback) => target?.addEventListener?.(type, callback, { signal });
    const page = globalThis.document;
    const resume = () => {
      if (!this.#source && !this.#opening && this.#subscriptions.size) this.#open();
    };
    const wake = (anew) => {
      resume();
      this.#pause.rouse();
      this.#source?.wake(anew);
    };
    listen(page && globalThis, "pagehide", () => this.#shut());
    listen(page && globalThis, "pageshow", resume);
    listen(page, "freeze", () => this.#shut());
    listen(page, "resume", resume);
    listen(page, "visibilitychange", () => page.visibilityState === "visible" && wake(false));
    for (const type of ["online", "offline"]) listen(globalThis, type, () => wake(true));
  }
}
