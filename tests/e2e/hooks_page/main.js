// One of the official hooks, with the arguments that the test gives. What it returns is `hook`, and the text of the page.
import * as hooks from "@trigger.dev/react-hooks";
import { createElement, StrictMode } from "react";
import { createRoot } from "react-dom/client";

const { name, args } = JSON.parse(new URLSearchParams(location.search).get("use"));

window.calls = [];
if (args.at(-1)?.onComplete) args.at(-1).onComplete = (run) => calls.push(run.status);

const plain = (_, value) => (value instanceof Error ? { message: value.message, status: value.status } : value);

function Probe() {
  window.hook = hooks[name](...args);
  return createElement("pre", null, JSON.stringify(window.hook, plain));
}

createRoot(document.getElementById("root")).render(createElement(StrictMode, null, createElement(Probe)));
