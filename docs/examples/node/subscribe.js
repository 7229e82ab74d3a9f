// Handles user events of all apps. Try it: node subscribe.js amqp://guest:guest@localhost:5672/
import amqp from "amqplib";

const queue = "newsletter"; // the name of the subscribing application
const connection = await amqp.connect(process.argv[2], { timeout: 5000 });
const channel = await connection.createChannel();

await channel.assertExchange("lightbus", "topic", { durable: true, internal: true });
await channel.assertQueue(`${queue}.dead`, { durable: true, arguments: { "x-queue-type": "quorum" } });
await channel.assertQueue(queue, {
  durable: true,
  arguments: {
    "x-queue-type": "quorum",
    "x-delivery-limit": 5, // then it becomes a dead letter
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": `${queue}.dead`,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
  },
});
await channel.bindQueue(queue, "lightbus", "user.*");
await channel.prefetch(100);

await channel.consume(queue, (message) => {
  if (message === null) throw new Error("The queue was deleted."); // otherwise this program would wait forever
  try {
    const event = JSON.parse(message.content);
    console.log(`${message.fields.routingKey} from ${message.fields.exchange}: ${event.email}`);
    channel.ack(message);
  } catch (error) {
    console.error(`${message.properties.messageId}: ${error.message}`);
    channel.nack(message, false, false); // to newsletter.dead
  }
});
console.log("Ready.");

process.once("SIGTERM", () => connection.close()); // unacknowledged events are redelivered
connection.on("close", (error) => process.exit(error ? 1 : 0)); // the process manager restarts it
