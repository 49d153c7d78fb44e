"""The engine process: `python -m phloem.shared.engine.main --fd N`, started by a worker's front."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys

from phloem.shared.engine.config import EngineConfig
from phloem.shared.engine.engine_socket import EngineSocket
from phloem.shared.engine.punctuality import ask_for_punctual_threads
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.engine import EngineFailed, Progress
from phloem.shared.telemetry.logs import setup_logging

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="phloem-engine")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the front")
    socket = EngineSocket(parser.parse_args(argv).fd)
    config = socket.read_config()
    setup_logging(f"engine {config.worker_id}", config.logs)
    try:
        _serve(config, socket)
    except PhloemError as error:
        _report_failure(socket, error.info)
        return 1
    except OSError as error:
        log.warning("the front is gone: %s", error)
        return 1
    except Exception as error:
        log.exception("the engine failed")
        _report_failure(socket, ErrorInfo("engine_failed", f"{type(error).__name__}: {error}"))
        return 1
    finally:
        socket.close()
    return 0


def _serve(config: EngineConfig, socket: EngineSocket) -> None:
    ask_for_punctual_threads()
    # torch's own NCCL watchdog must not end the process; it reads these when the first group is made.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    socket.send(Progress("imports", 0, 1))
    from phloem.shared.engine.assembly import build_engine  # torch comes in here, with progress shown

    socket.send(Progress("imports", 1, 1))
    engine, ready, endpoint = build_engine(config, socket.send)
    gc.collect()
    gc.freeze()  # torch's and the model's objects stay: a full collection took 66 ms of a step with them
    try:
        socket.start_reading(engine.deliver)
        socket.send(ready)
        engine.run()
    finally:
        endpoint.close()


def _report_failure(socket: EngineSocket, error: ErrorInfo) -> None:
    log.error("%s", error.message)
    try:
        socket.send(EngineFailed(error))
    except OSError:
        log.warning("the front is gone and can't be told")


if __name__ == "__main__":
    sys.exit(main())
