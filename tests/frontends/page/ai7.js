import { useChat } from "@ai-sdk/react-7";
import { DefaultChatTransport } from "ai-7";

import { show } from "./chat.js";

show(useChat, DefaultChatTransport);
