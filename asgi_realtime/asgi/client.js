// The browser module of asgi_realtime: reads streams and runs with fetch, and resumes them by id after any interruption.
// Usage: docs/browser.md. The wire: docs/protocol.md, sections 4 and 5.

/**
 * @typedef {{ id: string, publicAccessToken?: string }} Handle A handle of the server, as JSON.
 * @typedef {Handle | string | URL} Source A handle, or the URL of a stream or feed.
 * @typedef {{ id: string, status: string, isCompleted: boolean, metadata?: any, payload?: any, output?: any, [field: string]: any }} Run
 * @typedef {string | { token: string } | { publicAccessToken: string }} Token
 * @typedef {object} Options
 * @property {string} [token] By default that of the handle or URL.
 * @property {(denied?: RealtimeError) => Promise<Token | Response> | Token} [refreshToken] Called if there is no token,
 *   and once after each denial. A response has the token in its JSON.
 * @property {AbortSignal} [signal]
 * @property {(state: "live" | "reconnecting", error?: RealtimeError) => void} [onState]
 * @property {string | URL} [base] The URL of the mount; by default the folder of this module.
 * @property {boolean} [pauseHidden] Disconnect while the tab is hidden.
 * @property {number} [stallAfter] Reconnect after so many milliseconds of silence.
 * @typedef {{ type: string, data: string, id?: string }} SseEvent
 */

