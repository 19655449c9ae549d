import { useChat } from "@ai-sdk/react-6";
import { DefaultChatTransport } from "ai-6";

import { show } from "./chat.js";

show(useChat, DefaultChatTransport);
