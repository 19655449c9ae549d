// Uses tokens that the server rejects: reads a stream, retrieves a run, triggers a task.

import { auth, runs, streams, tasks } from "@trigger.dev/sdk";

export default async function ({ given, print, tried }) {
  for (const [name, token] of Object.entries(given.tokens)) {
    print({ token: name });
    await auth.withAuth({ accessToken: token }, async () => {
      await tried(async () => {
        for await (const chunk of await streams.read(given.run)) print({ leaked: chunk });
      });
      await tried(async () => print({ leaked: await runs.retrieve(given.run) }));
      await tried(async () => print({ leaked: await tasks.trigger(given.task, 1) }));
    });
  }
}
