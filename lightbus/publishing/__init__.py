"""Publishing: many callers, one connection, one window of unconfirmed messages.

Imports: `lightbus.connection`, `lightbus.wire`, `lightbus.transport`, and the top-level values.
"""
