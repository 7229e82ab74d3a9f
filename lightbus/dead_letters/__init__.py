"""Dead letters: read, filter, retry and purge them, with plain AMQP.

Imports: the app, `lightbus.connection`, `lightbus.wire`, `lightbus.transport`.
"""
