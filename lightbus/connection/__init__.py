"""A connection to a broker: its address, how it is dialled, what its errors mean, and the thread that owns it.

Imports: errors, `lightbus.wire`, `lightbus.transport`.
"""
