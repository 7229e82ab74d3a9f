// Reads AsyncAPI documents (files, one for each argument) with the official parser, and prints for each a JSON line:
// its diagnostics, and what the parser has understood.

import { readFile } from "node:fs/promises";

import { Parser } from "@asyncapi/parser";

const parser = new Parser();
for (const file of process.argv.slice(2)) {
  const { document, diagnostics } = await parser.parse(await readFile(file, "utf8"));
  const found = {
    diagnostics: diagnostics.map(({ code, severity, message, path }) => ({ code, severity, message, path })),
    version: document?.version(),
    operations: document?.operations().all().map((one) => ({
      id: one.id(),
      action: one.action(),
      channels: one.channels().all().map((channel) => ({
        address: channel.address(),
        exchange: channel.bindings().get("amqp")?.json().exchange.name,
      })),
      messages: one.messages().all().map((message) => ({
        name: message.name(),
        fields: Object.keys(message.payload()?.properties() ?? {}),
        headers: Object.keys(message.headers()?.properties() ?? {}),
      })),
    })),
  };
  console.log(JSON.stringify(found));
}
