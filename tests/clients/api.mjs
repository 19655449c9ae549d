// What the SDK asks for besides: batches, runs one at a time, tokens.

import { auth, batch, runs, tasks } from "@trigger.dev/sdk";

export default async function ({ given, print, tried }) {
  const calls = {
    batch: async () => {
      const handle = await tasks.batchTrigger(given.task, given.items, given.options);
      print({ batch: { ...handle } });
      await auth.withAuth({ accessToken: handle.publicAccessToken }, async () => {
        const over = new Set();
        for await (const run of runs.subscribeToBatch(handle.batchId)) {
          print({ run });
          if (run.finishedAt) over.add(run.id);
          if (over.size === given.items.length) break;
        }
        print({ retrieved: await batch.retrieve(handle.batchId) });
      });
    },
    retrieve: async () => print({ run: await runs.retrieve(given.run) }),
    poll: async () => print({ run: await runs.poll(given.run, { pollIntervalMs: 50 }) }),
    cancel: async () => print({ canceled: await runs.cancel(given.run) }),
    publicToken: async () => print({ token: await auth.createPublicToken(given.options) }),
    trigger: async () => print({ handle: { ...(await tasks.trigger(given.task, given.payload, given.options)) } }),
  };

  for (const call of given.calls) await tried(calls[call]);
}
