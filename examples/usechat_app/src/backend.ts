// The routes of the app's own backend. Their errors are plain text for the user.

export type Chat = { id: string; title: string };

async function checked(response: Response): Promise<Response> {
  if (!response.ok) throw new Error(await response.text());
  return response;
}

export async function load<T>(path: string): Promise<T> {
  return (await checked(await fetch(path))).json();
}

export async function post(path: string, body?: object): Promise<void> {
  const headers = { "content-type": "application/json" };
  await checked(await fetch(path, { method: "POST", headers, body: body && JSON.stringify(body) }));
}

// The module that the mount serves. It is not part of the build, so it always has the version of the server.
const CLIENT = "/realtime/client.js";
export const { resumingFetch } = await import(/* @vite-ignore */ CLIENT);
