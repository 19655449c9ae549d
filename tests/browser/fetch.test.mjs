import assert from "node:assert/strict";
import test from "node:test";
import { after, passSilence, refused, resumingFetch, serve, until, waits } from "./scripted.mjs";

const part = (value, id) => `${id === undefined ? "" : `id: ${id}\n`}data: ${JSON.stringify(value)}\n\n`;
const DONE = "data: [DONE]\n\n";
const TEXT = { type: "text-delta", id: "t" };
/** Events without an id belong to the next one with an id. */
const FRAMES = [
  part({ type: "start", messageId: "m" }) + part({ type: "text-start", id: "t" }) + part({ ...TEXT, delta: "Hel" }, 0),
  part({ ...TEXT, delta: "lö" }, 1),
  part({ ...TEXT, delta: " 🦙" }) + part({ type: "text-end", id: "t" }, 2),
  part({ type: "finish" }, 3) + DONE,
];
const WHOLE = FRAMES.join("");
const NAMED = { "x-realtime-resume": "v1/streams/run_1/default?protocol=ai-sdk&access_token=t1" };

function post(server, { init, ...options } = {}) {
  const send = resumingFetch({ base: server.base, ...options });
  const headers = { "Content-Type": "application/json", "x-user": "1" };
  return send(`${server.url}/api/chat?a=b`, { method: "POST", headers, body: JSON.stringify({ id: "chat/1", messages: [] }), ...init });
}

/** The rest of the answer, as a server responds to a resume. */
function rest(request) {
  const body = after(FRAMES, request);
  return body ? { body } : { status: 204 };
}

const paths = (server) => server.requests.map(({ method, url }) => `${method} ${url}`);

test("an answer that is not interrupted is the same, without comments", async (t) => {
  const server = await serve(t, { headers: { ...NAMED, "x-vercel-ai-ui-message-stream": "v1" }, body: `retry: 1\n: hello\n${WHOLE}` });
  const response = await post(server);
  assert.equal(response.headers.get("x-vercel-ai-ui-message-stream"), "v1");
  assert.equal(response.headers.get("content-type"), "text/event-stream");
  assert.equal(await response.text(), WHOLE);
  assert.equal(server.requests.length, 1);
});

test("an answer that is cut twice, at any byte, is the same", async () => {
  const bytes = Buffer.from(WHOLE);
  for (let at = 0; at < bytes.length; at++) {
    const lengths = [at, at % 90, Infinity];
    const fetch = async (url, { headers }) => {
      const left = Buffer.from(after(FRAMES, { headers: Object.fromEntries(new Headers(headers)) }));
      if (left.length === 0) return new Response(null, { status: 204 });
      return new Response(broken(left.subarray(0, lengths.shift())), { headers: { ...NAMED, "content-type": "text/event-stream" } });
    };
    const response = await post({ url: "http://a.example", base: "http://a.example/realtime" }, { fetch });
    assert.equal(await response.text(), WHOLE, `cut at ${at}`);
  }
});

/** A body whose connection breaks at its end. */
function broken(bytes) {
  const pieces = [bytes];
  return new ReadableStream({
    pull(controller) {
      const piece = pieces.shift();
      if (piece?.length) controller.enqueue(piece);
      else controller.error(new TypeError("terminated"));
    },
  });
}

test("resumes where the header of the response says, with the token in it", async (t) => {
  const server = await serve(t, { headers: NAMED, body: FRAMES[0] + FRAMES[1], then: "cut" }, rest);
  assert.equal(await (await post(server)).text(), WHOLE);
  assert.deepEqual(paths(server), ["POST /api/chat?a=b", "GET /realtime/v1/streams/run_1/default?protocol=ai-sdk"]);
  const { headers } = server.requests[1];
  assert.deepEqual([headers["last-event-id"], headers.authorization, headers["x-user"]], ["1", "Bearer t1", undefined]);
});

test("resumes where the option says, with the headers of the request", async (t) => {
  const server = await serve(t, { headers: { ...NAMED, "x-run": "run_2" }, body: FRAMES[0], then: "cut" }, { body: FRAMES.slice(1).join("") });
  const resume = (response, url) => `${url}&run=${response.headers.get("x-run")}`;
  assert.equal(await (await post(server, { resume })).text(), WHOLE);
  assert.deepEqual(paths(server), ["POST /api/chat?a=b", "GET /api/chat?a=b&run=run_2"]);
  const { headers } = server.requests[1];
  assert.deepEqual([headers["last-event-id"], headers["x-user"], headers["content-type"]], ["0", "1", undefined]);
});

test("a Request resumes too", async (t) => {
  const server = await serve(t, { headers: NAMED, body: FRAMES[0], then: "cut" }, rest);
  const response = await resumingFetch({ resume: (_, url) => url })(new Request(`${server.url}/api/chat/1/stream`));
  assert.equal(await response.text(), WHOLE);
  assert.deepEqual(paths(server), ["GET /api/chat/1/stream", "GET /api/chat/1/stream"]);
});

