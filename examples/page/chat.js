// The chat's page. A browser needs only EventSource to read runs and streams, and no library.
//
// The page opens at most two connections: the feed of the user's runs, closed while the tab is hidden, and the stream of
// the open answer. All content comes from these two, so the page looks the same after a reload, in a second tab, and
// after a network failure. The ids of a stream count from 0, and a browser that reconnects sends the last id it has seen.

const FINAL = new Set(["COMPLETED", "FAILED", "CANCELED", "CRASHED", "EXPIRED", "TIMED_OUT", "SYSTEM_FAILURE"]);
const REALTIME = "realtime/v1";

const $ = (id) => document.getElementById(id);
const runs = new Map(); // id -> the last state of the run in the feed

// ---- The host's routes

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body ?? {}),
  });
  if (!response.ok) throw new Error(`${path} returned ${response.status}`);
  return response.status === 204 ? null : response.json();
}

let session = null; // a promise of {tag, token}, renewed when the token has expired

function getSession({ renew = false } = {}) {
  if (renew || !session) {
    session = post("session");
    session.catch(() => (session = null));
  }
  return session;
}

function source(path, query) {
  return new EventSource(`${REALTIME}/${path}?${new URLSearchParams(query)}`);
}

// An EventSource reconnects after a lost connection, but gives up (CLOSED) after a response that is not a stream: an
// expired token, an expired run, a server that is starting. This retries with growing delays, up to 10 s.
class Retry {
  #tries = 0;
  #timer = 0;

  later(action) {
    this.stop();
    this.#timer = setTimeout(action, Math.min(250 * 2 ** this.#tries++, 10_000) * (0.5 + Math.random() / 2));
  }

  succeeded() {
    this.#tries = 0;
  }

  stop() {
    clearTimeout(this.#timer);
  }
}

// ---- The feed: all runs of the user, live

class Feed {
  #source = null;
  #retry = new Retry();
  #opening = 0;
  ready = false;

