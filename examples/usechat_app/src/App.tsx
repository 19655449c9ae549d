import { useChat } from "@ai-sdk/react";
import { DefaultChatTransport, getToolName, isToolUIPart, type UIMessage } from "ai";
import { useEffect, useState, useSyncExternalStore, type FormEvent, type KeyboardEvent } from "react";

import { load, post, resumingFetch, type Chat } from "./backend";

type Approval = { question: string; approved?: boolean };
type Message = UIMessage<{ status?: string }, { approval: Approval }>;
type Part = Message["parts"][number];
const ENDINGS: Record<string, string> = { CANCELED: "Stopped", TIMED_OUT: "Timed out" };

const transport = new DefaultChatTransport<Message>({
  fetch: resumingFetch(), // a connection that breaks resumes, and the chat does not notice
  prepareSendMessagesRequest: ({ id, messages }) => ({ body: { id, message: messages.at(-1) } }),
});

export function App() {
  const shown = useShownChat();
  const [fresh, setFresh] = useState(() => crypto.randomUUID());
  const [chats, setChats] = useState<Chat[]>();
  const [error, setError] = useState<Error>();
  const refresh = () => load<Chat[]>("/api/chats").then(setChats, setError);
  useEffect(() => void refresh(), []); // the first response tells the browser who the user is

  return (
    <>
      <aside>
        <h1>asgi_realtime</h1>
        <a className="button" href="#" onClick={() => setFresh(crypto.randomUUID())}>
          New chat
        </a>
        <h2>Your chats</h2>
        <Failure error={error} />
        <ul>
          {chats?.map(({ id, title }) => (
            <li key={id}>
              <a href={`#${id}`} aria-current={id === shown}>
                {title}
              </a>
            </li>
          ))}
        </ul>
      </aside>
      {chats && <ChatPage key={shown || fresh} id={shown || fresh} isNew={!shown} onChange={refresh} />}
    </>
  );
}

/** The open chat is part of the page's address, so that it survives a reload. */
function useShownChat(): string {
  const subscribe = (changed: () => void) => {
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  };
  return useSyncExternalStore(subscribe, () => location.hash.slice(1));
}

function ChatPage({ id, isNew, onChange }: { id: string; isNew: boolean; onChange: () => void }) {
  const [stored, setStored] = useState<Message[] | undefined>(isNew ? [] : undefined);
  const [error, setError] = useState<Error>();
  useEffect(() => {
    if (!stored) load<Message[]>(`/api/chat/${id}`).then(setStored, setError);
  }, [id]);
  if (stored) return <OpenChat id={id} stored={stored} onChange={onChange} />;
  return (
    <main>
      <Failure error={error} />
    </main>
  );
}

