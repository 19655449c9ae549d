// The page of the inspector. It polls the list, and follows the chosen run and its streams with the browser module.
// Whatever comes from the server is inserted as text. Docs: docs/inspector.md.

const mount = new URL(import.meta.url.replace(/(inspect\/)?inspector\.js.*$/, ""));
const { followRun, readStream } = await import(new URL("client.js", mount));

const STATUSES = ["DELAYED", "QUEUED", "EXECUTING", "COMPLETED", "FAILED", "CANCELED", "CRASHED", "EXPIRED", "TIMED_OUT"];
const POLL_MS = 1000;
const SHOWN_CHARS = 200_000; // of one stream

const $ = (selector) => document.querySelector(selector);
const filters = $("#filters");
let secretKey = ""; // in memory only
let token;
let chosen; // { id, stop, refresh } of the run that is shown
const saved = new URLSearchParams(location.hash.slice(1));
let wanted = saved.get("run"); // the run to show once there is access

/** An element with properties and children. Children are elements or texts, and never HTML. */
function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== undefined));
  return element;
}

// Access

class Denied extends Error {}

/** A token for a few minutes. Throws `Denied` if the server wants the secret key, or another one. */
async function createToken() {
  const headers = secretKey ? { authorization: `Bearer ${secretKey}` } : {};
  const response = await fetch(new URL("inspect/token", mount), { method: "POST", headers });
  const body = await response.json();
  if (response.status === 401 || response.status === 403) throw new Denied(body.error);
  if (!response.ok) throw new Error(body.error);
  token = body.token;
  return token;
}

/** JSON of the server. A token that has expired is replaced once. */
async function ask(path, init = {}) {
  for (const isLast of [false, true]) {
    const headers = { authorization: `Bearer ${token ?? (await createToken())}` };
    const response = await fetch(new URL(path, mount), { ...init, headers });
    if (response.status === 401 && !isLast) token = undefined;
    else if (response.ok) return response.json();
    else throw Object.assign(new Error((await response.json()).error), { status: response.status });
  }
}

const access = () => ({ base: mount, token, refreshToken: createToken });

// The list

async function poll() {
  const query = new URLSearchParams([...new FormData(filters)].filter(([, value]) => value));
  const state = await ask(`inspect/runs?${query}`);
  $("#login").hidden = true;
  $("main").hidden = false;
  fillRows(state.runs);
  chosen?.refresh?.();
  fillTasks(state.tasks);
  $("#sample").textContent = describeList(state);
  $("#broker").textContent = `${state.broker.name}: ${[state.broker.status, ...state.broker.warnings].join("; ")}`;
  $("#broker").classList.toggle("warning", state.broker.status !== "ok" || state.broker.warnings.length > 0);
  $("#process").textContent = describeProcess(state);
  connected("live", "live");
  if (wanted) choose(wanted);
  wanted = undefined;
}

/** Updates the rows in place, so that a click, the focus and a selection survive. */
function fillRows(runs) {
  const body = $("#rows");
  const known = new Map([...body.children].map((row) => [row.dataset.run, row]));
  runs.forEach((run, index) => {
    const row = known.get(run.id) ?? newRow(run);
    known.delete(run.id);
    fillRow(row, run);
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
  });
  for (const row of known.values()) row.remove();
}

function newRow({ id }) {
  const open = h("td", {}, h("button", { type: "button", title: id }, id));
  const [status, task, tags, created, took] = Array.from({ length: 5 }, () => h("td"));
  created.className = took.className = "number";
  const row = h("tr", { onclick: () => choose(id) }, status, task, open, tags, created, took);
  row.dataset.run = id;
  row.classList.toggle("chosen", id === chosen?.id);
  return row;
}

function fillRow(row, run) {
  const [status, task, , tags, created, took] = row.cells;
  created.textContent = ago(run.createdAtMs);
  took.textContent = run.startedAtMs ? span((run.finishedAtMs ?? Date.now()) - run.startedAtMs) : "";
  if (row.dataset.version === String(run.version)) return;
  row.dataset.version = run.version;
  status.replaceChildren(statusOf(run.status));
  task.textContent = task.title = run.task;
  tags.replaceChildren(...(run.tags ?? []).map(tagOf));
  tags.title = (run.tags ?? []).join(", ");
  created.title = new Date(run.createdAtMs).toISOString();
}

const statusOf = (status) => h("span", { className: `status ${status}` }, status);
const tagOf = (tag) => h("span", { className: "tag" }, tag);

function describeList({ runs, found, listed, isSample, perSecond }) {
  const newest = runs.length < found ? `the newest ${runs.length} of ` : "";
  const shown = `${newest}${found} ${found === 1 ? "run" : "runs"}`;
  if (!isSample) return shown;
  const rate = `about ${Math.ceil(perSecond)} a second`;
  const which = filters.elements.tag.value ? "with this tag that changed last" : "that changed last, or failed last";
  return `${shown}. This is a sample: the ${listed} runs ${which}, at ${rate}. A filter by tag finds more.`;
}

