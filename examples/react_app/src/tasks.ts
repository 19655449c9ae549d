// The tasks are Python functions now (examples/fastapi_app/app.py). For the hooks these types stand in for
// `import type { chat } from "../trigger/chat"`.
import type { Task } from "@trigger.dev/sdk";

export type Chat = Task<"chat", { text: string }, { text: string }>;
export type Publish = Task<"publish", { text: string }, { published: boolean }>;

/** What the stream of a chat carries: the chunks of the language model, as its API sent them. */
export type Chunk = { choices: { delta: { content?: string | null } }[] };
