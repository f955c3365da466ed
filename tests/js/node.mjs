// In Node: orders come as lines of JSON on stdin, reports go as lines to stdout. Arguments: the module of the client,
// and that of a WebSocket for Node before 22.
import { createInterface } from "node:readline";
import { drive } from "./driver.mjs";

const [client, ws] = process.argv.slice(2);
const report = (what) => process.stdout.write(JSON.stringify(what) + "\n");

process.on("unhandledRejection", (error) => report({ event: "unhandled", ctx: { message: String(error?.message ?? error) } }));

const order = drive(await import(client), report, (await import(ws)).WebSocket);
for await (const line of createInterface({ input: process.stdin })) order(JSON.parse(line));
process.exit();
