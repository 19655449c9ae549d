// Follows runs: `feed` is run, tags or batch. Any message aborts it; `breakAfter` breaks the loop after so many items.

import { runs } from "@trigger.dev/sdk";

export default async function ({ given, print, receive, tried }) {
  const controller = new AbortController();
  const options = { ...given.options, signal: controller.signal };
  const feeds = {
    run: () => runs.subscribeToRun(given.run, options),
    tags: () => runs.subscribeToRunsWithTag(given.tags, given.filters, options),
    batch: () => runs.subscribeToBatch(given.batch, options),
  };
  receive().then(() => controller.abort());

  await tried(async () => {
    const feed = feeds[given.feed]();
    let seen = 0;
    for await (const part of given.withStreams ? feed.withStreams() : feed) {
      if (!given.withStreams) print({ run: part });
      else if (part.type === "run") print({ run: part.run });
      else print({ chunk: part.chunk, stream: part.type });
      seen += 1;
      if (seen === given.breakAfter) break;
    }
    print({ end: seen });
  });
}
