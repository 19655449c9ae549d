// Sends data into a run.

import { streams } from "@trigger.dev/sdk";

export default async function ({ given, print, tried }) {
  const input = streams.input({ id: given.input });
  for (const data of given.data) await tried(async () => print({ sent: (await input.send(given.run, data)) ?? null }));
}
