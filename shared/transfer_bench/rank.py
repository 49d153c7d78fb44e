"""One rank of the bandwidth measurement: `python -m phloem.shared.transfer_bench.rank --fd N`."""

from __future__ import annotations

import argparse
import socket
from multiprocessing.connection import Connection

import torch

from phloem.shared.engine.punctuality import ask_for_punctual_threads
from phloem.shared.errors import PhloemError
from phloem.shared.process_end import end_process
from phloem.shared.transfer.config import MAX_CTAS, TransferConfig, opening_bound_s
from phloem.shared.transfer.link_terms import link_terms
from phloem.shared.transfer.planes import PlaneSpec
from phloem.shared.transfer_bench.paged import DECODE, PREFILL, PagedSide, ReceivingSide, SendingSide
from phloem.shared.transfer_bench.rank_protocol import (
    CheckContent,
    Content,
    Joined,
    Listening,
    PagesRun,
    RankFailed,
    RankSetup,
    RankUp,
    RawRun,
    Times,
    rank_down,
    rank_up,
)
from phloem.shared.transfer_bench.raw_link import RawLink

HOST = "127.0.0.1"
_SECRET = b"phloem transfer bench"


class Rank:
    """Does what it is told until the pipe closes."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def serve(self) -> None:
        """Raises `PhloemError` when the other rank fails, `EOFError` when there is nothing more to do."""
        setup = rank_down.decode(self._pipe.recv_bytes())
        assert isinstance(setup, RankSetup)
        paged, raw = self._join(setup)
        try:
            while True:
                match rank_down.decode(self._pipe.recv_bytes()):
                    case RawRun(num_bytes, count, ahead):
                        self._say(Times(raw.run(num_bytes, count, ahead=ahead)))
                    case PagesRun() as work:
                        self._say(Times(paged.run(work)))
                    case CheckContent():
                        self._say(Content(paged.content()))
                    case RankSetup():
                        raise PhloemError("bad_message", "a rank is set up once")
        finally:
            raw.close()
            paged.close()

    def say_failed(self, error: PhloemError) -> None:
        self._say(RankFailed(error.info))

    def _join(self, setup: RankSetup) -> tuple[PagedSide, RawLink]:
        config = _transfer_config(setup)
        if setup.device != "cpu":
            torch.cuda.set_device(torch.device(setup.device))
        side = SendingSide if setup.side == "prefill" else ReceivingSide
        paged = side(config, setup.shape, setup.pool_pages)
        sock = self._meet(setup, paged)
        buffer = torch.ones(setup.message_bytes, dtype=torch.uint8, device=setup.device)
        raw = RawLink(sock, _plane_spec(setup, config), buffer)
        if setup.side == "prefill":
            paged.endpoint.peer_up(DECODE, setup.transfer_address)
        paged.wait_open()
        self._say(
            Joined(
                page_bytes=paged.store.layer_page_bytes * paged.store.num_layers,
                device_name="cpu" if setup.device == "cpu" else torch.cuda.get_device_name(setup.device),
                staging_bytes=config.staging_bytes,
                staging_slots=config.staging_slots,
                max_ctas=config.max_ctas,
            )
        )
        return paged, raw

    def _meet(self, setup: RankSetup, paged: PagedSide) -> socket.socket:
        """The connection of the raw group: decode listens, prefill dials."""
        if setup.side == "prefill":
            return socket.create_connection((HOST, setup.raw_port), setup.timeout_s)
        with socket.create_server((HOST, 0)) as server:
            server.settimeout(setup.timeout_s)
            self._say(Listening(paged.endpoint.address, server.getsockname()[1]))
            return server.accept()[0]

    def _say(self, message: RankUp) -> None:
        self._pipe.send_bytes(rank_up.encode(message))


def _transfer_config(setup: RankSetup) -> TransferConfig:
    """What the command left open is the product's default."""
    chosen = {
        name: value
        for name in ("staging_bytes", "staging_slots", "max_ctas")
        if (value := getattr(setup, name))
    }
    return TransferConfig(
        me=PREFILL if setup.side == "prefill" else DECODE,
        host=HOST,
        cluster_secret=_SECRET,
        kv_layout=repr(setup.shape),
        device=setup.device,
        link=link_terms(setup.device, chosen.get("max_ctas", MAX_CTAS)),
        timeout_s=setup.timeout_s,
        opening_timeout_s=opening_bound_s(setup.timeout_s),
        accepts=setup.side == "decode",
        **chosen,
    )


def _plane_spec(setup: RankSetup, config: TransferConfig) -> PlaneSpec:
    """The raw group is bounded like the channel's."""
    return PlaneSpec(
        host=HOST,
        side=setup.side,
        device=setup.device,
        timeout_s=setup.timeout_s,
        opening_timeout_s=opening_bound_s(setup.timeout_s),
        max_ctas=config.max_ctas,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="phloem-transfer-rank")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the command")
    rank = Rank(Connection(parser.parse_args(argv).fd))
    ask_for_punctual_threads()  # as an engine does
    try:
        rank.serve()
    except EOFError:
        return 0
    except PhloemError as error:
        rank.say_failed(error)
        return 1
    return 0


if __name__ == "__main__":
    end_process(main())