  async open({ renew = false } = {}) {
    this.close();
    const opening = this.#opening; // detects another open() or close() during the wait for the session
    let tag, token;
    try {
      ({ tag, token } = await getSession({ renew }));
    } catch {
      if (opening === this.#opening) this.#failed();
      return;
    }
    if (opening !== this.#opening) return;

    const seen = new Set(); // runs sent on this connection
    const feed = (this.#source = source("runs", { tags: tag, access_token: token }));
    feed.addEventListener("run", (event) => {
      const run = JSON.parse(event.data);
      seen.add(run.id);
      runs.set(run.id, run);
      showRun(run);
    });
    feed.addEventListener("ready", () => {
      this.#retry.succeeded();
      // `ready` ends the list of all runs. Others have expired, or the server has restarted without them.
      for (const id of runs.keys()) if (!seen.has(id)) forgetRun(id);
      this.ready = true;
      setFeedState("live");
    });
    feed.addEventListener("end", () => this.#failed()); // a tag feed only ends when its token expires
    feed.addEventListener("error", () => {
      seen.clear();
      setFeedState("reconnecting");
      if (feed.readyState === EventSource.CLOSED) this.#failed();
    });
    feed.addEventListener("open", () => setFeedState("live"));
  }

  #failed() {
    this.close();
    setFeedState("offline");
    this.#retry.later(() => this.open({ renew: true }));
  }

  close() {
    this.#opening++;
    this.ready = false;
    this.#retry.stop();
    this.#source?.close();
    this.#source = null;
  }
}

// ---- The stream: one answer, from the first token

class Stream {
  #source = null;
  #retry = new Retry();
  #lastId = null;
  #closed = false;

  constructor(id, { onToken, onGap, onEnd }) {
    Object.assign(this, { id, onToken, onGap, onEnd });
  }

  open(token) {
    const query = { access_token: token };
    if (this.#lastId !== null) query.last_event_id = this.#lastId;
    const stream = (this.#source = source(`streams/${this.id}/default`, query));
    stream.addEventListener("message", (event) => {
      this.#retry.succeeded();
      this.#lastId = event.lastEventId;
      this.onToken(JSON.parse(event.data).choices?.[0]?.delta?.content ?? "");
    });
    stream.addEventListener("gap", (event) => {
      this.#lastId = event.lastEventId || this.#lastId;
      this.onGap(JSON.parse(event.data));
    });
    stream.addEventListener("end", (event) => {
      stream.close(); // otherwise the browser reconnects
      const end = JSON.parse(event.data);
      if (end.reason === "token_expired") this.#retry.later(() => this.#reopen());
      else this.#finish(end);
    });
    stream.addEventListener("error", () => {
      if (stream.readyState !== EventSource.CLOSED || this.#closed) return;
      const run = runs.get(this.id);
      if (run && FINAL.has(run.status)) this.#finish({ reason: run.status.toLowerCase() }); // everything was read before the connection was lost
      else if (feed.ready && !run) this.#finish({ reason: "missing" });
      else this.#retry.later(() => this.#reopen());
    });
  }

  async #reopen() {
    try {
      const { token } = await getSession({ renew: true }); // grants the runs with the user's tag, and their streams
      if (!this.#closed) this.open(token);
    } catch {
      if (!this.#closed) this.#retry.later(() => this.#reopen());
    }
  }

  #finish(end) {
    this.close();
    this.onEnd(end);
  }

  close() {
    this.#closed = true;
    this.#retry.stop();
    this.#source?.close();
  }
}

// ---- The open conversation

const shown = { id: null, stream: null, text: null };

function show(id, question, token) {
  shown.stream?.close();
  shown.id = id;
  shown.text = new Text();
  sessionStorage.setItem("shown", JSON.stringify({ id, question, token }));

  $("welcome").hidden = true;
  $("conversation").hidden = false;
  $("question").textContent = question;
  $("answer").replaceChildren(shown.text);
  $("answer").ariaBusy = "true";
  note("");
  showStatus();
  for (const button of $("runs").querySelectorAll("button")) button.ariaCurrent = String(button.dataset.run === id);

  shown.stream = new Stream(id, {
    onToken(token) {
      const page = $("conversation");
      const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
      shown.text.appendData(token);
      if (atEnd) page.scrollTop = page.scrollHeight;
    },
    onGap() {
      shown.text.data = "";
      note("The beginning of this answer has expired.");
    },
    onEnd({ reason, error }) {
      $("answer").ariaBusy = "false";
      if (reason === "missing") note("This run no longer exists on the server.");
      else if (error) note(typeof error === "string" ? error : error.message);
      showStatus();
    },
  });
  shown.stream.open(token);
}

function showWelcome() {
  shown.stream?.close();
  shown.id = shown.stream = null;
  sessionStorage.removeItem("shown");
  $("welcome").hidden = false;
  $("conversation").hidden = true;
  for (const button of $("runs").querySelectorAll("button")) button.ariaCurrent = "false";
  $("prompt").focus();
}

function showStatus() {
  const run = runs.get(shown.id);
  const status = run?.status ?? "QUEUED";
  $("status").dataset.status = status;
  $("status").textContent = words(status);
  $("progress").textContent = run?.metadata?.tokens ? `${run.metadata.tokens} tokens` : "";
  $("stop").hidden = FINAL.has(status) || $("answer").ariaBusy === "false";
}

function note(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
}

const words = (status) => status[0] + status.slice(1).toLowerCase().replaceAll("_", " ");

// ---- The list of runs

function showRun(run) {
  const row = document.querySelector(`[data-run="${CSS.escape(run.id)}"]`) ?? addRow(run);
  row.querySelector(".status").dataset.status = run.status;
  row.querySelector(".status").textContent = words(run.status);
  row.querySelector(".tokens").textContent = run.metadata?.tokens ? `${run.metadata.tokens} tokens` : "";
  if (run.id === shown.id) showStatus();
}

function addRow(run) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.run = run.id;
  button.dataset.at = run.createdAt;
  button.ariaCurrent = String(run.id === shown.id);
  for (const name of ["text", "facts"]) button.append(Object.assign(document.createElement("span"), { className: name }));
  for (const name of ["status", "tokens"]) {
    button.lastChild.append(Object.assign(document.createElement("span"), { className: name }));
  }
  button.firstChild.textContent = run.payload?.text ?? run.id;
  button.addEventListener("click", async () => show(run.id, button.firstChild.textContent, (await getSession()).token));

  const row = document.createElement("li");
  row.append(button);
  const older = [...$("runs").children].find((other) => other.firstChild.dataset.at <= run.createdAt);
  $("runs").insertBefore(row, older ?? null);
  $("no-runs").hidden = true;
  return button;
}

function forgetRun(id) {
  runs.delete(id);
  document.querySelector(`[data-run="${CSS.escape(id)}"]`)?.parentElement.remove();
  $("no-runs").hidden = runs.size > 0;
}

function setFeedState(state) {
  $("feed").dataset.state = state;
  $("feed").textContent = state;
}

// ---- User actions

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text) return;
  $("send").disabled = true;
  try {
    await getSession(); // the first request sets the user's cookie, so wait for it
    const handle = await post("chat", { text });
    $("prompt").value = "";
    show(handle.id, text, handle.publicAccessToken);
  } catch (error) {
    if (shown.id === null) $("conversation").hidden = false;
    note(`The question was not sent: ${error.message}`);
  } finally {
    $("send").disabled = false;
  }
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

$("new").addEventListener("click", showWelcome);

$("stop").addEventListener("click", async () => {
  $("stop").disabled = true;
  try {
    await post(`chat/${shown.id}/stop`); // the end arrives through the stream and the feed
  } catch (error) {
    note(`The run was not stopped: ${error.message}`);
  } finally {
    $("stop").disabled = false;
  }
});

// ---- Start

const feed = new Feed();
document.addEventListener("visibilitychange", () => (document.hidden ? feed.close() : feed.open()));
if (!document.hidden) feed.open();

const before = JSON.parse(sessionStorage.getItem("shown") ?? "null");
if (before) show(before.id, before.question, before.token);