test("returns every other response as it is", async (t) => {
  const server = await serve(t, { status: 204, headers: {} }, refused(409, "thread_busy"), { body: "plain", headers: { "content-type": "text/plain" } });
  assert.equal((await post(server)).status, 204);
  const busy = await post(server);
  assert.deepEqual([busy.status, (await busy.json()).code], [409, "thread_busy"]);
  assert.equal(await (await post(server)).text(), "plain");
});

test("passes on an event stream that names no rest, as it arrives and with its end", async (t) => {
  for (const resume of [undefined, () => undefined]) {
    const server = await serve(t, { body: "data: 1\n\n", then: "hold" });
    const reader = (await post(server, { resume })).body.pipeThrough(new TextDecoderStream()).getReader();
    assert.equal((await reader.read()).value, "data: 1\n\n");
    passSilence();
    server.requests[0].write(": comment\n\n");
    assert.equal((await reader.read()).value, ": comment\n\n");
    server.requests[0].end();
    assert.equal((await reader.read()).done, true);
    assert.equal(server.requests.length, 1);
  }
});

test("a request that fails is not sent again", async (t) => {
  const server = await serve(t, { body: "" });
  let calls = 0;
  const fetch = async () => {
    calls++;
    throw new TypeError("fetch failed");
  };
  await assert.rejects(post(server, { fetch }), /^TypeError: fetch failed$/);
  assert.equal(calls, 1);
});

test("uses the given fetch for all requests", async (t) => {
  const server = await serve(t, { headers: NAMED, body: FRAMES[0], then: "cut" }, rest);
  let calls = 0;
  const response = await post(server, { fetch: (...args) => (calls++, fetch(...args)) });
  assert.equal(await response.text(), WHOLE);
  assert.equal(calls, 2);
});

test("a 204 means over: only the end mark was cut", async (t) => {
  for (const type of ["finish", "abort", "error"]) {
    const server = await serve(t, { headers: NAMED, body: FRAMES[0] + part({ type }, 1), then: "cut" }, { status: 204 });
    assert.equal(await (await post(server)).text(), FRAMES[0] + part({ type }, 1) + DONE);
  }
});

test("a 204 in the middle is an error, because the answer must not look finished", async (t) => {
  const server = await serve(t, { headers: NAMED, body: FRAMES[0], then: "cut" }, { status: 204 });
  await assert.rejects((await post(server)).text(), { code: "cut", message: "the rest of the answer is not available; load the chat again" });
});

test("a denial ends the body with its error", async (t) => {
  const server = await serve(t, { headers: NAMED, body: FRAMES[0], then: "cut" }, refused(404, "run_not_found"));
  await assert.rejects((await post(server)).text(), { code: "run_not_found", status: 404 });
});

test("gets a new token when that of the header has expired", async (t) => {
  const server = await serve(t, { headers: NAMED, body: FRAMES[0], then: "cut" }, refused(401, "token_expired"), rest);
  const response = await post(server, { refreshToken: async () => "new" });
  assert.equal(await response.text(), WHOLE);
  assert.deepEqual(server.requests.slice(1).map(({ headers }) => headers.authorization), ["Bearer t1", "Bearer new"]);
});

test("asks for no token before it needs one", async (t) => {
  const server = await serve(t, { headers: NAMED, body: WHOLE });
  assert.equal(await (await post(server, { refreshToken: () => assert.fail("not needed") })).text(), WHOLE);
});

test("resumes after silence, also of the first response", async (t) => {
  const server = await serve(t, { headers: NAMED, body: FRAMES[0], then: "hold" }, rest);
  const reading = (await post(server)).text();
  await until(() => server.requests.length === 1);
  passSilence();
  assert.equal(await reading, WHOLE);
  assert.deepEqual(waits, [], "immediately");
  await until(() => !server.requests[0].isOpen);
});

test("an abort of the caller aborts everything", async (t) => {
  for (const steps of [[{ headers: NAMED, body: FRAMES[0], then: "hold" }], [{ headers: NAMED, body: FRAMES[0], then: "cut" }, { body: FRAMES[1], then: "hold" }]]) {
    const server = await serve(t, ...steps);
    const stop = new AbortController();
    const response = await post(server, { init: { signal: stop.signal } });
    const reading = response.text();
    await until(() => server.requests.length === steps.length);
    stop.abort();
    await assert.rejects(reading, { name: "AbortError" });
    await until(() => server.requests.every((request) => !request.isOpen));
    assert.equal(server.requests.length, steps.length);
  }
});

test("a Request can be aborted too", async (t) => {
  const server = await serve(t, { headers: NAMED, body: FRAMES[0], then: "hold" });
  const stop = new AbortController();
  const request = new Request(`${server.url}/api/chat`, { method: "POST", body: "{}", signal: stop.signal });
  const reading = (await resumingFetch({ base: server.base })(request)).text();
  stop.abort();
  await assert.rejects(reading, { name: "AbortError" });
  assert.equal(server.requests.length, 1);
});

test("canceling the body closes the connection", async (t) => {
  const server = await serve(t, { headers: NAMED, body: FRAMES[0], then: "hold" });
  const { body } = await post(server);
  const reader = body.getReader();
  await reader.read();
  await reader.cancel();
  await until(() => !server.requests[0].isOpen);
});
