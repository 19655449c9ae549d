import {
  TriggerAuthContext,
  useInputStreamSend,
  useRealtimeRun,
  useRealtimeRunsWithTag,
  useRealtimeStream,
  useRealtimeTaskTrigger,
  useTaskTrigger,
} from "@trigger.dev/react-hooks";
import type { RealtimeRun } from "@trigger.dev/sdk";
import { useEffect, useRef, useState, useSyncExternalStore, type FormEvent, type KeyboardEvent } from "react";

import { getSession, post, type Session } from "./session";
import type { Chat, Chunk, Publish } from "./tasks";

const baseURL = import.meta.env.VITE_REALTIME_URL ?? "http://127.0.0.1:8000/realtime";
const RENEW_EVERY_MS = 10 * 60_000; // the session's tokens live for 15 minutes

export function App() {
  const [session, setSession] = useState<Session>();
  const [error, setError] = useState<Error>();
  const shown = useShownRun();

  useEffect(() => {
    getSession().then(setSession, setError);
    const timer = setInterval(() => getSession(true).then(setSession, setError), RENEW_EVERY_MS);
    return () => clearInterval(timer);
  }, []);

  if (!session) return <Failure error={error} />;
  const refreshAccessToken = async () => (await getSession(true)).token;
  return (
    <TriggerAuthContext.Provider value={{ baseURL, accessToken: session.token, refreshAccessToken }}>
      <Runs key={session.token} tag={session.tag} shown={shown} />
      <main>
        {shown ? <ShownRun key={shown} id={shown} session={session} /> : <Welcome />}
        <Ask session={session} />
      </main>
    </TriggerAuthContext.Provider>
  );
}

/** The open run is part of the page's address, so that it survives a reload. */
function useShownRun(): string {
  const subscribe = (changed: () => void) => {
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  };
  return useSyncExternalStore(subscribe, () => location.hash.slice(1));
}

/** All runs of the user, live. */
function Runs({ tag, shown }: { tag: string; shown: string }) {
  const { runs, error } = useRealtimeRunsWithTag<Chat | Publish>(tag, { skipColumns: ["output"] });
  return (
    <aside>
      <h1>asgi_realtime</h1>
      <a className="button" href="#">
        New question
      </a>
      <h2>Your runs</h2>
      <Failure error={error} />
      <ul>
        {runs.toReversed().map((run) => (
          <li key={run.id}>
            <a href={`#${run.id}`} aria-current={run.id === shown}>
              <span className="text">
                {run.taskIdentifier === "publish" && "Publish: "}
                {run.payload.text}
              </span>
              <Status run={run} />
            </a>
          </li>
        ))}
      </ul>
    </aside>
  );
}

function Welcome() {
  return (
    <section>
      <h2>Ask something</h2>
      <p>
        The task that answers is a Python function. This page uses Trigger.dev's own React hooks: for the runs on the
        left, for the answer as it is generated, and for an approval that a second task waits for. Reload at any time.
      </p>
    </section>
  );
}

/** Triggers the task from the browser and opens its run. */
function Ask({ session }: { session: Session }) {
  const { submit, handle, isLoading, error } = useTaskTrigger<Chat>("chat", { accessToken: session.triggerToken });
  const form = useRef<HTMLFormElement>(null);
  useEffect(() => {
    if (!handle) return;
    location.hash = handle.id;
    form.current?.reset();
  }, [handle]);

  const ask = (event: FormEvent<HTMLFormElement>) => {
    event.preventDefault();
    const text = String(new FormData(event.currentTarget).get("text")).trim();
    if (text && !isLoading) submit({ text }, { tags: [session.tag] });
  };
  const askOnEnter = (event: KeyboardEvent<HTMLTextAreaElement>) => {
    if (event.key !== "Enter" || event.shiftKey || event.nativeEvent.isComposing) return;
    event.preventDefault();
    event.currentTarget.form!.requestSubmit();
  };
  return (
    <form ref={form} onSubmit={ask}>
      <Failure error={error} />
      <div>
        <textarea name="text" rows={1} placeholder="Ask something…" onKeyDown={askOnEnter} autoFocus />
        <button className="main" disabled={isLoading}>
          Ask
        </button>
      </div>
    </form>
  );
}

