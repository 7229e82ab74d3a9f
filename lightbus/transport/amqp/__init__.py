"""RabbitMQ: a kombu transport over py-amqp that reads and writes frames in batches.

Imports: version, errors and the port (`lightbus.transport`).
"""
