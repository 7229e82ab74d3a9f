"""ActiveMQ Artemis over AMQP 1.0, with qpid-proton's engine.

Imports: version, errors, pattern and the port (`lightbus.transport`).
"""
