/* What the tests of the JavaScript client do in a page. */

import { PushUp } from "/pushup.js";

/** Everything that a subscription said, in order: messages as their data, anything else by name. */
const seen = [];
const states = [];

function watch(subscription) {
  subscription.on("gap", () => seen.push("gap"));
  subscription.on("closed", (channels) => seen.push({ closed: channels }));
  subscription.on("error", ({ status, code }) => seen.push({ status, code }));
  subscription.on("state", (state) => states.push(state));
}

function follow(options, channels, start) {
  window.pushup = new PushUp(options);
  window.subscription = window.pushup.subscribe(channels, { start });
  watch(window.subscription);
  window.subscription.on("message", (message) => seen.push(message.data));
}

/** Read by a loop that takes one message whenever `step` is called, and all if it never waits. */
function iterate(options, channels, start) {
  window.pushup = new PushUp(options);
  window.subscription = window.pushup.subscribe(channels, { start });
  watch(window.subscription);
  const iterator = window.subscription[Symbol.asyncIterator]();
  window.step = () =>
    iterator.next().then(
      ({ done, value }) => seen.push(done ? "done" : value.data),
      ({ code }) => seen.push({ thrown: code }),
    );
  window.leave = () => iterator.return();
}

Object.assign(window, { PushUp, seen, states, watch, follow, iterate, ready: true });
