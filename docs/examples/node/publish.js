// Publishes an event. Try it: node publish.js amqp://guest:guest@localhost:5672/ 3 someone@example.com
import { randomUUID } from "node:crypto";
import amqp from "amqplib";

const [url, userId, email] = process.argv.slice(2);
const app = "web"; // the publishing application

const connection = await amqp.connect(url, { timeout: 5000 });
try {
  const channel = await connection.createConfirmChannel();
  channel.on("return", () => console.log("Not routed: no queue is bound for it."));

  // The exchange of this application, bound to the bus. Lightbus declares the same objects with the same arguments.
  await channel.assertExchange("lightbus", "topic", { durable: true, internal: true });
  await channel.assertExchange(app, "topic", { durable: true });
  await channel.bindExchange("lightbus", app, "#");

  const body = Buffer.from(JSON.stringify({ user_id: Number(userId), email }));
  channel.publish(app, "user.registered", body, {
    persistent: true,
    mandatory: true,
    contentType: "application/json",
    messageId: randomUUID(), // subscribers detect duplicates by it
    timestamp: Math.floor(Date.now() / 1000),
  });
  await channel.waitForConfirms(); // rejects if the broker refused; after this, the event is stored
  console.log("Confirmed.");
} finally {
  await connection.close();
}
