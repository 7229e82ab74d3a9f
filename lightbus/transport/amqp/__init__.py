"""AMQP 0-9-1 over a socket: kombu's transport, with frames that are read and written in batches.

Imports: errors and the port (`lightbus.transport`).
"""
