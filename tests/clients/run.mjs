// Runs the programs of this folder. `node run.mjs read '{"baseURL": "…", "token": "…", "run": "run_…"}'` runs one. It reads
// messages from standard input and prints its output, one JSON value per line. Without arguments any number of programs
// share the process, so that tests do not load the packages each time: input lines are [number, "start", name, given] or
// [number, "send", message], and output lines start with the number.

import { createInterface } from "node:readline";
import { auth, configure } from "@trigger.dev/sdk";

function write(line) {
  process.stdout.write(JSON.stringify(plain(line)) + "\n");
}

// As JSON, but a Date differs from its text, and undefined from null.
function plain(value) {
  if (value instanceof Date) return { $date: value.toISOString() };
  if (value instanceof Map) return { $map: [...value].map(plain) };
  if (value instanceof Set) return { $set: [...value].map(plain) };
  if (value instanceof Error) return { name: value.name, message: value.message, status: value.status };
  if (typeof value === "bigint") return { $bigint: String(value) };
  if (Array.isArray(value)) return value.map(plain);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, plain(item)]));
}

// What a program uses: the values it was given, `print`, `receive` for the next message, and `tried`, which prints errors.
class Program {
  #messages = [];
  #waiting = [];

  constructor(given, print) {
    this.given = given;
    this.print = print;
  }

  receive = () => new Promise((resolve) => {
    this.#waiting.push(resolve);
    this.#match();
  });

  tried = async (what) => {
    try {
      return await what();
    } catch (error) {
      this.print({ error });
    }
  };

  send(message) {
    this.#messages.push(message);
    this.#match();
  }

  #match() {
    while (this.#messages.length > 0 && this.#waiting.length > 0) this.#waiting.shift()(this.#messages.shift());
  }
}

async function start(name, program) {
  const { default: run } = await import(`./${name}.mjs`);
  await run(program);
}

const lines = createInterface({ input: process.stdin });
const [name, text] = process.argv.slice(2);

if (name) {
  const given = JSON.parse(text);
  configure({ baseURL: given.baseURL, accessToken: given.token, secretKey: given.secretKey });
  const program = new Program(given, write);
  lines.on("line", (line) => program.send(JSON.parse(line)));
  await start(name, program);
  lines.close(); // nothing else must keep the process alive
  process.stdin.destroy();
} else {
  const programs = new Map();
  lines.on("line", (line) => {
    const [number, action, what, given] = JSON.parse(line);
    if (action === "send") return programs.get(number).send(what);
    const program = new Program(given, (line) => write([number, line]));
    programs.set(number, program);
    const { baseURL, token, secretKey } = given;
    auth
      .withAuth({ baseURL, accessToken: token ?? secretKey }, () => start(what, program))
      .then(() => write([number, null]));
  });
}
