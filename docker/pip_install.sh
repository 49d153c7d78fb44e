#!/bin/sh
# Installs into /opt/phloem what the build context in /src says: from the wheels in docker/wheels when there
# are any (a build without a network), else from the package index that pip is configured for.
#   pip_install.sh dependencies [EXTRA]     what Phloem needs
#   pip_install.sh phloem                   Phloem itself, built from the sources
set -eu
if ls /src/docker/wheels/*.whl >/dev/null 2>&1; then
    # In the environment they also hold for the build of Phloem's own wheel.
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=/src/docker/wheels
fi
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
case $1 in
dependencies)
    python3 /opt/phloem/docker/requirements.py /src/pyproject.toml "${2:-}" >/tmp/requirements.txt
    pip install -r /tmp/requirements.txt
    rm /tmp/requirements.txt
    ;;
phloem)
    cp -a /src /tmp/src # the mount is read-only
    pip install --no-deps /tmp/src
    rm -rf /tmp/src
    ;;
esac
