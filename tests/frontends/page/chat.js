// A page with `useChat`, whose return value is `chat`. The address has its options.

import { createElement } from "react";
import { createRoot } from "react-dom/client";

export async function show(useChat, DefaultChatTransport) {
  const { resuming, ...options } = JSON.parse(new URLSearchParams(location.search).get("options"));
  const client = "/realtime/client.js"; // served by the mount, so not part of the bundle
  const fetch = resuming && (await import(client)).resumingFetch();
  const transport = new DefaultChatTransport({ fetch });

  function Chat() {
    const chat = (window.chat = useChat({ ...options, transport }));
    const { messages, status, error } = chat;
    return createElement("pre", null, JSON.stringify({ messages, status, error: error?.message ?? null }));
  }

  createRoot(document.getElementById("root")).render(createElement(Chat));
}