function describeProcess({ process, broker }) {
  const open = Object.entries(process.subscriptions).map(([kind, count]) => `${count} ${kind}${count === 1 ? "" : "s"}`);
  const scope = broker.isShared ? "" : ", runs of this process only";
  return `process ${process.id}${process.isClosing ? " (shutting down)" : ""}: ${open.join(", ") || "nothing"} open${scope}`;
}

function fillTasks(tasks) {
  const select = filters.elements.task;
  const names = [...new Set([select.value, ...tasks])].filter(Boolean).sort();
  if (names.join("\n") === [...select.options].slice(1).map(({ value }) => value).join("\n")) return;
  const value = select.value;
  select.replaceChildren(h("option", { value: "" }, "all"), ...names.map((name) => h("option", { value: name }, name)));
  select.value = value;
}

// One run

function choose(id) {
  chosen?.stop.abort();
  chosen = id ? { id, stop: new AbortController() } : undefined;
  for (const row of $("#rows").children) row.classList.toggle("chosen", row.dataset.run === id);
  $("main").classList.toggle("open", Boolean(id));
  $("#run").hidden = !id;
  $("#run").replaceChildren();
  remember();
  if (id) show(id, chosen.stop.signal);
}

async function show(id, signal) {
  const close = h("button", { type: "button", ariaLabel: "Close", onclick: () => choose("") }, "✕");
  const panel = { cancel: cancelButton(id), head: h("div"), streams: h("div"), rest: h("div"), shown: new Map() };
  const title = h("div", { className: "title" }, h("h2", {}, id), panel.cancel, close);
  $("#run").replaceChildren(title, panel.head, panel.streams, panel.rest);
  const fail = (error) => signal.aborted || panel.head.replaceChildren(h("p", { className: "warning" }, error.message));
  let timer;
  const refresh = () => {
    timer ??= setTimeout(() => {
      timer = undefined;
      if (!panel.isCompleted) fillPanel(id, panel, signal).catch(fail);
    }, 200);
  };
  chosen.refresh = refresh;
  try {
    await fillPanel(id, panel, signal);
    for await (const _ of followRun({ id }, { ...access(), signal })) refresh();
  } catch (error) {
    fail(error);
  }
}

async function fillPanel(id, panel, signal) {
  const { run, summary, streams, readers } = await ask(`inspect/runs/${encodeURIComponent(id)}`);
  if (signal.aborted) return;
  panel.isCompleted = panel.cancel.hidden = run.isCompleted;
  const firstChunk = Math.min(...streams.map(({ firstAtMs }) => firstAtMs ?? Infinity));
  panel.head.replaceChildren(
    h("p", {}, statusOf(run.status), ` ${run.taskIdentifier} `, ...run.tags.map(tagOf)),
    ...(run.error ? [h("pre", { className: "warning" }, `${run.error.name}: ${run.error.message}`)] : []),
    h("h3", {}, "Timeline"),
    ...timeline(summary, firstChunk),
  );
  for (const stream of streams) addStream(id, stream, panel, signal);
  for (const { key, chunks, removed, error } of streams) {
    const count = `${chunks} ${chunks === 1 ? "chunk" : "chunks"}${removed ? `, the first ${removed} removed` : ""}`;
    panel.shown.get(key).textContent = `${key}: ${error ?? count}`;
  }
  const { metadata, output, payload, relatedRuns, ...record } = run;
  const parts = Object.entries({ metadata, output, payload, record: { ...record, readersInThisProcess: readers } });
  const texts = parts.filter(([, value]) => value !== undefined).map(([name, value]) => [name, JSON.stringify(value, null, 2)]);
  if (panel.texts === (panel.texts = JSON.stringify(texts))) return;
  panel.rest.replaceChildren(...texts.flatMap(([name, text]) => [h("h3", {}, name), h("pre", {}, text)]));
}

function timeline({ createdAtMs, startedAtMs, finishedAtMs }, firstChunk) {
  const end = finishedAtMs ?? Date.now();
  const first = Number.isFinite(firstChunk) ? firstChunk : undefined;
  const parts = { queued: [createdAtMs, startedAtMs ?? end], started: [startedAtMs, first ?? end], streamed: [first, end] };
  const bar = h("div", { className: "bar" });
  for (const [name, [from, to]] of Object.entries(parts)) {
    if (from === undefined) continue;
    bar.append(h("div", { className: name, title: name }));
    bar.lastChild.style.flexGrow = Math.max(to - from, (end - createdAtMs) / 200, 0.001);
  }
  const steps = { queued: createdAtMs, started: startedAtMs, "first chunk": first, ended: finishedAtMs };
  const cells = Object.entries(steps).filter(([, time]) => time !== undefined).flatMap(([name, time]) => [
    h("dt", {}, name),
    h("dd", {}, time === createdAtMs ? "" : `+${span(time - createdAtMs)}`),
    h("dd", { className: "quiet" }, new Date(time).toISOString()),
  ]);
  return [bar, h("dl", { className: "steps" }, ...cells)];
}

