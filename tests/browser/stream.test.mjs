import assert from "node:assert/strict";
import test from "node:test";
import {
  HEAD, RealtimeError, STALL_MS, after, chunk, collect, complete, control, holdingWaits, page, passSilence, readStream, refused, serve,
  until, waits,
} from "./scripted.mjs";

const HANDLE = { id: "run_1", publicAccessToken: "t1" };
const FRAMES = [chunk(0, "Hel"), chunk(1, { text: "lö 🦙" }), chunk(2, "\ud83d"), complete(3)];
const CHUNKS = ["Hel", { text: "lö 🦙" }, "\ud83d"];
const auth = ({ headers }) => headers.authorization;
const lastId = ({ headers }) => headers["last-event-id"];

/** Reads from a body that arrives in these pieces, without a server. */
async function readPieces(...pieces) {
  const { fetch } = globalThis;
  const stop = new AbortController();
  globalThis.fetch = async () => {
    const body = ReadableStream.from(pieces.map((piece) => Buffer.from(piece)));
    globalThis.fetch = async () => stop.abort(new Error("it reads again"));
    return new Response(body, { headers: { "content-type": "text/event-stream; charset=utf-8" } });
  };
  try {
    return await collect(readStream(HANDLE, { base: "http://server.example/realtime", signal: stop.signal }));
  } finally {
    globalThis.fetch = fetch;
  }
}

// ---- Reading

test("reads the chunks of a handle until the run has completed", async (t) => {
  const server = await serve(t, { body: HEAD + FRAMES.join("") });
  const stream = readStream(HANDLE, { base: server.base, stream: "a b" });
  const ids = [];
  const found = [];
  for await (const value of stream) {
    found.push(value);
    ids.push(stream.lastId);
  }
  assert.deepEqual(found, CHUNKS);
  assert.deepEqual(ids, ["0", "1", "2"]);
  assert.deepEqual(stream.end, { reason: "complete" });
  const [{ url, headers }] = server.requests;
  assert.equal(url, "/realtime/v1/streams/run_1/a%20b");
  assert.equal(headers.authorization, "Bearer t1");
  assert.equal(headers.accept, "text/event-stream");
  assert.equal(server.requests.length, 1);
});

test("moves the token of a URL to a header, so that no log has it", async (t) => {
  const server = await serve(t, { body: complete(0) });
  await collect(readStream(`${server.url}/live/v1/streams/run_1/default?a=b&access_token=t2`));
  assert.equal(server.requests[0].url, "/live/v1/streams/run_1/default?a=b");
  assert.equal(auth(server.requests[0]), "Bearer t2");
});

test("sends no token if there is none", async (t) => {
  const server = await serve(t, { body: complete(0) });
  await collect(readStream({ id: "run_1" }, { base: `${server.base}/` }));
  assert.equal(auth(server.requests[0]), undefined);
  assert.equal(server.requests[0].url, "/realtime/v1/streams/run_1/default");
});

test("resolves a relative URL and base against the page", async (t) => {
  const urls = [];
  t.mock.method(globalThis, "fetch", async (url) => (urls.push(String(url)), new Response(null, { status: 204 })));
  await page.open(async () => {
    await collect(readStream("stream"));
    await collect(readStream(HANDLE, { base: "/live" }));
    await collect(readStream(HANDLE));
  });
  assert.deepEqual(urls, [
    "http://page.example/chat/stream",
    "http://page.example/live/v1/streams/run_1/default",
    "http://page.example/realtime/v1/streams/run_1/default", // a bundle can have a file: URL
  ]);
});

for (const source of [undefined, null, {}, 1]) {
  test(`names a source that is neither a handle nor a URL: ${JSON.stringify(source)}`, () => {
    assert.throws(() => readStream(source), /^TypeError: the source is .*; it must be a handle or a URL$/);
  });
}

