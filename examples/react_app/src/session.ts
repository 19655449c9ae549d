// The app's own backend. It knows who the user is, and makes the tokens: read the runs with the user's tag, trigger tasks.

export type Session = { tag: string; token: string; triggerToken: string };

export async function post<T>(path: string): Promise<T> {
  const response = await fetch(path, { method: "POST" });
  if (!response.ok) throw new Error(`${path} answered ${response.status}`);
  return response.status === 204 ? (undefined as T) : response.json();
}

let asked: Promise<Session> | undefined; // one at a time: the first answer sets the user's cookie

export function getSession(renew = false): Promise<Session> {
  if (renew || !asked) {
    asked = post<Session>("/session");
    asked.catch(() => (asked = undefined));
  }
  return asked;
}
