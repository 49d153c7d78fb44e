#!/usr/bin/env bash
# What a newcomer does, from a fresh clone of HEAD: `make up`, an answer through the official openai client,
# Ctrl-C, `make up` again. Own venv, home and model cache, so that nothing of this checkout helps; pip's download
# cache is shared. Takes minutes: torch is large. Needs a package index and 3 GB in $TMPDIR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
cache=$(python3 -m pip cache dir 2>/dev/null || true)
work=$(mktemp -d)
up=""
find_up() { pgrep -o -f "^$work/phloem/.venv/bin/python[0-9.]* .*/phloem up"; }
cleanup() {  # killed, it takes its children along
    if [ -n "$up" ]; then find_up | xargs -r kill -KILL; fi
    rm -rf "$work"
}
trap cleanup EXIT
say() { printf '[%4d s] %s\n' "$SECONDS" "$1"; }
fail() { say "FAILED: $1"; tail -n 30 "$work/up.log" >&2; exit 1; }

git clone -q . "$work/phloem"
cd "$work/phloem"
export HOME=$work/home
mkdir "$HOME"
if [ -n "$cache" ]; then export PIP_CACHE_DIR=$cache; fi
say "cloned $(git rev-parse --short HEAD)"

start() {  # starts `make up` and waits until it has answered
    make up ARGS="--port $port" > "$work/up.log" 2>&1 &
    up=$!
    for _ in $(seq 9000); do
        if grep -q "Ctrl-C stops the cluster" "$work/up.log"; then return; fi
        kill -0 "$up" 2>/dev/null || fail "make up ended by itself"
        sleep 0.1
    done
    fail "make up was not ready after 15 minutes"
}

stop() {  # as a Ctrl-C on phloem itself; make passes its exit code on
    local phloem
    phloem=$(find_up) || fail "no phloem up to stop"
    kill -INT "$phloem"
    wait "$up" || fail "make up ended with $?"
    up=""
    if pgrep -f "$work/phloem/.venv" > /dev/null; then fail "processes are left"; fi
}

began=$SECONDS
start
say "make up is ready ($((SECONDS - began)) s)"
grep -q "Paris" "$work/up.log" || fail "up's own question was not answered with Paris"
.venv/bin/python -m pip install -q --disable-pip-version-check openai
.venv/bin/python - "$port" <<'PY' || fail "the openai client did not get Paris"
import sys

from openai import OpenAI

client = OpenAI(base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", api_key="unused")
stream = client.chat.completions.create(
    model="smollm2-135m-instruct",
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    stream=True,
)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
print(text)
sys.exit("Paris" not in text)
PY
say "the openai client got a streamed answer"
stop
say "stopped, nothing is left"
began=$SECONDS
start
say "make up again is ready ($((SECONDS - began)) s)"
stop
[ -z "$(git status --porcelain)" ] || fail "the clone is not clean: $(git status --porcelain | head -n 3)"
say "passed"
