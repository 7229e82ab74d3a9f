"""The embedded broker: the AMQP model in an SQLite file, which several processes share.

Imports: version, errors, pattern and the port (`lightbus.transport`).
"""