test("parses events split at every byte, with each kind of line break", async () => {
  for (const lineBreak of ["\n", "\r\n"]) {
    const bytes = Buffer.from((HEAD + FRAMES.join("")).replaceAll("\n", lineBreak));
    for (let at = 0; at <= bytes.length; at++) {
      const { found, error } = await readPieces(bytes.subarray(0, at), bytes.subarray(at));
      assert.deepEqual([found, error], [CHUNKS, undefined], `split at ${at}`);
    }
    const { found } = await readPieces(...[...bytes].map((byte) => [byte]));
    assert.deepEqual(found, CHUNKS);
  }
});

test("parses what the standard allows", async () => {
  const body = '\ufeff:comment\ndata\n\nid:0\ndata:"a"\nunknown: 1\n\nid: 1\ndata: {\ndata: "b": 1}\n\nevent: end\ndata: {"reason":"complete"}\n\n';
  const { found, error } = await readPieces(body.replace("data\n\n", ""));
  assert.deepEqual([found, error], [["a", { b: 1 }], undefined]);
});

test("replaces bytes that are not UTF-8", async () => {
  const bytes = Buffer.concat([Buffer.from('id: 0\ndata: "a'), Buffer.from([0xff, 0xe2, 0x82]), Buffer.from(`b"\n\n${complete(1)}`)]);
  for (let at = 0; at <= bytes.length; at++) {
    const { found } = await readPieces(bytes.subarray(0, at), bytes.subarray(at));
    assert.deepEqual(found, ["a\ufffd\ufffdb"], `split at ${at}`);
  }
});

// ---- Resuming

test("resumes a connection that is cut at any byte", async (t) => {
  const bytes = Buffer.from(HEAD + FRAMES.join(""));
  const server = await serve(t, (request) => ({ body: HEAD + after(FRAMES, request) }));
  for (let at = 0; at < bytes.length; at++) {
    server.steps.unshift({ body: bytes.subarray(0, at), then: at % 2 ? "cut" : "end" });
    const { found, error } = await collect(readStream(HANDLE, { base: server.base }));
    assert.deepEqual([found, error], [CHUNKS, undefined], `cut at ${at}`);
    assert.equal(server.requests.length, 2 * at + 2);
  }
});

test("resumes after the id that it is given, also 0, and an empty one is none", async (t) => {
  const server = await serve(t, (request) => ({ body: after(FRAMES, request) }));
  const read = (from) => collect(readStream(HANDLE, { base: server.base, from }));
  assert.deepEqual((await read("0")).found, CHUNKS.slice(1));
  assert.deepEqual((await read(0)).found, CHUNKS.slice(1));
  assert.deepEqual((await read(1)).found, CHUNKS.slice(2));
  for (const none of ["", null, undefined]) assert.deepEqual((await read(none)).found, CHUNKS);
});

test("drops chunks that are sent twice", async (t) => {
  const server = await serve(t, { body: chunk(8, "a") + chunk(9, "b") + chunk(9, "b"), then: "cut" }, { body: chunk(9, "b") + chunk(10, "c") + complete(11) });
  assert.deepEqual((await collect(readStream(HANDLE, { base: server.base }))).found, ["a", "b", "c"]);
});

test("a 204 is the end", async (t) => {
  const server = await serve(t, { status: 204 });
  const stream = readStream(HANDLE, { base: server.base, from: 7 });
  assert.deepEqual(await collect(stream), { found: [] });
  assert.equal(stream.end, undefined);
  assert.equal(lastId(server.requests[0]), "7");
});

