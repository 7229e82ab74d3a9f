#!/bin/sh
# Says that a user has registered. Try it:
#   sh publish.sh amqp://guest:guest@localhost:5672/ '{"user_id": 3, "email": "someone@example.com"}'
# amqp-publish is in Debian's package amqp-tools. It waits for no confirm; `lightbus publish` does.
exec amqp-publish --url="$1" --exchange=auth --routing-key=user.registered --persistent \
  --content-type=application/json --body="$2"
