/* The question board.
 *
 * A question is published to `author:NAME` and to each `tag:TAG`. The page holds one poll open over every channel it
 * follows. Which these are is in the URL's fragment, written like the poll's own query, so every tab has its own and a
 * link carries them. What people wrote goes into the page as text only; the policy the page is sent with forbids HTML.
 *
 * A page that belongs to a web application (`data-questions` is the path) posts questions to the application, which
 * keeps them and publishes them, and loads from it what was asked before. It takes its cursor first and loads second:
 * what is published in between comes twice and is shown once. The other way round it would be missed.
 */

const HOLD_S = 25;
const GRACE_S = 10; // An answer this late after the hold does not come any more.
const BACKOFF_MIN_S = 0.5;
const BACKOFF_MAX_S = 20;
const HASTY_S = 0.1; // An empty answer that comes sooner did not wait, and must not be asked for in a tight loop.
const PUBLISH_TIMEOUT_S = 10;
const PUBLISH_TRIES = 8;
const DEFAULT_CHANNELS = ["tag:python", "tag:redis"];
const QUESTIONS_MAX = 1000;
const TAGS_MAX = 20;
const LOG_LINES = 4;
const FLASH_MS = 700;
const QUESTIONS = document.body.dataset.questions; // The application's path; empty: there is none.

const $ = (id) => document.getElementById(id);
const stamp = (name) => $(name).content.firstElementChild.cloneNode(true);
const clean = (text) => text.normalize("NFC").trim().replace(/\s+/g, " ");
const distinct = (list) => [...new Set(list)];
const count = (number, thing) => `${number} ${thing}${number === 1 ? "" : "s"}`;
const clock = (date) => date.toLocaleTimeString([], { timeStyle: "medium", hourCycle: "h23" });

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
    if (controller.signal.reason === HUNG) throw new Failure(`No answer within ${seconds} seconds.`);
    if (error instanceof Failure) throw error;
    if (error instanceof SyntaxError) throw new Failure("Something answered that is not PushUp.");
    throw new Failure(navigator.onLine ? "The server cannot be reached." : "This browser is offline.");
  } finally {
    clearTimeout(timer);
  }
}

/** The Failure that an answer other than 2xx means; its sentence is the problem document's, if there is one. */
async function refusal(response) {
  const { status, headers } = response;
  const problem = await response.json().catch(() => null);
  const detail = typeof problem?.detail === "string" ? problem.detail : `The server answered ${status}.`;
  const refused = status >= 400 && status < 500 && status !== 408 && status !== 429;
  return new Failure(detail, { refused, retryAfter: seconds(headers.get("Retry-After")) });
}

/** `Retry-After` in seconds: it is a number of them or a date. */
function seconds(header) {
  if (!header) return 0;
  const wait = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Math.max(wait, 0) || 0;
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
    const timer = setTimeout(rise, wait * 1000);
    sleepers.add(rise);
  });
}

const rouse = () => sleepers.forEach((rise) => rise());

// The poll

let round = 0; // Changes with what is followed; a loop of an earlier round ends.
let polling = new AbortController();

/** Ask anew at once: what is in flight may hang on a network that is gone. Nothing is lost, the cursor stays. */
function wake() {
  polling.abort(WOKEN);
  rouse();
}

const query = (channels) =>
  new URLSearchParams(channels.map((channel) => ["channel", channel])).toString().replaceAll("%3A", ":");

/** Follow these channels until others are followed: what was asked before first, then whatever comes. */
async function listen(channels) {
  const mine = ++round;
  wake();
  let cursor = null;
  let failures = 0;
  let hasty = 0;
  while (mine === round) {
    // The first poll does not wait: only with a cursor in hand can a gap be noticed. Nor does one after a failure:
    // its answer says that the server is there again.
    const hold = cursor && !failures ? HOLD_S : 0;
    const url = `/poll?${query(channels)}&start=${cursor ?? (QUESTIONS ? "latest" : 0)}&timeout=${hold}`;
    const began = performance.now();
    polling = new AbortController();
    showPoll(url, cursor, hold, failures);
    let answer;
    try {
      answer = await exchange(url, {}, hold + GRACE_S, polling);
      if (!Number.isSafeInteger(answer?.next)) throw new Failure("Something answered that is not PushUp.");
      // Without these the answer does not count either: the cursor stays, and both are asked for again.
      if (QUESTIONS && (cursor === null || answer.gap)) answer.stored = await loadStored(channels, polling);
    } catch (failure) {
      if (mine !== round) return;
      if (failure === WOKEN) continue;
      const wait = failure.retryAfter + backoff(failure.refused ? Infinity : failures);
      failures++;
      showFailure(failure, wait);
      await pause(wait);
      continue;
    }
    if (mine !== round) return;
    const took = (performance.now() - began) / 1000;
    showAnswer(answer, took, hold, cursor !== null);
    cursor = answer.next;
    failures = 0;
    hasty = hold && !answer.messages.length && took < HASTY_S ? hasty + 1 : 0;
    if (hasty) await pause(backoff(hasty - 1));
  }
}

