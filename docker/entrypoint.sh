#!/bin/sh
# Puts the cluster's secrets, which `make_secrets.py` left in a volume, into the environment of `phloem`.
set -eu
secrets=/run/phloem
if [ -r "$secrets/redis-password" ] && [ -z "${PHLOEM_REDIS_URL:-}" ]; then
    PHLOEM_REDIS_URL="redis://:$(cat "$secrets/redis-password")@${REDIS_HOST:-redis}:6379/0"
    export PHLOEM_REDIS_URL
fi
if [ -r "$secrets/cluster-secret" ] && [ -z "${PHLOEM_CLUSTER_SECRET:-}" ]; then
    PHLOEM_CLUSTER_SECRET=$(cat "$secrets/cluster-secret")
    export PHLOEM_CLUSTER_SECRET
fi
exec "$@"
