// Reads a stream of a run with `streams.read`, as users do. `by` selects the older `fetchStream`, or `parts` for what the
// hooks see: the index and the time of each chunk. Any message aborts it.

import { apiClientManager } from "@trigger.dev/core/v3";
import { runs, streams } from "@trigger.dev/sdk";

export default async function ({ given, print, receive, tried }) {
  const controller = new AbortController();
  const options = { ...given.options, signal: controller.signal };
  const onPart = ({ id, timestamp }) => print({ part: { id, timestamp } });
  const readers = {
    read: () => (given.key ? streams.read(given.run, given.key, options) : streams.read(given.run, options)),
    fetchStream: () => runs.fetchStream(given.run, given.key),
    parts: () => apiClientManager.clientOrThrow().fetchStream(given.run, given.key, { ...options, onPart }),
  };
  receive().then(() => controller.abort());

  await tried(async () => {
    let seen = 0;
    for await (const chunk of await readers[given.by ?? "read"]()) {
      print({ chunk });
      seen += 1;
      if (seen === given.breakAfter) break;
    }
    print({ end: seen });
  });
}