/** What the application has stored for these channels, in the form of a poll's messages. */
async function loadStored(channels, controller) {
  const { messages } = await exchange(`${QUESTIONS}?${query(channels)}`, {}, GRACE_S, controller);
  if (!Array.isArray(messages)) throw new Failure("Something answered that is not the question board.");
  return messages;
}

// What is followed

let followed = null;
let me = history.state?.author ?? ""; // Who asked from this tab; known to this entry of the tab's history only.

/** The channels in the URL's fragment; without any, the default and this page's own author. */
function readFragment() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  if (fragment.has("channel")) return distinct(fragment.getAll("channel").filter(Boolean));
  return me ? [...DEFAULT_CHANNELS, `author:${me}`] : DEFAULT_CHANNELS;
}

function writeFragment(channels) {
  history.replaceState(history.state, "", `#${channels.length ? query(channels) : "channel="}`);
}

/** Follow exactly these. The list starts again: what is cached of a new channel belongs between what is there. */
function follow(channels) {
  if (followed && query(channels) === query(followed)) return;
  followed = channels;
  showFollowed();
  $("questions").replaceChildren();
  if (channels.length) {
    listen(channels);
  } else {
    round++;
    wake();
    showIdle();
  }
}

function add(channel) {
  if (followed.includes(channel)) return;
  writeFragment([...followed, channel]);
  follow(readFragment());
}

function remove(channel) {
  writeFragment(followed.filter((other) => other !== channel));
  follow(readFragment());
}

function showFollowed() {
  $("followed").replaceChildren(...followed.map((channel) => {
    const chip = stamp("chip");
    chip.dataset.channel = channel;
    chip.querySelector("bdi").textContent = channel;
    const button = chip.querySelector("button");
    button.setAttribute("aria-label", `Stop following ${channel}`);
    button.addEventListener("click", () => {
      const next = chip.nextElementSibling ?? chip.previousElementSibling;
      remove(channel);
      const again = [...$("followed").children].find((other) => other.dataset.channel === next?.dataset.channel);
      (again?.querySelector("button") ?? $("name")).focus();
    });
    return chip;
  }));
  const names = new Intl.ListFormat("en", { type: "disjunction" }).format(followed);
  $("empty").textContent = followed.length
    ? `Nothing on ${names} yet. The first question appears here by itself.`
    : "This page follows nothing. Follow a tag or an author to see questions.";
  $("curl").textContent = curl(followed[0] ?? DEFAULT_CHANNELS[0]);
}

/** A line for a shell that publishes to the channel. Single quotes keep the shell from reading what is inside. */
function curl(channel) {
  const [kind, name] = channel.split(/:(.*)/s);
  const data = {
    author: kind === "author" ? name : "curl",
    question: "Can you hear me?",
    tags: kind === "tag" ? [name] : [],
  };
  const body = JSON.stringify(QUESTIONS ? data : { channels: [channel], data }).replaceAll("'", "'\\''");
  const to = QUESTIONS ? `${QUESTIONS} -H 'Content-Type: application/json'` : "/publish";
  return `curl ${location.origin}${to} -d '${body}'`;
}

// The wire panel

let state = "";
let flashed = 0;
let flashing = 0;
let filling = null;
const totals = { received: 0, answered: 0, gaps: 0 };

function showState(next) {
  clearTimeout(flashing);
  const rest = flashed + FLASH_MS - performance.now();
  if (next === "waiting" && state === "answered" && rest > 0) {
    flashing = setTimeout(showState, rest, next);
    return;
  }
  if (next === "answered") flashed = performance.now();
  state = next;
  for (const shown of document.querySelectorAll(".state")) shown.dataset.state = shown.textContent = next;
}