/** Why an iterator stopped: `code` is a code of the server, a reason of `end`, `gap` or `cut`. */
export class RealtimeError extends Error {
  /**
   * @param {string} code
   * @param {string} message
   * @param {{ status?: number, retryAfter?: number, cause?: unknown }} [details] `retryAfter` is in milliseconds.
   */
  constructor(code, message, { status, retryAfter, cause } = {}) {
    super(message, { cause });
    this.name = "RealtimeError";
    this.code = code;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** @param {string} message @param {{ retryAfter?: number, cause?: unknown }} [details] */
const lost = (message, details) => new RealtimeError("network", message, details);

/** @param {RealtimeError} error */
const isTemporary = ({ code, status = 0 }) =>
  code === "network" || code === "reconnect" || status >= 500 || [408, 425, 429].includes(status);

/**
 * Reads the chunks of a stream, after the id `from` if given, until the run has completed. Throws a `RealtimeError` if
 * the run ends in another way or access is denied, or if chunks have expired and there is no `onGap`.
 *
 * @template [T=any]
 * @param {Source} source
 * @param {Options & { stream?: string, from?: string | number, onGap?: (gap: { requested: number, first: number }) => void }} [options]
 * @returns {AsyncGenerator<T, void, void> & { lastId?: string, end?: { reason: string, error?: any } }} `lastId` is the id
 *   of the last chunk, `end` how the run ended.
 */
export function readStream(source, { stream = "default", from, onGap, ...options } = {}) {
  const target = locate(source, (id) => `v1/streams/${id}/${encodeURIComponent(stream)}`, options.base);
  const lastId = String(from ?? "") || undefined;
  const result = /** @type {any} */ (Object.assign(read(), { lastId }));
  return result;

  async function* read() {
    for await (const events of follow(target, options, lastId)) {
      for (const { type, data, id } of events) {
        const value = JSON.parse(data);
        if (type === "end") {
          result.end = value;
          if (value.reason === "complete") return;
          throw new RealtimeError(value.reason, value.error?.message ?? value.error ?? `the run ended: ${value.reason}`);
        }
        result.lastId = id ?? result.lastId;
        if (type === "message") yield value;
        else if (type === "gap" && onGap) onGap(value);
        else if (type === "gap") {
          throw new RealtimeError("gap", `the chunks before ${value.first} have expired; pass onGap to skip them`);
        }
      }
    }
  }
}

/**
 * Yields the state of a run, now and after each change. The last one is that in which it ended.
 *
 * @param {Source} source
 * @param {Options & { skipColumns?: string[] }} [options]
 * @returns {AsyncGenerator<Run, void, void>}
 */
export async function* followRun(source, { skipColumns, ...options } = {}) {
  const target = locate(source, (id) => `v1/runs/${id}`, options.base, { skipColumns });
  for await (const events of follow(target, options)) {
    for (const { type, data } of events) if (type === "run") yield JSON.parse(data);
  }
}

/**
 * Follows the runs with all of the tags, or the runs of a batch until all have ended. Yields once all are known, and
 * after each change: all states by id, the new ones, and the ids that the server no longer has.
 *
 * @param {Options & { tags?: string | string[], batch?: Handle, createdAt?: string, skipColumns?: string[] }} options
 * @returns {AsyncGenerator<{ runs: Map<string, Run>, changed: Run[], removed: string[] }, void, void>}
 */
export async function* followRuns({ tags, batch, createdAt, skipColumns, ...options }) {
  const path = (/** @type {string} */ id) => (batch ? `v1/batches/${id}` : "v1/runs");
  const target = locate(batch ?? { id: "" }, path, options.base, { tags, createdAt, skipColumns });
  /** @type {Map<string, Run>} */
  const runs = new Map();
  for await (const events of follow(target, options)) {
    /** @type {Run[]} */
    const changed = events.filter(({ type }) => type === "run").map(({ data }) => JSON.parse(data));
    const isSnapshot = events.some(({ type }) => type === "ready");
    const listed = new Set(changed.map(({ id }) => id));
    const removed = isSnapshot ? [...runs.keys()].filter((id) => !listed.has(id)) : [];
    for (const id of removed) runs.delete(id);
    for (const run of changed) runs.set(run.id, run);
    if (isSnapshot || changed.length) yield { runs, changed, removed };
  }
}

/**
 * A `fetch` for the AI SDK's `new DefaultChatTransport({ fetch })`: if the connection of an answer is lost, its body
 * continues with the rest. `resume` returns the URL of the rest, by default that in the header `x-realtime-resume`. A
 * response without one is passed on as it is.
 *
 * @param {Omit<Options, "signal"> & { fetch?: typeof fetch, resume?: (response: Response, url: string) => string | URL | null | undefined }} [options]
 * @returns {typeof fetch}
 */
export function resumingFetch({ fetch: send = (input, init) => fetch(input, init), resume, ...options } = {}) {
  return async (input, init = {}) => {
    const response = await send(input, init);
    const named = response.headers.get("x-realtime-resume");
    const url = input instanceof Request ? input.url : String(input);
    const rest = resume ? resume(response, url) : named && new URL(named, mount(options.base));
    if (!rest || !response.body || !isEventStream(response)) return response;

    const headers = new Headers(init.headers);
    headers.delete("content-type");
    const target = { ...locate(rest), init: resume ? { headers, credentials: init.credentials } : {} };
    const stop = new AbortController();
    const signal = init.signal ?? (input instanceof Request ? input.signal : null);
    signal?.addEventListener("abort", () => stop.abort(signal.reason));
    const answer = follow(target, { ...options, signal: stop.signal }, undefined, response, send);
    const encoder = new TextEncoder();
    let last = "";
    const body = new ReadableStream({
      async pull(controller) {
        let { value: events, done } = await answer.next();
        if (done && /^{"type":"(finish|abort|error)"/.test(last)) events = [{ type: "message", data: DONE }]; // only this was cut
        if (events) {
          last = events[events.length - 1].data;
          controller.enqueue(encoder.encode(events.map(frame).join("")));
        }
        if (done && last === DONE) controller.close();
        else if (done) throw new RealtimeError("cut", "the rest of the answer is not available; load the chat again");
      },
      cancel: (reason) => stop.abort(reason),
    });
    return new Response(body, response);
  };
}

const DONE = "[DONE]";

/** @param {SseEvent} event */
function frame({ type, data, id }) {
  const head = (type === "message" ? "" : `event: ${type}\n`) + (id === undefined ? "" : `id: ${id}\n`);
  return `${head}data: ${data.replaceAll("\n", "\ndata: ")}\n\n`;
}

// ---- Where

const page = () => globalThis.document?.baseURI ?? globalThis.location?.href;

/** @param {string | URL} [base] */
function mount(base = /^http/.test(import.meta.url) ? new URL(".", import.meta.url) : "/realtime") {
  return new URL(String(base).replace(/\/?$/, "/"), page());
}

/**
 * @param {Source} source
 * @param {(id: string) => string} [path]
 * @param {string | URL} [base]
 * @param {Record<string, string | string[] | undefined>} [query]
 */
function locate(source, path = String, base, query = {}) {
  const isUrl = typeof source === "string" || source instanceof URL;
  if (!isUrl && typeof source?.id !== "string") {
    throw new TypeError(`the source is ${JSON.stringify(source)}; it must be a handle or a URL`);
  }
  const url = isUrl ? new URL(source, page()) : new URL(path(encodeURIComponent(source.id)), mount(base));
  for (const [name, value] of Object.entries(query)) if (value !== undefined) url.searchParams.set(name, String(value));
  const token = (isUrl ? url.searchParams.get("access_token") : source.publicAccessToken) ?? undefined;
  url.searchParams.delete("access_token");
  return { url, token };
}

// ---- The connection

/**
 * The events of a resource, across connections, until `end`, `[DONE]` or a 204. An event without an id comes together
 * with the next one that has one, because without that it is sent again.
 *
 * @param {{ url: URL, token?: string, init?: RequestInit }} target
 * @param {Options} options
 * @param {string} [lastId]
 * @param {Response} [first] A response that is open already.
 * @param {typeof fetch} [send]
 * @returns {AsyncGenerator<SseEvent[], void, void>}
 */
async function* follow(target, options, lastId, first, send = (url, init) => fetch(url, init)) {
  const { refreshToken, signal, onState, pauseHidden, stallAfter = 40_000 } = options;
  let token = options.token ?? target.token;
  let request = new AbortController();
  let wake = () => {};
  let isLeft = false;
  let heardAt = Date.now();

  const isPaused = () => isLeft || (pauseHidden && globalThis.document?.hidden);
  /** @param {Event} event */
  const onPage = ({ type }) => {
    if (type.startsWith("page")) isLeft = type === "pagehide"; // a page can be in the back/forward cache
    const isStale = Date.now() - heardAt > stallAfter; // timers stop while a computer sleeps
    if (isPaused() || type === "online" || isStale) request.abort(lost(type, { retryAfter: 0 }));
    if (!isPaused()) wake();
  };
  const over = new AbortController();
  for (const type of ["online", "pagehide", "pageshow", "visibilitychange"]) {
    globalThis.addEventListener?.(type, onPage, { signal: over.signal });
  }
  const onAbort = () => {
    request.abort(signal?.reason);
    wake();
  };
  signal?.addEventListener("abort", onAbort, { signal: over.signal });

  /** @param {number} [ms] */
  const sleep = (ms) =>
    new Promise((resolve) => {
      const timer = ms === undefined ? ms : setTimeout(resolve, ms);
      wake = () => {
        clearTimeout(timer);
        resolve(null);
      };
    });
  /** @template T @param {Promise<T>} promise */
  const heard = async (promise) => {
    const stalled = () => request.abort(lost("the connection is silent", { retryAfter: 0 }));
    const timer = setTimeout(stalled, stallAfter);
    try {
      return await promise;
    } catch (cause) {
      throw request.signal.aborted ? request.signal.reason : lost("the connection was lost", { cause });
    } finally {
      clearTimeout(timer);
      heardAt = Date.now();
    }
  };
  const connect = () => {
    const headers = new Headers(target.init?.headers);
    headers.set("accept", "text/event-stream");
    if (token) headers.set("authorization", `Bearer ${token}`);
    if (lastId !== undefined) headers.set("last-event-id", lastId);
    return heard(send(target.url, { ...target.init, headers, cache: "no-store", signal: request.signal }));
  };

  try {
    let tries = 0;
    let delay = 0;
    /** @type {RealtimeError | undefined} */
    let denied;
    let isRenewed = false;
    for (;;) {
      while (delay > 0 || isPaused()) {
        await sleep(isPaused() ? undefined : delay);
        delay = 0;
      }
      signal?.throwIfAborted();
      request = new AbortController();
      const openedAt = Date.now();
      try {
        if (refreshToken && token === undefined && !first) {
          isRenewed = true;
          token = await newToken(refreshToken, denied, request.signal);
        }
        const response = first ?? (await connect());
        first = undefined;
        if (response.status === 204) return;
        if (!isEventStream(response)) throw await heard(refusal(response));
        isRenewed = false;
        onState?.("live");
        for await (const events of groups(response.body, request.signal, heard)) {
          const { type, data, id } = events[events.length - 1];
          if (type === "reconnect") {
            throw new RealtimeError(type, "the server asks to reconnect", { retryAfter: JSON.parse(data).retry || undefined });
          }
          if (type === "end" && JSON.parse(data).reason === "token_expired") {
            throw new RealtimeError("token_expired", "the token has expired");
          }
          tries = 0;
          const isOver = isLast(events[events.length - 1]);
          if (type === "message" && !isOver && Number(id) <= Number(lastId)) continue; // sent twice
          lastId = id ?? lastId;
          yield events;
          if (isOver) return;
        }
        throw lost("the connection ended");
      } catch (error) {
        signal?.throwIfAborted();
        if (!(error instanceof RealtimeError)) throw error;
        const isDenied = error.status === 401 || error.status === 403 || error.code === "token_expired";
        if (isDenied && refreshToken && !isRenewed) {
          denied = error;
          token = undefined;
          continue;
        }
        if (!isTemporary(error)) throw error;
        if (Date.now() - openedAt > 10_000) tries = 0;
        const { status, retryAfter } = error;
        const backoff = () => Math.min(500 * 2 ** tries++, 15_000) * (0.5 + Math.random() / 2);
        delay = status && retryAfter ? retryAfter + backoff() : (retryAfter ?? backoff()); // `Retry-After` is the same for all
        onState?.("reconnecting", error);
      } finally {
        request.abort();
      }
    }
  } finally {
    over.abort();
  }
}

/**
 * @param {NonNullable<Options["refreshToken"]>} refresh
 * @param {RealtimeError | undefined} denied
 * @param {AbortSignal} signal
 * @returns {Promise<string>}
 */
async function newToken(refresh, denied, signal) {
  const aborted = new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
  try {
    let found = await Promise.race([(async () => refresh(denied))(), aborted]);
    if (found instanceof Response) {
      if (!found.ok) throw await refusal(found);
      found = await found.json();
    }
    const token = found?.publicAccessToken ?? found?.token ?? found;
    if (typeof token === "string") return token;
  } catch (error) {
    throw error instanceof TypeError ? lost("refreshToken failed", { cause: error }) : error;
  }
  throw new RealtimeError("invalid_token", "refreshToken returned no token");
}

/** @param {Response} response */
const isEventStream = ({ ok, headers }) => ok && /^text\/event-stream\b/i.test(headers.get("content-type") ?? "");

/** @param {Response} response */
async function refusal(response) {
  const { status } = response;
  const body = await response.json().catch(() => ({}));
  const seconds = Number(response.headers.get("retry-after"));
  const retryAfter = seconds > 0 ? seconds * 1000 : undefined;
  const message = body?.error ?? `${response.url} returned ${status} and no event stream; is "base" right?`;
  return new RealtimeError(body?.code ?? `http_${status}`, message, { status, retryAfter });
}

/** @param {SseEvent} event */
const isLast = ({ type, data }) => type === "end" || data === DONE;

/**
 * @param {ReadableStream<Uint8Array> | null} body
 * @param {AbortSignal} signal
 * @param {<T>(promise: Promise<T>) => Promise<T>} heard
 */
async function* groups(body, signal, heard) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (body).getReader();
  signal.addEventListener("abort", () => reader.cancel().catch(() => {}));
  const decoder = new TextDecoder();
  const parse = parser();
  /** @type {SseEvent[]} */
  let group = [];
  for (;;) {
    const { done, value } = await heard(reader.read());
    signal.throwIfAborted();
    if (done) return;
    for (const event of parse(decoder.decode(value, { stream: true }))) {
      group.push(event);
      if (event.id === undefined && event.type !== "reconnect" && !isLast(event)) continue;
      yield group;
      group = [];
    }
  }
}

/** Parses text as it arrives: WHATWG HTML, section 9.2.6, without lines that end in CR. */
function parser() {
  let rest = "";
  let type = "message";
  /** @type {string | undefined} */
  let data;
  /** @type {string | undefined} */
  let id;
  /** @param {string} text @returns {Generator<SseEvent, void, void>} */
  return function* (text) {
    const lines = (rest + text).split(/\r?\n/);
    rest = lines.pop() ?? "";
    for (const line of lines) {
      const [, field, value] = /** @type {RegExpExecArray} */ (/^([^:]*):? ?(.*)/s.exec(line));
      if (line === "") {
        if (data !== undefined) yield { type, data, id };
        type = "message";
        data = id = undefined;
      } else if (field === "data") data = data === undefined ? value : `${data}\n${value}`;
      else if (field === "event") type = value || "message";
      else if (field === "id") id = value;
    }
  };
}
