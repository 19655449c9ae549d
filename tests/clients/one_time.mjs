// Uses a one-time trigger token `times` times: sequentially, or all at once.

import { auth, tasks } from "@trigger.dev/sdk";

export default async function ({ given, print, tried }) {
  const token = given.minted ?? (await auth.createTriggerPublicToken(given.task));

  async function use(number) {
    await tried(async () => {
      const trigger = () => tasks.trigger(given.task, number, given.options);
      print({ handle: { ...(await auth.withAuth({ accessToken: token }, trigger)) } });
    });
  }

  const numbers = Array.from({ length: given.times }, (_, number) => number);
  if (given.together) await Promise.all(numbers.map(use));
  else for (const number of numbers) await use(number);
}