test("waits as long as the server asks, and longer after each failure", async (t) => {
  const failure = refused(503, "broker_unavailable");
  const bug = refused(500, "internal");
  const steps = [failure, bug, failure, failure, failure, failure, failure, refused(429, "limit_exceeded", { "retry-after": "7" })];
  const reconnect = { body: control("reconnect", { retry: 1234 }) };
  const server = await serve(t, ...steps, reconnect, { body: chunk(0, "a"), then: "cut" }, { body: complete(1) });
  const states = [];
  await collect(readStream(HANDLE, { base: server.base, onState: (state, error) => states.push(error?.code ?? state) }));

  const [bounds, rest] = [[500, 1000, 2000, 4000, 8000, 15_000, 15_000], waits.slice(7)];
  for (const [place, longest] of bounds.entries()) {
    assert.ok(waits[place] >= longest / 2 && waits[place] <= longest, `wait ${place} is ${waits[place]}`);
  }
  assert.ok(rest[0] >= 7000 + 7500 && rest[0] <= 7000 + 15_000, `not all pages at the same moment: ${rest[0]}`);
  assert.equal(rest[1], 1234);
  assert.ok(rest[2] <= 500, "an event resets the delays");
  assert.deepEqual(states.slice(6), ["broker_unavailable", "limit_exceeded", "live", "reconnect", "live", "network", "live"]);
});

test("a connection that lasted for a while resets the delays, also without an event", async (t) => {
  const failure = refused(503, "broker_unavailable");
  const lasting = () => {
    page.sleep(11_000);
    return { body: HEAD, then: "cut" };
  };
  const server = await serve(t, failure, failure, failure, lasting, { body: complete(0) });
  await collect(readStream(HANDLE, { base: server.base }));
  assert.ok(waits[2] >= 1000 && waits[3] <= 500, `waits: ${waits}`);
});

test("retries a server that does not accept connections", async (t) => {
  const server = await serve(t, { body: complete(0) });
  const closed = "http://127.0.0.1:1/";
  let tries = 0;
  const real = fetch;
  t.mock.method(globalThis, "fetch", (url, init) => real(++tries < 3 ? closed : url, init));
  assert.deepEqual(await collect(readStream(HANDLE, { base: server.base })), { found: [] });
});

test("reconnects after silence, before and after the first byte", async (t) => {
  const server = await serve(t, { body: chunk(0, "a"), then: "hold" }, { body: "", then: "hold" }, { body: chunk(1, "b") + complete(2) });
  const found = [];
  const reading = collect(readStream(HANDLE, { base: server.base }), found);
  await until(() => found.length === 1);
  passSilence();
  await until(() => server.requests.length === 2);
  await until(() => server.requests[0].isOpen === false);
  passSilence();
  assert.deepEqual((await reading).found, ["a", "b"]);
  assert.deepEqual(server.requests.map(lastId), [undefined, "0", "0"]);
  assert.deepEqual(waits, [], "immediately");
});

test("stallAfter is the allowed silence", async (t) => {
  const server = await serve(t, { body: complete(0) });
  await holdingWaits(() => collect(readStream(HANDLE, { base: server.base, stallAfter: 123 })));
  assert.deepEqual(new Set(waits), new Set([123]));
});

// ---- Why it stops

for (const reason of ["failed", "canceled", "crashed", "expired", "timed_out", "lost", "a later reason"]) {
  test(`throws if the run ended as ${reason}`, async (t) => {
    const server = await serve(t, { body: chunk(0, "a") + control("end", { reason, error: "no luck" }, 1) });
    const stream = readStream(HANDLE, { base: server.base });
    const { found, error } = await collect(stream);
    assert.deepEqual(found, ["a"]);
    assert.ok(error instanceof RealtimeError);
    assert.deepEqual([error.code, error.message], [reason, "no luck"]);
    assert.deepEqual([stream.end, stream.lastId], [{ reason, error: "no luck" }, "0"]);
    assert.equal(server.requests.length, 1);
  });
}

test("the message of an end without an error names its reason", async (t) => {
  const server = await serve(t, { body: control("end", { reason: "canceled" }, 0) });
  const { error } = await collect(readStream(HANDLE, { base: server.base }));
  assert.equal(error.message, "the run ended: canceled");
});

