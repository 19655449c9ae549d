// What the tests of the browser module share: a server that follows a script, the timers of the module, and a page.

import { once } from "node:events";
import { createServer } from "node:http";

const MODULE = new URL("../../asgi_realtime/asgi/client.js", import.meta.url);
export const { RealtimeError, followRun, followRuns, readStream, resumingFetch } = await import(MODULE);

// ---- Timers. Waits before a reconnect are recorded and pass at once; the timers that detect silence never do.

export const STALL_MS = 40_000;
export const waits = [];
const stalls = new Set();
const { setTimeout: realSetTimeout, clearTimeout: realClearTimeout } = globalThis;

globalThis.setTimeout = (call, ms, ...rest) => {
  if (!new Error().stack.includes("/client.js")) return realSetTimeout(call, ms, ...rest);
  if (ms === STALL_MS) {
    stalls.add(call);
    return call;
  }
  waits.push(ms);
  return isHeld ? call : setImmediate(call);
};
globalThis.clearTimeout = (timer) => {
  if (typeof timer !== "function") return realClearTimeout(timer);
  stalls.delete(timer);
};

let isHeld = false;

/** Waits before a reconnect take forever while `action` runs. */
export async function holdingWaits(action) {
  isHeld = true;
  try {
    return await action();
  } finally {
    isHeld = false;
  }
}

/** As if the connections had been silent for `STALL_MS`. */
export function passSilence() {
  for (const call of stalls) call();
}

const GUARD_MS = 30_000;

export async function until(condition) {
  const startedAt = performance.now();
  while (!condition()) {
    if (performance.now() - startedAt > GUARD_MS) throw new Error(`never: ${condition}`);
    await new Promise(setImmediate);
  }
}

// ---- A page

let now = 0;
const { now: realNow } = Date;
Date.now = () => realNow() + now;

export const page = {
  sleep: (ms) => (now += ms),

  /** Gives the process the globals of a page while `action` runs. */
  async open(action) {
    const target = new EventTarget();
    globalThis.addEventListener = (...args) => target.addEventListener(...args);
    globalThis.document = { hidden: false, baseURI: "http://page.example/chat/" };
    try {
      return await action((type, hidden = false) => {
        document.hidden = hidden;
        target.dispatchEvent(new Event(type));
      });
    } finally {
      delete globalThis.addEventListener;
      delete globalThis.document;
    }
  },
};

// ---- A server

/**
 * A server that answers each request with the next step, and closes with the test. A step is `{ status, headers, body,
 * then }` or a function of the request that returns one. `then` is "end", "cut" (break the connection) or "hold".
 */
export async function serve(t, ...steps) {
  const requests = [];
  const server = createServer(async (request, response) => {
    let text = "";
    for await (const piece of request) text += piece;
    const { method, url, headers } = request;
    const seen = { method, url, headers, text, isOpen: true, write: (more) => response.write(more), end: () => response.end() };
    requests.push(seen);
    response.on("close", () => (seen.isOpen = false));
    const step = steps.length > 1 ? steps.shift() : steps[0];
    const { status = 200, headers: sent, body = "", then = "end" } = typeof step === "function" ? step(seen) : step;
    response.writeHead(status, { "content-type": "text/event-stream", ...sent });
    response.flushHeaders();
    if (body.length) await new Promise((done) => response.write(body, done));
    if (then === "end") response.end();
    if (then === "cut") response.destroy();
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => {
    server.closeAllConnections();
    server.close();
    waits.length = 0;
  });
  const url = `http://127.0.0.1:${server.address().port}`;
  return { url, base: `${url}/realtime`, requests, steps };
}

export const refused = (status, code, headers = {}) => ({
  status,
  headers: { "content-type": "application/json", ...headers },
  body: JSON.stringify({ error: `refused: ${code}`, code }),
});

export const chunk = (id, value) => `id: ${id}\ndata: ${JSON.stringify(value)}\n\n`;
export const control = (event, data, id) => `event: ${event}\n${id === undefined ? "" : `id: ${id}\n`}data: ${JSON.stringify(data)}\n\n`;
export const complete = (id) => control("end", { reason: "complete" }, id);
export const HEAD = "retry: 1000\n: connected\n";

/** Frames as a server has them: those after the id that the request names, or all. */
export function after(frames, { headers }) {
  const last = headers["last-event-id"];
  if (last === undefined) return frames.join("");
  return frames.slice(1 + frames.findIndex((frame) => frame.startsWith(`id: ${last}\n`) || frame.includes(`\nid: ${last}\n`))).join("");
}

/** Everything that an iterator yields, and its error if it throws one. */
export async function collect(iterator, found = []) {
  try {
    for await (const value of iterator) found.push(value);
    return { found };
  } catch (error) {
    return { found, error };
  }
}
