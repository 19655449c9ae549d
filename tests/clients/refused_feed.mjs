// Follows runs with tokens that the server rejects sooner or later, and one run with a valid token. In Node the package
// neither ends a rejected feed nor throws.

import { auth, runs } from "@trigger.dev/sdk";

export default async function ({ given, print }) {
  async function follow(run) {
    try {
      for await (const shown of runs.subscribeToRun(run)) print({ refused: shown });
      print({ refused: "end" });
    } catch (error) {
      print({ refused: error });
    }
  }

  for (const [run, token] of given.refused) auth.withAuth({ accessToken: token }, () => follow(run));
  for await (const run of runs.subscribeToRun(given.run)) print({ run });
}