for (const [status, code] of [[400, "invalid_request"], [401, "invalid_token"], [403, "forbidden"], [404, "run_not_found"]]) {
  test(`throws what a ${status} says`, async (t) => {
    const server = await serve(t, refused(status, code));
    const { error } = await collect(readStream(HANDLE, { base: server.base }));
    assert.deepEqual([error.code, error.status, error.message], [code, status, `refused: ${code}`]);
    assert.equal(server.requests.length, 1);
  });
}

test("throws if the URL serves something else", async (t) => {
  const server = await serve(t, { headers: { "content-type": "text/html" }, body: "<html>" });
  const { error } = await collect(readStream(HANDLE, { base: server.base }));
  assert.equal(error.code, "http_200");
  assert.match(error.message, /\/realtime\/v1\/streams\/run_1\/default returned 200 and no event stream; is "base" right\?$/);
});

test("a gap is passed to onGap, and reading continues after it", async (t) => {
  const gap = { requested: 0, first: 15 };
  const server = await serve(t, { body: control("gap", gap, 14), then: "cut" }, (request) => ({ body: after([control("gap", gap, 14), chunk(15, "a"), complete(16)], request) }));
  const gaps = [];
  const { found, error } = await collect(readStream(HANDLE, { base: server.base, onGap: (one) => gaps.push(one) }));
  assert.deepEqual([found, gaps, error], [["a"], [gap], undefined]);
});

test("a gap is an error without onGap", async (t) => {
  const server = await serve(t, { body: control("gap", { requested: 0, first: 15 }, 14) + chunk(15, "a") });
  const { found, error } = await collect(readStream(HANDLE, { base: server.base }));
  assert.deepEqual([found, error.code], [[], "gap"]);
  assert.equal(error.message, "the chunks before 15 have expired; pass onGap to skip them");
});

test("an error of a callback is thrown, not retried", async (t) => {
  const server = await serve(t, { body: complete(0) });
  const onState = () => assert.fail("mine");
  assert.equal((await collect(readStream(HANDLE, { base: server.base, onState }))).error.message, "mine");
});

// ---- Tokens

const expiry = control("end", { reason: "token_expired" });

test("gets a new token when it expires in mid-stream", async (t) => {
  const server = await serve(t, { body: chunk(0, "a") + expiry }, { body: chunk(1, "b") + expiry }, { body: chunk(2, "c") + complete(3) });
  const denials = [];
  const refreshToken = async (denied) => `new ${denials.push(denied.code)}`;
  const { found } = await collect(readStream(HANDLE, { base: server.base, refreshToken }));
  assert.deepEqual([found, denials], [["a", "b", "c"], ["token_expired", "token_expired"]]);
  assert.deepEqual(server.requests.map(auth), ["Bearer t1", "Bearer new 1", "Bearer new 2"]);
  assert.deepEqual(server.requests.map(lastId), [undefined, "0", "1"]);
  assert.deepEqual(waits, []);
});

test("an expired token is an error without refreshToken", async (t) => {
  const server = await serve(t, { body: expiry });
  assert.equal((await collect(readStream(HANDLE, { base: server.base }))).error.code, "token_expired");
});

for (const [status, code] of [[401, "token_expired"], [401, "invalid_token"], [403, "forbidden"]]) {
  test(`asks for a new token once after ${status} ${code}`, async (t) => {
    const server = await serve(t, refused(status, code), { body: chunk(0, "a"), then: "cut" }, refused(status, code), refused(status, code));
    let calls = 0;
    const { found, error } = await collect(readStream(HANDLE, { base: server.base, refreshToken: () => `new ${++calls}` }));
    assert.deepEqual([found, error.code, error.status], [["a"], code, status]);
    assert.deepEqual(server.requests.map(auth), ["Bearer t1", "Bearer new 1", "Bearer new 1", "Bearer new 2"]);
  });
}

