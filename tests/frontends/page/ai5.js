import { useChat } from "@ai-sdk/react-5";
import { DefaultChatTransport } from "ai-5";

import { show } from "./chat.js";

show(useChat, DefaultChatTransport);
