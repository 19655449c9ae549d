// The app's own backend. It identifies the user and creates tokens: to read runs with the user's tag, to trigger tasks.

export type Session = { tag: string; token: string; triggerToken: string };

export async function post<T>(path: string): Promise<T> {
  const response = await fetch(path, { method: "POST" });
  if (!response.ok) throw new Error(`${path} returned ${response.status}`);
  return response.status === 204 ? (undefined as T) : response.json();
}

let session: Promise<Session> | undefined; // one request at a time: the first response sets the user's cookie

export function getSession(renew = false): Promise<Session> {
  if (renew || !session) {
    session = post<Session>("/session");
    session.catch(() => (session = undefined));
  }
  return session;
}
