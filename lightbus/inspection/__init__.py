"""What exists on a broker, and what is wrong with it: findings with their next step. Plain AMQP; nothing changes.

Imports: the app and what is below it.
"""
