// Receives what is sent into a run, as a task does in the worker of the official package.

import { apiClientManager, inputStreams } from "@trigger.dev/core/v3";
import { StandardInputStreamManager } from "@trigger.dev/core/v3/workers";
import { streams } from "@trigger.dev/sdk";

export default async function ({ given, print }) {
  const client = apiClientManager.clientOrThrow();
  const manager = new StandardInputStreamManager(client, client.baseUrl);
  manager.setRunId(given.run, "v2");
  inputStreams.setGlobalManager(manager);

  const input = streams.input({ id: given.input });
  print({ first: await input.once().unwrap() });
  await new Promise((resolve) => {
    input.on((data) => {
      print({ data });
      if (data === "enough") resolve();
    });
  });
  manager.reset();
}
