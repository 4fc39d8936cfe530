#!/bin/sh
# Creates the topics of docs/events.md, unless they exist: sh topics.sh BOOTSTRAP_SERVER
set -eu
create() {
    name=$1 partitions=$2
    shift 2
    /opt/kafka/bin/kafka-topics.sh --bootstrap-server "$server" --create --if-not-exists \
        --topic "$name" --partitions "$partitions" --replication-factor 1 "$@"
}
server=$1
for topic in create-user update-user delete-user; do
    create "$topic" 8
    # A dead letter is an event and its headers: its topic must allow larger messages than the event's topic.
    create "$topic.dlq" 1 --config max.message.bytes=67108864
done
create segment-events 1