function OpenChat({ id, stored, onChange }: { id: string; stored: Message[]; onChange: () => void }) {
  const [draft, setDraft] = useState("");
  const [stopError, setStopError] = useState<Error>();
  const { messages, setMessages, sendMessage, status, error } = useChat<Message>({
    id,
    messages: stored,
    resume: stored.length > 0, // an answer in progress continues
    transport,
    onFinish: ({ messages, message, isError, finishReason }) => {
      const last = messages.at(-1);
      if (isError && last?.role === "user") takeBack(last); // the server has rejected it
      else if (!isError && !finishReason) mark(message, "CANCELED");
      onChange();
    },
  });
  const busy = status === "submitted" || status === "streaming";

  // Between the end of a run and its `on_end`, the answer is neither in progress nor in the history.
  const isUnanswered = status === "ready" && messages.at(-1)?.role === "user";
  useEffect(() => {
    if (!isUnanswered) return;
    const timer = setTimeout(() => load<Message[]>(`/api/chat/${id}`).then(setMessages), 1000);
    return () => clearTimeout(timer);
  }, [isUnanswered]);

  const mark = ({ id }: Message, status: string) => {
    setMessages((messages) => messages.map((one) => (one.id === id ? { ...one, metadata: { status } } : one)));
  };
  const takeBack = (question: Message) => {
    setMessages((messages) => messages.filter(({ id }) => id !== question.id));
    setDraft(textOf(question));
  };
  const ask = (event: FormEvent) => {
    event.preventDefault();
    if (!draft.trim() || busy) return;
    setDraft("");
    void sendMessage({ text: draft.trim() });
    location.hash = id;
  };
  const askOnEnter = (event: KeyboardEvent<HTMLTextAreaElement>) => {
    if (event.key !== "Enter" || event.shiftKey || event.nativeEvent.isComposing) return;
    event.preventDefault();
    event.currentTarget.form!.requestSubmit();
  };
  const stop = () => post(`/api/chat/${id}/stop`).then(() => setStopError(undefined), setStopError);

  return (
    <main>
      <article>
        <div>
          {messages.length === 0 && <Welcome />}
          {messages.map((message, index) => (
            <Shown key={message.id} chat={id} message={message} busy={busy && index === messages.length - 1} />
          ))}
          <Failure error={error ?? stopError} />
        </div>
      </article>
      <form onSubmit={ask}>
        <textarea
          rows={1}
          placeholder="Ask something…"
          value={draft}
          onChange={(event) => setDraft(event.target.value)}
          onKeyDown={askOnEnter}
          autoFocus
        />
        {busy ? (
          <button type="button" onClick={stop}>
            Stop
          </button>
        ) : (
          <button className="main">Ask</button>
        )}
      </form>
    </main>
  );
}

function Welcome() {
  return (
    <section>
      <h2>Ask something</h2>
      <p>
        The answer comes from a Python task. This page uses the AI SDK's own <code>useChat</code>. Reload it in the
        middle of an answer, open it in a second tab, go offline for a while, or press Stop.
      </p>
    </section>
  );
}

function Shown({ chat, message, busy }: { chat: string; message: Message; busy: boolean }) {
  if (message.role === "user") return <p className="question">{textOf(message)}</p>;
  const status = message.metadata?.status;
  return (
    <>
      <div className="answer" aria-live="polite" aria-busy={busy}>
        {message.parts.map((part, index) => (
          <ShownPart key={index} chat={chat} part={part} busy={busy} />
        ))}
      </div>
      {status && <p className="ending">{ENDINGS[status] ?? "Interrupted by an error"}</p>}
    </>
  );
}

function ShownPart({ chat, part, busy }: { chat: string; part: Part; busy: boolean }) {
  if (part.type === "text") return part.text;
  if (part.type === "data-approval") return <ShownApproval chat={chat} id={part.id!} {...part.data} busy={busy} />;
  if (!isToolUIPart(part)) return null;
  const result = part.state === "output-available" ? JSON.stringify(part.output) : (part.errorText ?? "…");
  return (
    <p className="tool">
      {getToolName(part)}({JSON.stringify(part.input)}) → {result}
    </p>
  );
}

/** A question of a tool, which waits for the answer. */
function ShownApproval({ chat, id, question, approved, busy }: Approval & { chat: string; id: string; busy: boolean }) {
  const [error, setError] = useState<Error>();
  const answer = (approved: boolean) => post(`/api/chat/${chat}/approve`, { id, approved }).catch(setError);
  return (
    <div className="approval">
      <p>{question}</p>
      {approved !== undefined && <p className="ending">{approved ? "Approved" : "Rejected"}</p>}
      {approved === undefined && busy && (
        <>
          <button className="main" onClick={() => answer(true)}>
            Approve
          </button>
          <button onClick={() => answer(false)}>Reject</button>
        </>
      )}
      <Failure error={error} />
    </div>
  );
}

function textOf({ parts }: Message): string {
  return parts.map((part) => (part.type === "text" ? part.text : "")).join("");
}

function Failure({ error }: { error?: Error }) {
  return (
    error && (
      <p className="failure" role="alert">
        {error.message}
      </p>
    )
  );
}
