// Changes the metadata of a run as a worker does: `flush` sends operations and receives the new state.

import { apiClientManager, runMetadata } from "@trigger.dev/core/v3";
import { StandardMetadataManager } from "@trigger.dev/core/v3/workers";
import { metadata } from "@trigger.dev/sdk";

export default async function ({ given, print, tried }) {
  const manager = new StandardMetadataManager(apiClientManager.clientOrThrow());
  manager.runId = given.run;
  runMetadata.setGlobalManager(manager);
  runMetadata.enterWithMetadata(given.metadata);

  await tried(async () => {
    metadata.set("status", "reading").increment("pages", 3).append("log", "one").append("log", "two");
    metadata.set("$.deep.inside", { a: 1 });
    metadata.del("old");
    await metadata.flush();
    print({ current: metadata.current() });
    metadata.decrement("pages", 1).remove("log", "one").set("status", "done");
    await metadata.flush();
    print({ current: metadata.current() });
  });
}
