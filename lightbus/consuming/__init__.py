"""Consuming: the connection that subscribes, the dispatcher that runs handlers, and what each of them decides with.

Imports: `lightbus.publishing` (for copies of failed events), `connection`, `wire`, `transport`.
"""