test("gets the first token too, from any form of answer", async (t) => {
  const server = await serve(t, { body: complete(0) });
  const answers = ["a", { token: "b" }, { publicAccessToken: "c" }, Response.json({ token: "d" }), Response.json("e"), Response.json(HANDLE)];
  for (const answer of answers) {
    const refreshToken = async (denied) => (assert.equal(denied, undefined), answer);
    assert.deepEqual(await collect(readStream({ id: "run_1" }, { base: server.base, refreshToken })), { found: [] });
  }
  assert.deepEqual(server.requests.map(auth), ["a", "b", "c", "d", "e", "t1"].map((token) => `Bearer ${token}`));
});

test("a route for tokens can be unavailable for a while", async (t) => {
  const server = await serve(t, { body: complete(0) });
  const answers = [new Response("", { status: 503 }), new TypeError("fetch failed"), new Response("", { status: 429, headers: { "retry-after": "3" } }), "new"];
  const refreshToken = async () => {
    const answer = answers.shift();
    if (answer instanceof Error) throw answer;
    return answer;
  };
  assert.deepEqual(await collect(readStream({ id: "run_1" }, { base: server.base, refreshToken })), { found: [] });
  assert.deepEqual([server.requests.length, waits.length], [1, 3]);
  assert.ok(waits[2] >= 3000 + 1000 && waits[2] <= 3000 + 2000, `waits: ${waits}`);
});

test("a route for tokens can deny them", async (t) => {
  const server = await serve(t, { body: complete(0) });
  let calls = 0;
  const refreshToken = async () => (calls++, Response.json({ error: "sign in" }, { status: 401 }));
  const { error } = await collect(readStream({ id: "run_1" }, { base: server.base, refreshToken }));
  assert.deepEqual([error.code, error.message, calls, server.requests.length], ["http_401", "sign in", 1, 0]);
});

test("errors of refreshToken are thrown", async (t) => {
  const server = await serve(t, { body: complete(0) });
  for (const [refreshToken, message] of [
    [() => { throw new Error("signed out"); }, "signed out"],
    [() => undefined, "refreshToken returned no token"],
    [() => ({}), "refreshToken returned no token"],
  ]) {
    assert.equal((await collect(readStream({ id: "run_1" }, { base: server.base, refreshToken }))).error.message, message);
  }
  assert.equal(server.requests.length, 0);
});

// ---- Stopping

test("leaving the loop closes the connection", async (t) => {
  const server = await serve(t, { body: chunk(0, "a"), then: "hold" });
  for await (const value of readStream(HANDLE, { base: server.base })) {
    assert.equal(value, "a");
    break;
  }
  await until(() => !server.requests[0].isOpen);
});

test("a signal stops a reader wherever it waits", async (t) => {
  const never = () => new Promise(() => {});
  const cases = {
    body: [{ body: HEAD, then: "hold" }],
    headers: [() => ({ status: 103 })],
    backoff: [refused(503, "server_shutdown")],
    token: [{ body: "" }, { refreshToken: never }],
  };
  for (const [name, [step, options]] of Object.entries(cases)) {
    const server = await serve(t, name === "headers" ? { body: "", then: "hold" } : step);
    const stop = new AbortController();
    const source = name === "token" ? { id: "run_1" } : HANDLE;
    await holdingWaits(async () => {
      waits.length = 0;
      const reading = collect(readStream(source, { base: server.base, signal: stop.signal, ...options }));
      if (name !== "token") await until(() => server.requests.length === 1);
      if (name === "backoff") await until(() => waits.length === 1);
      stop.abort(new Error("stopped by me"));
      assert.equal((await reading).error.message, "stopped by me", name);
    });
    await until(() => server.requests.every((request) => !request.isOpen));
  }
});

test("a signal that has fired stops it before any request", async (t) => {
  const server = await serve(t, { body: complete(0) });
  const { error } = await collect(readStream(HANDLE, { base: server.base, signal: AbortSignal.abort() }));
  assert.deepEqual([error.name, server.requests.length], ["AbortError", 0]);
});

// ---- The page

