#!/bin/sh
# Publishes an event without Lightbus. Try it:
#   sh publish.sh amqp://guest:guest@localhost:5672/ '{"user_id": 3, "email": "someone@example.com"}'
# amqp-publish is in Debian's package amqp-tools. Unlike `lightbus publish`, it does not wait for a confirm.
exec amqp-publish --url="$1" --exchange=auth --routing-key=user.registered --persistent \
  --content-type=application/json --body="$2"
