import assert from "node:assert/strict";
import test from "node:test";
import { HEAD, collect, control, followRun, followRuns, refused, serve } from "./scripted.mjs";

const state = (id, status, position) => control("run", { id, status }, position);
const ready = (count, position) => control("ready", { count }, position);
const lastId = ({ headers }) => headers["last-event-id"];

test("followRun yields each state, and the terminal one last", async (t) => {
  const first = { body: HEAD + state("run_1", "QUEUED") + ready(1, "e.1") + state("run_1", "EXECUTING", "e.2"), then: "cut" };
  const server = await serve(t, first, { body: state("run_1", "FAILED", "e.3") + control("end", { reason: "failed" }, "e.3") });
  const handle = { id: "run_1", publicAccessToken: "t" };
  const { found, error } = await collect(followRun(handle, { base: server.base, skipColumns: ["payload", "output"] }));
  assert.deepEqual([found.map((run) => run.status), error], [["QUEUED", "EXECUTING", "FAILED"], undefined]);
  assert.equal(server.requests[0].url, "/realtime/v1/runs/run_1?skipColumns=payload%2Coutput");
  assert.equal(server.requests[0].headers.authorization, "Bearer t");
  assert.deepEqual(server.requests.map(lastId), [undefined, "e.2"]);
});

test("followRun ends if the run has ended while it was away", async (t) => {
  const server = await serve(t, { body: state("run_1", "COMPLETED") + ready(1, "e.1"), then: "cut" }, { status: 204 });
  assert.deepEqual((await collect(followRun({ id: "run_1" }, { base: server.base }))).found, [{ id: "run_1", status: "COMPLETED" }]);
});

test("followRun throws if the run has expired", async (t) => {
  const server = await serve(t, { body: state("run_1", "COMPLETED") + ready(1, "e.1") }, refused(404, "run_not_found"));
  assert.equal((await collect(followRun({ id: "run_1" }, { base: server.base }))).error.code, "run_not_found");
});

/** What `followRuns` yields until the server denies access, with the runs as they are then. */
async function follow(server, options) {
  const found = [];
  try {
    for await (const { runs, changed, removed } of followRuns({ base: server.base, ...options })) {
      found.push([[...runs.values()].map((run) => `${run.id} ${run.status}`), changed.map((run) => run.id), removed]);
    }
  } catch (error) {
    found.push(error.code);
  }
  return found;
}

test("followRuns yields the whole snapshot once, and then each change", async (t) => {
  const body = HEAD + state("a", "QUEUED") + state("b", "QUEUED") + ready(2, "e.2") + state("a", "EXECUTING", "e.3") + state("c", "QUEUED", "e.4");
  const server = await serve(t, { body }, refused(403, "forbidden"));
  assert.deepEqual(await follow(server, { tags: ["x", "y:1"], token: "t", createdAt: "1h" }), [
    [["a QUEUED", "b QUEUED"], ["a", "b"], []],
    [["a EXECUTING", "b QUEUED"], ["a"], []],
    [["a EXECUTING", "b QUEUED", "c QUEUED"], ["c"], []],
    "forbidden",
  ]);
  assert.equal(server.requests[0].url, "/realtime/v1/runs?tags=x%2Cy%3A1&createdAt=1h");
  assert.equal(server.requests[0].headers.authorization, "Bearer t");
  assert.equal(lastId(server.requests[1]), "e.4");
});

test("followRuns reports the runs that a new snapshot no longer has", async (t) => {
  const first = { body: state("a", "QUEUED") + state("b", "QUEUED") + ready(2, "e.2"), then: "cut" };
  const partial = { body: state("b", "EXECUTING"), then: "cut" }; // no run is missing yet
  const second = { body: state("b", "EXECUTING") + state("c", "QUEUED") + ready(2, "f.9"), then: "cut" };
  const server = await serve(t, first, partial, second, { body: ready(0, "g.0") }, refused(401, "invalid_token"));
  assert.deepEqual(await follow(server, { tags: "x" }), [
    [["a QUEUED", "b QUEUED"], ["a", "b"], []],
    [["b EXECUTING", "c QUEUED"], ["b", "c"], ["a"]],
    [[], [], ["b", "c"]],
    "invalid_token",
  ]);
  assert.deepEqual(server.requests.map(lastId), [undefined, "e.2", "e.2", "f.9", "g.0"]);
});

test("followRuns follows a batch until its end", async (t) => {
  const server = await serve(t, { body: state("a", "COMPLETED") + ready(1, "e.1") + control("end", { reason: "complete" }, "e.1") });
  const found = await follow(server, { batch: { id: "batch_1", publicAccessToken: "b" } });
  assert.deepEqual(found, [[["a COMPLETED"], ["a"], []]]);
  assert.equal(server.requests[0].url, "/realtime/v1/batches/batch_1");
  assert.equal(server.requests[0].headers.authorization, "Bearer b");
});

test("ids of feeds that look like numbers are not compared", async (t) => {
  const server = await serve(t, { body: ready(0, "12.9") + state("a", "QUEUED", "12.10") }, refused(403, "forbidden"));
  assert.deepEqual((await follow(server, { tags: "x" })).at(-2), [["a QUEUED"], ["a"], []]);
});
