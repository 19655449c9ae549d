// The other ways in which a worker writes: `writer`, `merge`, a defined stream, and `append`.

import { apiClientManager, realtimeStreams } from "@trigger.dev/core/v3";
import { StandardRealtimeStreamsManager } from "@trigger.dev/core/v3/workers";
import { streams } from "@trigger.dev/sdk";

export default async function ({ given, print, tried }) {
  const client = apiClientManager.clientOrThrow();
  realtimeStreams.setGlobalManager(new StandardRealtimeStreamsManager(client, client.baseUrl));
  const target = given.run;

  await tried(async () => {
    const { waitUntilComplete } = streams.writer("written", {
      target,
      execute: ({ write, merge }) => {
        write({ number: 1 });
        write("two");
        merge(source(3, [4, null]));
      },
    });
    await waitUntilComplete();

    const defined = streams.define({ id: "defined" });
    await defined.append({ first: true }, { target });
    await defined.append("second", { target });

    for (const text of given.texts) await streams.append("appended", text, { target });
    print({ written: true });
  });
}

function source(...chunks) {
  return new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      controller.close();
    },
  });
}
