// Writes a stream as a worker does: what it is told goes into a source, chunk by chunk, which `streams.pipe` sends to
// the server and hands on. Told null, the source ends. The writer is the one that the worker of the official package
// registers; without it `pipe` sends nothing.

import { apiClientManager, realtimeStreams } from "@trigger.dev/core/v3";
import { StandardRealtimeStreamsManager } from "@trigger.dev/core/v3/workers";
import { streams } from "@trigger.dev/sdk";

export default async function ({ given, print, told, tried }) {
  const client = apiClientManager.clientOrThrow();
  realtimeStreams.setGlobalManager(new StandardRealtimeStreamsManager(client, client.baseUrl));

  async function* source() {
    for (;;) {
      const chunks = await told();
      if (chunks === null) return;
      yield* chunks;
    }
  }

  await tried(async () => {
    const { stream, waitUntilComplete } = streams.pipe(given.key, source(), { target: given.run });
    for await (const chunk of stream) print({ local: chunk });
    await waitUntilComplete();
    print({ complete: true });
  });
}