function showPoll(url, cursor, hold, failures) {
  if (!failures) {
    showState("waiting");
    $("trouble").hidden = true;
  }
  $("request").replaceChildren(...breakable(`GET ${url}`));
  $("cursor").textContent = cursor ?? 0;
  filling?.cancel();
  filling = hold ? $("held").animate({ width: ["0", "100%"] }, { duration: hold * 1000, fill: "forwards" }) : null;
}

function showFailure(failure, wait) {
  showState(navigator.onLine ? "retrying" : "offline");
  filling?.cancel();
  $("trouble").hidden = false;
  if ($("reason").textContent !== failure.message) $("reason").textContent = failure.message;
  $("again").textContent = `Next try in ${wait < 1 ? "a moment" : count(Math.round(wait), "second")}.`;
  log(failure.message, "");
}

function showAnswer(answer, took, hold, fresh) {
  totals.answered += 1;
  totals.received += answer.messages.length;
  if (answer.gap) totals.gaps += 1;
  for (const [name, total] of Object.entries(totals)) $(name).textContent = total;
  $("gaps").dataset.warn = String(totals.gaps > 0);
  $("cursor").textContent = answer.next;
  $("trouble").hidden = true;
  const what = answer.messages.length ? count(answer.messages.length, "message") : answer.closed ? "closed" : "empty";
  log(`200 ${what}${answer.gap ? ", gap" : ""}`, hold ? `after ${took.toFixed(took < 1 ? 3 : 1)} s` : "no wait");
  showState("answered");
  showQuestions(answer, fresh);
}

function showIdle() {
  showState("idle");
  $("trouble").hidden = true;
  $("request").textContent = "no poll: nothing is followed";
  $("cursor").textContent = 0;
  filling?.cancel();
}

/** The text as nodes that may be broken before each parameter of the query. */
const breakable = (text) => text.split(/(?=[?&])/).flatMap((part) => [document.createElement("wbr"), part]);

function log(what, when) {
  const line = document.createElement("li");
  for (const part of [`${clock(new Date())} ${what}`, when]) {
    line.append(Object.assign(document.createElement("span"), { textContent: part }));
  }
  $("log").prepend(line);
  while ($("log").childElementCount > LOG_LINES) $("log").lastElementChild.remove();
}

// Questions

let unseen = 0;

function showQuestions({ messages, gap, closed, stored }, fresh) {
  const list = $("questions");
  if (stored) list.replaceChildren(...stored.map((message) => entry(message, false)).reverse());
  if (gap) {
    list.prepend(note("gap", stored
      ? "This page had missed something (gap: true), and has loaded the questions from the application again."
      : "Questions may be missing here: the server no longer had everything since this page last heard from it, " +
        "and said so (gap: true)."));
  }
  for (const message of messages) if (!QUESTIONS || !shown(message)) list.prepend(entry(message, fresh));
  if (closed) {
    list.prepend(note("closed", `The server closed ${closed.join(", ")}. The page goes on following it: ` +
      "the next question opens it again."));
  }
  while (list.childElementCount > QUESTIONS_MAX) list.lastElementChild.remove();
  if (messages.length) $("news").textContent = count(messages.length, "new question");
  if (document.hidden && fresh) unseen += messages.length;
  showTitle();
}

function showTitle() {
  document.title = `${unseen ? `(${unseen}) ` : ""}PushUp question board`;
}

function note(kind, text) {
  const item = stamp("note");
  item.dataset.note = kind;
  item.textContent = text;
  return item;
}

/** The application's number of a question, by which what is stored and what is published are told to be the same. */
const numberOf = ({ data }) => (Number.isSafeInteger(data?.number) ? data.number : "");

function shown(message) {
  const number = numberOf(message);
  return number !== "" && $("questions").querySelector(`[data-number="${number}"]`) !== null;
}

/** A message as a question. Anybody may publish anything, so nothing about `data` is taken for granted. */
function entry(message, fresh) {
  const { id, channels, data } = message;
  const item = stamp("entry");
  const author = typeof data?.author === "string" ? data.author : "";
  const text = typeof data?.question === "string" ? data.question : JSON.stringify(data);
  const tags = Array.isArray(data?.tags) ? data.tags.filter((tag) => typeof tag === "string" && tag) : [];
  item.dataset.id = id;
  item.dataset.number = numberOf(message);
  item.classList.toggle("fresh", fresh);
  const face = item.querySelector(".face");
  face.textContent = (author ? [...author][0] : "?").toUpperCase();
  face.style.setProperty("--hue", hue(author));
  item.querySelector(".author").textContent = author || "somebody";
  item.querySelector(".text").textContent = text;
  const time = item.querySelector("time");
  const stored = new Date(id / 1000); // An id is the time of publication in microseconds.
  time.dateTime = stored.toISOString();
  time.textContent = clock(stored);
  time.title = `id ${id}`;
  const others = [...(author ? [`author:${author}`] : []), ...tags.slice(0, TAGS_MAX).map((tag) => `tag:${tag}`)]
    .filter((channel, i, all) => !channels.includes(channel) && all.indexOf(channel) === i);
  item.querySelector(".chips").append(...channels.map(matched), ...others.map(other));
  return item;
}

