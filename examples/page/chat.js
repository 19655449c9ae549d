// The chat's page. The module of the mount reads runs and streams, and resumes them after any interruption. The page opens
// at most two connections: the feed of the user's runs, closed while the tab is hidden, and the stream of the open answer.
// All content comes from these two, and the address names the open run. So it looks the same after a reload, in a second
// tab, and after Back.

import { followRuns, readStream } from "./realtime/client.js";

const $ = (id) => document.getElementById(id);
const note = (text) => ($("note").textContent = text);
const showFeed = (state) => ($("feed").textContent = $("feed").dataset.state = state);

async function post(path, body = {}) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  if (!response.ok) throw new Error(`${path} returned ${response.status}`);
  return response.status === 204 ? null : response.json();
}

// The user's tag, and a token that can read the runs with it and their streams.
const refreshToken = () => fetch("session", { method: "POST" });

// ---- The list of runs

let runs = new Map();
let session; // sets the user's cookie, so the first question waits for it

async function followMyRuns() {
  try {
    const { tag } = await (session = post("session"));
    const feed = followRuns({ tags: tag, refreshToken, pauseHidden: true, onState: showFeed });
    for await (const { runs: all, changed, removed } of feed) {
      runs = all;
      changed.sort((one, other) => (one.createdAt < other.createdAt ? -1 : 1)).forEach(showRun);
      for (const id of removed) rowOf(id)?.parentElement.remove(); // expired, or lost in a restart of the server
    }
  } catch {
    showFeed("offline");
    setTimeout(followMyRuns, 3000);
  }
}

const rowOf = (id) => document.querySelector(`[data-run="${CSS.escape(id)}"]`);

function showRun(run) {
  const row = rowOf(run.id) ?? addRow(run.id);
  row.ariaCurrent = String(run.id === shown);
  describe(row, run);
  if (run.id === shown) describe($("conversation"), run);
}

function addRow(id) {
  $("runs").prepend($("row").content.firstElementChild.cloneNode(true));
  const row = $("runs").querySelector("a");
  row.dataset.run = id;
  row.href = `#${id}`;
  return row;
}

function describe(element, { status = "", payload, metadata }) {
  const write = (name, text) => {
    const part = element.querySelector(name);
    if (part.textContent !== text) part.textContent = text; // a text that is selected stays so
  };
  write(".text", payload?.text ?? "");
  write(".tokens", metadata?.tokens ? `${metadata.tokens} tokens` : "");
  write(".status", status.slice(0, 1) + status.slice(1).toLowerCase().replaceAll("_", " "));
  element.querySelector(".status").dataset.status = status;
}

// ---- The open conversation

let shown; // the id of its run
let reading = new AbortController();

async function show() {
  reading.abort();
  const { signal } = (reading = new AbortController());
  shown = /^#(run_.+)/.exec(location.hash)?.[1];
  const text = new Text();
  $("answer").replaceChildren(text);
  $("answer").ariaBusy = String(Boolean(shown));
  $("conversation").hidden = !shown;
  note("");
  describe($("conversation"), {});
  runs.forEach(showRun);
  if (!shown) return;
  const onGap = () => note("A part of this answer has expired.");
  try {
    for await (const chunk of readStream({ id: shown }, { refreshToken, signal, onGap })) {
      const page = $("conversation");
      const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
      text.appendData(chunk.choices?.[0]?.delta?.content ?? "");
      if (atEnd) page.scrollTop = page.scrollHeight;
    }
  } catch (error) {
    if (signal.aborted) return; // another one is open
    if (error.status === 404) note("This run no longer exists on the server.");
    else if (error.code !== "canceled") note(error.message);
  }
  $("answer").ariaBusy = "false";
}

// ---- User actions

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = event.submitter?.value || $("prompt").value.trim(); // the buttons with ideas have a value
  if (!text) return;
  $("prompt").value = "";
  try {
    await session;
    location.hash = (await post("chat", { text })).id;
  } catch (error) {
    $("prompt").value = text;
    note(`The question was not sent: ${error.message}`);
  }
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});

$("stop").addEventListener("click", () => {
  post(`chat/${shown}/stop`).catch((error) => note(`The run was not stopped: ${error.message}`));
});

addEventListener("hashchange", show);
followMyRuns();
show();