test("a page in the back/forward cache has no connection, and resumes when it is shown", async (t) => {
  const server = await serve(t, { body: chunk(0, "a"), then: "hold" }, { body: chunk(1, "b") + complete(2) });
  await page.open(async (send) => {
    const found = [];
    const reading = collect(readStream(HANDLE, { base: server.base }), found);
    await until(() => found.length === 1);
    send("pagehide");
    await until(() => !server.requests[0].isOpen);
    send("online"); // not while it is away
    send("visibilitychange");
    await new Promise(setImmediate);
    assert.equal(server.requests.length, 1);
    send("pageshow");
    assert.deepEqual((await reading).found, ["a", "b"]);
  });
});

test("reconnects at once when the network is back", async (t) => {
  const server = await serve(t, { body: chunk(0, "a"), then: "hold" }, refused(503, "server_shutdown"), { body: chunk(1, "b") + complete(2) });
  await page.open((send) =>
    holdingWaits(async () => {
      const found = [];
      const reading = collect(readStream(HANDLE, { base: server.base }), found);
      await until(() => found.length === 1);
      send("online"); // the old connection may be dead
      await until(() => waits.length === 1);
      send("online"); // ends the wait
      assert.deepEqual((await reading).found, ["a", "b"]);
    }),
  );
});

test("a hidden tab stays connected, unless pauseHidden is set", async (t) => {
  for (const pauseHidden of [false, true]) {
    const server = await serve(t, { body: chunk(0, "a"), then: "hold" }, { body: chunk(1, "b") + complete(2) });
    await page.open(async (send) => {
      const found = [];
      const stop = new AbortController();
      const reading = collect(readStream(HANDLE, { base: server.base, pauseHidden, signal: stop.signal }), found);
      await until(() => found.length === 1);
      send("visibilitychange", true);
      if (pauseHidden) await until(() => !server.requests[0].isOpen);
      send("visibilitychange", false);
      if (pauseHidden) return assert.deepEqual((await reading).found, ["a", "b"]);
      await new Promise(setImmediate);
      assert.deepEqual([server.requests.length, server.requests[0].isOpen], [1, true]);
      stop.abort();
      await reading;
    });
  }
});

test("a computer that has slept reconnects at once", async (t) => {
  const server = await serve(t, { body: chunk(0, "a"), then: "hold" }, { body: complete(1) });
  await page.open(async (send) => {
    const found = [];
    const reading = collect(readStream(HANDLE, { base: server.base }), found);
    await until(() => found.length === 1);
    page.sleep(STALL_MS + 1);
    send("visibilitychange", false);
    assert.equal((await reading).error, undefined);
    assert.equal(lastId(server.requests[1]), "0");
  });
});

test("a live connection stays when the tab is shown after a long time", async (t) => {
  const server = await serve(t, { body: chunk(0, "a"), then: "hold" }, { body: complete(2) });
  await page.open(async (send) => {
    const found = [];
    const reading = collect(readStream(HANDLE, { base: server.base }), found);
    await until(() => found.length === 1);
    page.sleep(STALL_MS + 1);
    server.requests[0].write(chunk(1, "b"));
    await until(() => found.length === 2);
    send("visibilitychange", false);
    server.requests[0].write(complete(2));
    assert.equal((await reading).error, undefined);
  });
  assert.equal(server.requests.length, 1);
});

test("a page that has just loaded keeps its first connection", async (t) => {
  const server = await serve(t, { body: HEAD, then: "hold" });
  const spy = t.mock.method(globalThis, "fetch");
  await page.open(async (send) => {
    const stop = new AbortController();
    const reading = collect(readStream(HANDLE, { base: server.base, signal: stop.signal }));
    send("pageshow");
    await until(() => server.requests.length === 1);
    send("pageshow");
    await new Promise(setImmediate);
    stop.abort();
    await reading;
  });
  assert.equal(spy.mock.callCount(), 1);
});