function addStream(id, { key }, panel, signal) {
  if (panel.shown.has(key)) return;
  if (panel.shown.size === 0) panel.streams.append(h("h3", {}, "Streams"));
  const summary = h("summary", {}, key);
  const text = h("pre");
  const details = h("details", {}, summary, text);
  panel.shown.set(key, summary);
  panel.streams.append(details);
  details.addEventListener("toggle", () => readInto(id, key, text, signal), { once: true });
  details.open = panel.shown.size === 1;
}

/** Shows the chunks of a stream as they arrive, the newest part of a long one. Text is joined; other chunks are lines. */
async function readInto(id, key, element, signal) {
  let waiting = "";
  let startsLine = true;
  const paint = () => {
    const shown = element.textContent + waiting;
    const atEnd = element.scrollTop + element.clientHeight >= element.scrollHeight - 8;
    element.textContent = shown.length > SHOWN_CHARS ? `…${shown.slice(-SHOWN_CHARS)}` : shown;
    if (atEnd) element.scrollTop = element.scrollHeight;
    waiting = "";
  };
  const add = (text) => {
    if (!waiting) setTimeout(paint, 50);
    waiting += text;
  };
  try {
    const onGap = ({ requested, first }) => add(`\n[chunks ${requested} to ${first - 1} are no longer stored]\n`);
    for await (const chunk of readStream({ id }, { ...access(), stream: key, onGap, signal })) {
      const text = typeof chunk === "string" ? chunk : `${startsLine ? "" : "\n"}${JSON.stringify(chunk)}\n`;
      startsLine = text.endsWith("\n");
      add(text);
    }
  } catch (error) {
    if (!signal.aborted) add(`\n[${error.message}]`);
  }
}

function cancelButton(id) {
  const button = h("button", { type: "button", className: "danger" }, "Cancel");
  button.onclick = async () => {
    if (button.textContent === "Cancel") {
      button.textContent = "Cancel this run?";
      setTimeout(() => (button.textContent = "Cancel"), 4000);
      return;
    }
    button.disabled = true;
    await ask(`inspect/runs/${encodeURIComponent(id)}/cancel`, { method: "POST" }).catch((error) => alert(error.message));
  };
  return button;
}

// Times

function span(ms) {
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 3_600_000) return `${Math.floor(ms / 60_000)} min ${Math.floor((ms % 60_000) / 1000)} s`;
  return `${Math.floor(ms / 3_600_000)} h ${Math.floor((ms % 3_600_000) / 60_000)} min`;
}

const ago = (time) => (Date.now() - time < 1000 ? "now" : `${span(Date.now() - time).replace(/\.\d/, "")} ago`);

// The page

function connected(state, text) {
  Object.assign($("#connection"), { textContent: text, className: `state ${state}` });
}

function remember() {
  const state = new URLSearchParams([...new FormData(filters)].filter(([, value]) => value));
  if (chosen) state.set("run", chosen.id);
  history.replaceState(null, "", `#${state}`);
}

async function refreshList() {
  clearTimeout(refreshList.timer);
  let pause = POLL_MS;
  try {
    if (!document.hidden) await poll();
  } catch (error) {
    if (error instanceof Denied) return login(secretKey ? error.message : "");
    connected("lost", `not connected: ${error.message}`);
    pause = 3 * POLL_MS;
  }
  refreshList.timer = setTimeout(refreshList, pause);
}

function login(message) {
  connected("", "locked");
  wanted = chosen?.id ?? wanted;
  choose("");
  $("main").hidden = true;
  $("#login").hidden = false;
  $("#denied").textContent = message;
  $("#key").value = "";
  $("#key").focus();
}

filters.elements.status.append(h("option", { value: "" }, "all"), ...STATUSES.map((name) => h("option", { value: name }, name)));
fillTasks([saved.get("task") ?? ""]);
for (const name of ["task", "status", "tag"]) filters.elements[name].value = saved.get(name) ?? "";

filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("input", () => (remember(), refreshList()));
document.addEventListener("visibilitychange", () => document.hidden || refreshList());
document.addEventListener("keydown", (event) => event.key === "Escape" && choose(""));
$("#login").addEventListener("submit", (event) => {
  event.preventDefault();
  secretKey = $("#key").value.trim();
  $("#key").value = "";
  refreshList();
});
refreshList();
