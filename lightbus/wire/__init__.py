"""Events to wire and back, and the names of what is on the broker: pure values. Nothing here connects.

Imports: the top-level modules (event, message, errors, pattern) and the transport's port.
"""
