// A chat with TanStack AI's client, which first loads the thread and joins its run, as a page does that opens. It prints the
// text of the answer at each change, and what it has become. The messages that it receives are questions; null stops it.

import { ChatClient, fetchServerSentEvents } from "@tanstack/ai-client";

export default async function ({ given, receive, print }) {
  const client = new ChatClient({
    connection: fetchServerSentEvents(given.url, { reconnect: { delayMs: 10 } }),
    threadId: given.threadId,
    persistence: true,
    onMessagesChange: (messages) => print({ messages: messages.map(({ role, parts }) => ({ role, parts })) }),
    onStatusChange: (status) => print({ status }),
    onErrorChange: (error) => print({ error: error?.message ?? null }),
  });
  client.attach();
  for (let question; (question = await receive()) !== undefined; ) {
    if (question === null) client.stop();
    else client.sendMessage(question);
  }
}
