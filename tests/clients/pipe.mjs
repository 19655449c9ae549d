// Writes a stream as a worker does: each message is a list of chunks for the source of `streams.pipe`, and null ends the
// source. The official worker registers a stream manager; without one `pipe` sends nothing.

import { apiClientManager, realtimeStreams } from "@trigger.dev/core/v3";
import { StandardRealtimeStreamsManager } from "@trigger.dev/core/v3/workers";
import { streams } from "@trigger.dev/sdk";

export default async function ({ given, print, receive, tried }) {
  const client = apiClientManager.clientOrThrow();
  realtimeStreams.setGlobalManager(new StandardRealtimeStreamsManager(client, client.baseUrl));

  async function* source() {
    for (;;) {
      const chunks = await receive();
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
