"""A connection to a broker: its address, how to connect, what errors mean, and the thread that owns it.

Imports: errors, `lightbus.wire`, `lightbus.transport`.
"""
