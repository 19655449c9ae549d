// Runs an agent with the client of AG-UI for each message received, and prints the events of the run and its end. With
// `body`, the response is this one.

import { HttpAgent } from "@ag-ui/client";

export default async function ({ receive, print }) {
  for (let asked; (asked = await receive()); ) await run(asked, print);
}

async function run({ url = "http://localhost", threadId, runId, body }, print) {
  const fetch = body === undefined ? undefined : async () => new Response(body, { headers: EVENTS });
  const initialMessages = [{ id: "question", role: "user", content: "Hello" }];
  const agent = new HttpAgent({ url, threadId, initialMessages, fetch });
  const end = { error: null, outcome: null };
  const subscriber = {
    onEvent: ({ event }) => print({ event }),
    onRunFinishedEvent: ({ event }) => void (end.outcome = event.outcome ?? null),
    onRunErrorEvent: ({ event }) => void (end.error = event.message),
  };
  await agent.runAgent({ runId }, subscriber).catch((error) => (end.error = error.message));
  print({ end: { ...end, messages: agent.messages.filter((message) => message.role !== "user") } });
}

const EVENTS = { "content-type": "text/event-stream" };