/** One run, live: its question, its answer and its status. */
function ShownRun({ id, session }: { id: string; session: Session }) {
  const { run, error } = useRealtimeRun<Chat | Publish>(id);
  const isChat = run?.taskIdentifier === "chat";
  if (!run) {
    return (
      <article>
        <Failure error={error} />
      </article>
    );
  }
  return (
    <article>
      <div>
        <p className="question">{isChat ? run.payload.text : "Publish this answer?"}</p>
        {isChat ? <Answer id={id} busy={!run.finishedAt} /> : <div className="answer">{run.payload.text}</div>}
        <Failure error={error ?? run.error} />
        <footer>
          <Status run={run} />
          {run.status === "EXECUTING" && <button onClick={() => void post(`/chat/${id}/stop`)}>Stop</button>}
          {isChat && run.isSuccess && <PublishAnswer run={run as RealtimeRun<Chat>} session={session} />}
          {!isChat && <ApprovalOfMine run={run as RealtimeRun<Publish>} />}
        </footer>
      </div>
    </article>
  );
}

/** The answer, chunk by chunk as the language model generates it. */
function Answer({ id, busy }: { id: string; busy: boolean }) {
  const { parts, error } = useRealtimeStream<Chunk>(id, "default");
  const text = parts.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  return (
    <>
      <div className="answer" aria-live="polite" aria-busy={busy && !error}>
        {text}
      </div>
      <Failure error={error} />
    </>
  );
}

/** Triggers a second task, which waits for an approval, and follows it. */
function PublishAnswer({ run: answered, session }: { run: RealtimeRun<Chat>; session: Session }) {
  const options = { accessToken: session.triggerToken };
  const { submit, handle, run, isLoading, error } = useRealtimeTaskTrigger<Publish>("publish", options);
  if (run && handle) return <Approval run={run} token={handle.publicAccessToken} />;
  return (
    <>
      <Failure error={error} />
      <button disabled={isLoading} onClick={() => submit({ text: answered.output!.text }, { tags: [session.tag] })}>
        Publish
      </button>
    </>
  );
}

/** A reload loses the handle and its token, so the backend issues another one to a user allowed to approve. */
function ApprovalOfMine({ run }: { run: RealtimeRun<Publish> }) {
  const [token, setToken] = useState<string>();
  useEffect(() => {
    post<{ token: string }>(`/session/${run.id}`).then(({ token }) => setToken(token));
  }, [run.id]);
  return token && <Approval run={run} token={token} />;
}

/** Sends the approval into the run. */
function Approval({ run, token }: { run: RealtimeRun<Publish>; token: string }) {
  type Answer = { approved: boolean };
  const { send, isLoading, error } = useInputStreamSend<Answer>("approval", run.id, { accessToken: token });
  if (run.finishedAt) return <p>{run.output?.published ? "Published" : "Not published"}</p>;
  return (
    <>
      <Failure error={error} />
      <button className="main" disabled={isLoading} onClick={() => send({ approved: true })}>
        Approve
      </button>
      <button disabled={isLoading} onClick={() => send({ approved: false })}>
        Reject
      </button>
    </>
  );
}

function Status({ run }: { run: RealtimeRun<Chat | Publish> }) {
  const words = run.status[0] + run.status.slice(1).toLowerCase().replaceAll("_", " ");
  const tokens = run.metadata?.tokens;
  return (
    <span className="status" data-status={run.status}>
      {words}
      {tokens !== undefined && ` · ${tokens} tokens`}
    </span>
  );
}

function Failure({ error }: { error?: { message: string } }) {
  return (
    error && (
      <p className="failure" role="alert">
        {error.message}
      </p>
    )
  );
}
