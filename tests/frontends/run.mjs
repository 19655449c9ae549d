// Runs the programs of this folder: `node run.mjs read '{"version": 5}'`. A program reads messages from standard input, one
// JSON value per line, and prints JSON objects. After the last message it receives undefined.

import { createInterface } from "node:readline";

const [name, given] = process.argv.slice(2);
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function receive() {
  const { value } = await lines.next();
  return value && JSON.parse(value);
}

function print(line) {
  process.stdout.write(JSON.stringify(line) + "\n");
}

const { default: run } = await import(`./${name}.mjs`);
await run({ given: JSON.parse(given), receive, print });
process.exit(); // a client may hold a connection
