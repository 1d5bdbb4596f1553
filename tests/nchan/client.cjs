// Nchan's client, unmodified, in Node.js: `node client.cjs NchanSubscriber.js URL TRANSPORT`. A line of JSON for each
// thing it says. The client is made for browsers, so what it takes from `window` stands here, with an XMLHttpRequest
// that does no more than it uses.
"use strict";
const http = require("node:http");
const path = require("node:path");

class XMLHttpRequest {
  readyState = 0;
  status = 0;
  responseText = "";
  #headers = {};
  #answered = {};
  #request;

  open(method, url) {
    this.method = method;
    this.url = url;
  }

  setRequestHeader(name, value) {
    this.#headers[name] = value;
  }

  getResponseHeader(name) {
    return this.#answered[name.toLowerCase()] ?? null;
  }

  send() {
    this.#request = http.request(this.url, { method: this.method, headers: this.#headers, agent: false }, (answer) => {
      const chunks = [];
      answer.on("data", (chunk) => chunks.push(chunk));
      answer.on("error", () => this.#fail());
      answer.on("end", () => {
        if (!answer.complete) return this.#fail();
        this.status = answer.statusCode;
        this.#answered = answer.headers;
        this.responseText = Buffer.concat(chunks).toString();
        this.readyState = 4;
        this.onreadystatechange?.();
        this.onload?.();
      });
    });
    this.#request.on("error", () => this.#fail());
    this.#request.end();
  }

  abort() {
    this.aborted = true;
    this.#request?.destroy();
    this.onabort?.();
  }

  #fail() {
    if (this.aborted || this.readyState === 4) return;
    this.readyState = 4;
    this.onreadystatechange?.();
    this.onerror?.();
  }
}

globalThis.XMLHttpRequest = XMLHttpRequest;
globalThis.window = Object.assign(new EventTarget(), {
  XMLHttpRequest,
  location: { protocol: "http:", host: "localhost", pathname: "/" },
  setTimeout,
  clearTimeout,
  setInterval,
  clearInterval,
});

const [script, url, transport, id] = process.argv.slice(2);
const NchanSubscriber = require(path.resolve(script));
const say = (what) => process.stdout.write(`${JSON.stringify(what)}\n`);
const subscriber = new NchanSubscriber(url, { subscriber: transport, id });
subscriber.on("message", (text, meta) => say({ message: text, id: meta.id ?? null, type: meta["content-type"] ?? null }));
subscriber.on("error", (code) => say({ error: typeof code === "number" ? code : "event" }));
subscriber.on("disconnect", () => say({ disconnected: true }));
subscriber.on("connect", () => say({ connected: true }));
subscriber.start();
setInterval(() => {}, 1000); // Node.js would end while its EventSource waits to come back.
