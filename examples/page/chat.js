// The chat's page. The module of the mount reads runs and streams, and resumes them after any interruption. The page opens
// at most two connections: the feed of the user's runs, closed while the tab is hidden, and the stream of the open answer.
// All content comes from these two, so it looks the same after a reload and in a second tab.

import { followRuns, readStream } from "./realtime/client.js";

const $ = (id) => document.getElementById(id);
const span = (className) => Object.assign(document.createElement("span"), { className });
const words = (status) => status[0] + status.slice(1).toLowerCase().replaceAll("_", " ");
const tokens = (run) => (run?.metadata?.tokens ? `${run.metadata.tokens} tokens` : "");
const rowOf = (id) => document.querySelector(`[data-run="${CSS.escape(id)}"]`);

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
let session; // sets the user's cookie, so other requests wait for it

async function followMyRuns() {
  const { tag } = await (session = post("session"));
  const options = { refreshToken, pauseHidden: true, onState: showFeed };
  for await (const { runs: all, changed, removed } of followRuns({ tags: tag, ...options })) {
    runs = all;
    changed.forEach(showRun);
    for (const id of removed) rowOf(id)?.parentElement.remove(); // expired, or lost in a restart of the server
    $("no-runs").hidden = runs.size > 0;
  }
}

function followAgain() {
  showFeed("offline");
  setTimeout(() => followMyRuns().catch(followAgain), 3000);
}

function showFeed(state) {
  $("feed").textContent = $("feed").dataset.state = state;
}

function showRun(run) {
  const row = rowOf(run.id) ?? addRow(run);
  const [status, progress] = row.lastChild.children;
  status.textContent = words((status.dataset.status = run.status));
  progress.textContent = tokens(run);
  if (run.id === shown) showStatus();
}

function addRow({ id, createdAt, payload }) {
  const button = Object.assign(document.createElement("button"), { type: "button", ariaCurrent: String(id === shown) });
  Object.assign(button.dataset, { run: id, at: createdAt });
  button.append(span("text"), span("facts"));
  button.lastChild.append(span("status"), span("tokens"));
  button.firstChild.textContent = payload?.text ?? id;
  button.addEventListener("click", () => show({ id }, button.firstChild.textContent));

  const row = document.createElement("li");
  row.append(button);
  const older = [...$("runs").children].find((other) => other.firstChild.dataset.at <= createdAt);
  $("runs").insertBefore(row, older ?? null);
  return button;
}

// ---- The open conversation

let shown = null; // the id of its run
let reading = new AbortController();

async function show(handle, question) {
  open(handle.id);
  sessionStorage.setItem("shown", JSON.stringify({ ...handle, question }));
  const text = new Text();
  $("question").textContent = question;
  $("answer").replaceChildren(text);
  $("answer").ariaBusy = "true";
  note("");
  showStatus();

  const { signal } = reading;
  const onGap = () => {
    text.data = "";
    note("The beginning of this answer has expired.");
  };
  const stream = readStream(handle, { refreshToken, signal, onGap });
  try {
    for await (const chunk of stream) {
      const page = $("conversation");
      const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
      text.appendData(chunk.choices?.[0]?.delta?.content ?? "");
      if (atEnd) page.scrollTop = page.scrollHeight;
    }
  } catch (error) {
    if (signal.aborted) return; // another one is open
    if (stream.end) note(stream.end.error?.message ?? stream.end.error ?? "");
    else note(error.status === 404 ? "This run no longer exists on the server." : error.message);
  }
  $("answer").ariaBusy = "false";
  showStatus();
}

function open(id) {
  reading.abort();
  reading = new AbortController();
  shown = id;
  sessionStorage.removeItem("shown");
  $("welcome").hidden = id !== null;
  $("conversation").hidden = id === null;
  for (const button of $("runs").querySelectorAll("button")) button.ariaCurrent = String(button.dataset.run === id);
}

function showStatus() {
  const run = runs.get(shown);
  const status = ($("status").dataset.status = run?.status ?? "QUEUED");
  $("status").textContent = words(status);
  $("progress").textContent = tokens(run);
  $("stop").hidden = run?.isCompleted || $("answer").ariaBusy === "false";
}

function note(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
}

// ---- User actions

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text) return;
  $("send").disabled = true;
  try {
    await session;
    const handle = await post("chat", { text });
    $("prompt").value = "";
    show(handle, text);
  } catch (error) {
    $("conversation").hidden = false;
    note(`The question was not sent: ${error.message}`);
  }
  $("send").disabled = false;
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});

$("ideas").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  $("prompt").value = event.target.textContent;
  $("ask").requestSubmit();
});

$("new").addEventListener("click", () => {
  open(null);
  $("prompt").focus();
});

$("stop").addEventListener("click", async () => {
  $("stop").disabled = true;
  // The end arrives through the stream and the feed.
  await post(`chat/${shown}/stop`).catch((error) => note(`The run was not stopped: ${error.message}`));
  $("stop").disabled = false;
});

followMyRuns().catch(followAgain);
const { question, ...handle } = JSON.parse(sessionStorage.getItem("shown") ?? "{}");
if (question) show(handle, question);
