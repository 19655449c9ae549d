// Reads the body of a response with the transport of the AI SDK, in the given major version, and assembles the message.
// With `broken`, the connection breaks at the end of the body.

import * as ai5 from "ai-5";
import * as ai6 from "ai-6";
import * as ai7 from "ai-7";

const versions = { 5: ai5, 6: ai6, 7: ai7 };

export default async function ({ receive, print }) {
  for (let asked; (asked = await receive()); ) print(await read(asked));
}

async function read({ version, body, broken }) {
  const { DefaultChatTransport, readUIMessageStream } = versions[version];
  const transport = new DefaultChatTransport({ fetch: async () => new Response(bytes(body, broken)) });
  const read = { message: null, error: null };
  try {
    const stream = await transport.sendMessages({ trigger: "submit-message", chatId: "chat", messages: [] });
    const onError = (error) => (read.error = error.message);
    for await (const message of readUIMessageStream({ stream, onError, terminateOnError: true })) read.message = message;
  } catch (error) {
    read.error = error.message;
  }
  return { read };
}

function bytes(text, broken) {
  let sent = false;
  return new ReadableStream({
    pull(controller) {
      if (!sent) controller.enqueue(new TextEncoder().encode(text));
      else if (broken) controller.error(new TypeError("terminated"));
      else controller.close();
      sent = true;
    },
  });
}
