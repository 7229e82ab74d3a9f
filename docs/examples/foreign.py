"""Publishes an event with pika, without Lightbus. Try it: python foreign.py amqp://guest:guest@localhost:5672/"""

import sys

import pika

with pika.BlockingConnection(pika.URLParameters(sys.argv[1])) as connection:
    channel = connection.channel()
    channel.basic_publish("auth", "user.registered", b'{"user_id": 3, "email": "another@example.com"}')