function matched(channel) {
  const chip = stamp("matched");
  chip.dataset.channel = channel;
  chip.firstElementChild.textContent = channel;
  return chip;
}

function other(channel) {
  const item = stamp("other");
  const button = item.firstElementChild;
  button.dataset.follow = channel;
  button.title = `Follow ${channel}`;
  button.setAttribute("aria-label", `Follow ${channel}`);
  button.querySelector("bdi").textContent = channel;
  button.addEventListener("click", () => add(channel));
  return item;
}

const hue = (text) => [...text].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7);

// Asking

let pending = null; // May have arrived although no answer came; asked again it goes under the same key.

async function publish() {
  const author = clean($("author").value);
  const question = $("question").value.trim();
  const tags = distinct(clean($("tags").value).toLowerCase().split(/[\s,]+/).map((tag) => tag.replace(/^#+/, "")))
    .filter(Boolean);
  if (!author || !question) {
    showOutcome("failed", "A question needs some text and your name.");
    return;
  }
  const channels = [`author:${author}`, ...tags.map((tag) => `tag:${tag}`)];
  const data = { author, question, tags };
  const same = JSON.stringify(data);
  if (pending?.same !== same) {
    const key = uniqueKey();
    pending = { same, body: JSON.stringify(QUESTIONS ? { ...data, key } : { channels, data, key }) };
  }
  const failure = await deliver(pending.body);
  if (failure) {
    if (failure.refused) pending = null;
    showOutcome("failed", failure.message);
    return;
  }
  pending = null;
  me = author;
  history.replaceState({ author }, "");
  follow(readFragment());
  $("question").value = "";
  if (channels.some((channel) => followed.includes(channel))) {
    showOutcome("published", `Published to ${channels.join(", ")}.`);
  } else {
    showOutcome("published", `Published to ${channels.join(", ")}. This page follows none of these.`, channels[0]);
  }
}

/** Send a publication until it is acknowledged. The Failure if it is refused, or did not get through in all tries. */
async function deliver(body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body };
  for (let tries = 1; ; tries++) {
    try {
      await exchange(QUESTIONS || "/publish", options, PUBLISH_TIMEOUT_S);
      return null;
    } catch (failure) {
      if (failure.refused || tries === PUBLISH_TRIES) return failure;
      showOutcome("trying", `${failure.message} Trying again…`);
      await pause(failure.retryAfter + backoff(tries));
    }
  }
}

/** 128 random bits. `randomUUID` exists only where the page came over https or from this machine. */
function uniqueKey() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function showOutcome(outcome, text, channel) {
  $("outcome").dataset.outcome = outcome;
  $("outcome").textContent = text;
  if (!channel) return;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = `Follow ${channel}`;
  button.addEventListener("click", () => {
    add(channel);
    showOutcome("", "");
  });
  $("outcome").append(" ", button);
}

// The page

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = $("publish");
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  showOutcome("trying", "Publishing…");
  try {
    await publish();
  } finally {
    button.ariaDisabled = "false";
  }
});

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});

$("add").addEventListener("submit", (event) => {
  event.preventDefault();
  const tag = $("kind").value === "tag";
  const name = clean($("name").value).replace(tag ? /^#+/ : /^@+/, "");
  if (!name) return;
  add(tag ? `tag:${name.toLowerCase()}` : `author:${name}`);
  $("name").value = "";
});

$("copy").addEventListener("click", async () => {
  const line = $("curl");
  getSelection().selectAllChildren(line);
  try {
    await navigator.clipboard.writeText(line.textContent);
  } catch {
    document.execCommand("copy"); // The clipboard's own interface is missing where the page came over plain http.
  }
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 2000);
});

$("retry").addEventListener("click", wake);
addEventListener("online", wake);
addEventListener("offline", wake);
addEventListener("hashchange", () => follow(readFragment()));
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  unseen = 0;
  showTitle();
  rouse(); // Timers of a hidden page run late.
});

$("author").value = me;
follow(readFragment());
