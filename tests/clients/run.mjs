// Runs the programs of this folder. `node run.mjs read '{"baseURL": "…", "token": "…", "run": "run_…"}'` runs one, which
// is told things by lines of JSON on standard input and prints one JSON object a line. Without arguments it runs any
// number at once, for tests that would otherwise wait for the packages to load each time: each line is then
// [number, "start", name, given] or [number, "tell", what], and each that it prints begins with the number.

import { createInterface } from "node:readline";
import { auth, configure } from "@trigger.dev/sdk";

function write(line) {
  process.stdout.write(JSON.stringify(plain(line)) + "\n");
}

// As JSON, but so that a Date is told from its text, and absent from null.
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

// What a program has: what it was given, `print`, `told` for the next thing that it is told, and `tried`, which prints
// what was thrown.
class Program {
  #things = [];
  #waiting = [];

  constructor(given, print) {
    this.given = given;
    this.print = print;
  }

  told = () => new Promise((resolve) => {
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

  tell(thing) {
    this.#things.push(thing);
    this.#match();
  }

  #match() {
    while (this.#things.length > 0 && this.#waiting.length > 0) this.#waiting.shift()(this.#things.shift());
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
  lines.on("line", (line) => program.tell(JSON.parse(line)));
  await start(name, program);
  lines.close(); // nothing else should keep the process
  process.stdin.destroy();
} else {
  const programs = new Map();
  lines.on("line", (line) => {
    const [number, action, what, given] = JSON.parse(line);
    if (action === "tell") return programs.get(number).tell(what);
    const program = new Program(given, (said) => write([number, said]));
    programs.set(number, program);
    const { baseURL, token, secretKey } = given;
    auth
      .withAuth({ baseURL, accessToken: token ?? secretKey }, () => start(what, program))
      .then(() => write([number, null]));
  });
}
