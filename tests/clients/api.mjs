// The other calls of the SDK: batches, single runs, tokens.

import { apiClientManager } from "@trigger.dev/core/v3";
import { auth, batch, idempotencyKeys, runs, streams, tasks, wait } from "@trigger.dev/sdk";

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
    batchOfTasks: async () => print({ batch: { ...(await batch.trigger(given.items)) } }),
    batchWithToken: async () => {
      const token = await auth.createBatchTriggerPublicToken(given.allowed);
      await auth.withAuth({ accessToken: token }, calls.batch);
    },
    keyed: async () => {
      const idempotencyKey = await idempotencyKeys.create(given.key, { scope: "global" });
      const trigger = () => tasks.trigger(given.task, given.payload, { idempotencyKey, idempotencyKeyTTL: "1h" });
      for (const handle of [await trigger(), await trigger()]) print({ handle: { ...handle } });
    },
    withPublicToken: () =>
      auth.withPublicToken({ scopes: { read: { runs: [given.run] } } }, async () => {
        print({ run: await runs.retrieve(given.run) });
        for await (const chunk of await streams.define({ id: given.key }).read(given.run)) print({ chunk });
      }),
    refreshed: () => {
      const refreshAccessToken = async () => {
        print({ refreshed: true });
        return given.fresh;
      };
      return auth.withAuth({ accessToken: given.stale, refreshAccessToken }, async () => {
        for await (const chunk of await streams.read(given.run)) print({ chunk });
      });
    },
    addTags: async () => print({ added: await apiClientManager.clientOrThrow().addTags(given.run, { tags: given.tags }) }),
    list: async () => print({ page: await runs.list() }),
    replay: async () => print({ replayed: await runs.replay(given.run) }),
    reschedule: async () => print({ rescheduled: await runs.reschedule(given.run, { delay: "1h" }) }),
    createToken: async () => print({ token: await wait.createToken({ timeout: "10m" }) }),
    retrieve: async () => print({ run: await runs.retrieve(given.run) }),
    poll: async () => print({ run: await runs.poll(given.run, { pollIntervalMs: 50 }) }),
    cancel: async () => print({ canceled: await runs.cancel(given.run) }),
    publicToken: async () => print({ token: await auth.createPublicToken(given.options) }),
    trigger: async () => print({ handle: { ...(await tasks.trigger(given.task, given.payload, given.options)) } }),
  };

  for (const call of given.calls) await tried(calls[call]);
}
