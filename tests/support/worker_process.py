"""A front as a process of its own, over a fake engine. Arguments: Redis URL, model directory, worker id."""

from __future__ import annotations

import sys
from pathlib import Path

from phloem.shared.lifecycle.service import run_service
from phloem.shared.worker.front import run_worker
from tests.support.worker_front import fake_engine_command, worker_config


def main() -> int:
    redis_url, model_dir, worker_id = sys.argv[1:]
    config = worker_config(redis_url, Path(model_dir), worker_id)
    command = fake_engine_command(step_s=0.02)
    return run_service(lambda: run_worker(config, "unified", engine_command=command), service="unified")


if __name__ == "__main__":
    sys.exit(main())
