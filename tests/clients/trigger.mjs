// Triggers a task, then uses only the token of the handle, as a browser that received the handle does.

import { auth, runs, streams, tasks } from "@trigger.dev/sdk";

// Values without a JSON form. They must return with their types.
const rich = { when: new Date("2026-01-02T03:04:05.678Z"), tags: new Set(["a", "b"]), big: 2n ** 70n };

export default async function ({ given, print, tried }) {
  const payload = given.rich ? rich : given.payload;

  await tried(async () => {
    const handle = await tasks.trigger(given.task, payload, given.options);
    print({ handle: { ...handle } });
    await auth.withAuth({ accessToken: handle.publicAccessToken }, async () => {
      for (const { input, data } of given.send ?? []) await streams.input({ id: input }).send(handle.id, data);
      for await (const run of runs.subscribeToRun(handle)) print({ run });
      print({ retrieved: await runs.retrieve(handle) });
      const chunks = [];
      for await (const chunk of await streams.read(handle.id)) chunks.push(chunk);
      print({ chunks });
    });
  });
}
