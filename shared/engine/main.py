"""The engine process: `python -m phloem.shared.engine.main --fd N`, started by a worker's front."""

from __future__ import annotations

import argparse
import gc
import logging
import os

from phloem.shared.engine.config import EngineConfig
from phloem.shared.engine.engine_socket import EngineSocket
from phloem.shared.engine.punctuality import ask_for_punctual_threads
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.process_end import end_process
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
        return _serve(config, socket)
    except OSError as error:
        log.warning("the front is gone: %s", error)
        return 1
    except Exception as error:
        return _fail(socket, error)
    finally:
        socket.close()


def _serve(config: EngineConfig, socket: EngineSocket) -> int:
    """Until the engine stops; returns the process's exit code."""
    ask_for_punctual_threads()
    # Each channel has several streams. Beyond this number they share queues of the device, and one that waits
    # for a peer that hangs would hold up what is behind it in its queue: steps, or another peer's bytes.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
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
        return 0
    except OSError:
        raise
    except Exception as error:
        return _fail(socket, error)  # told first: a device that hangs may hold up the endpoint's end
    finally:
        endpoint.close()


def _fail(socket: EngineSocket, error: Exception) -> int:
    """Logs the error and tells the front; returns the exit code."""
    if isinstance(error, PhloemError):
        info = error.info
        log.error("%s", error)
    else:
        info = ErrorInfo("engine_failed", f"{type(error).__name__}: {error}")
        log.error("the engine failed", exc_info=error)
    try:
        socket.send(EngineFailed(info))
    except OSError:
        log.warning("the front is gone and can't be told")
    return 1


if __name__ == "__main__":
    end_process(main())
