// The tasks are Python functions (examples/fastapi_app/app.py). For the hooks, these types replace
// `import type { chat } from "../trigger/chat"`.
import type { Task } from "@trigger.dev/sdk";

export type Chat = Task<"chat", { text: string }, { text: string }>;
export type Publish = Task<"publish", { text: string }, { published: boolean }>;

/** A chunk in the stream of a chat, as the API of the language model sent it. */
export type Chunk = { choices: { delta: { content?: string | null } }[] };
