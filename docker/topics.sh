#!/bin/sh
# Creates the topics that docs/events.md names, unless they are there: sh topics.sh BOOTSTRAP_SERVER
set -eu
create() {
    /opt/kafka/bin/kafka-topics.sh --bootstrap-server "$server" --create --if-not-exists \
        --topic "$1" --partitions "$2" --replication-factor 1
}
server=$1
for topic in create-user update-user delete-user; do
    create "$topic" 8
    create "$topic.dlq" 1
done
create segment-events 1
