"""Proofs on a pair of GPUs (or CPU processes): equal tokens, damage that is noticed, peers that are killed.

    python benchmarks/check_pair.py equality [--requests 200] [--longest 16000] [--device cuda] [--gpus 0,1]
    python benchmarks/check_pair.py damage
    python benchmarks/check_pair.py kills [--count 50] [--stop 4]

Every command drives whole engine processes as a worker's front does. The model is random, float32, with
peaky attention: small enough to start in seconds, exact enough that two ways to the same token differ only
where something is wrong (`phloem.shared.transfer_bench.equality` says why not bfloat16). Exits with 1 when a
proof fails.

kills: a survivor keeps its peers for so many losses in mid-transfer, SIGKILL but for `--stop` SIGSTOPs; one
half is survived by a decode engine, the other by a prefill engine. The next request starts with the signal,
on a peer that lives on and has ordinary staging slots (who is killed has small ones, so that a transfer has a
middle). Bars: it gives a token within 2 s; tokens are right; audits are clean; memory does not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from phloem.cli.up.devices import count_gpus
from phloem.shared.bench.bars import Bar, all_met, bar_lines
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.fault_injection import Faults
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.cluster import Role
from phloem.shared.protocol.session import SamplingParams
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.equality import compare, explain, make_questions
from phloem.shared.transfer_bench.lab import Lab, hand_over, open_lab, prove_channel, whole
from phloem.shared.transfer_bench.losses import Loss, LossPlan, LossRun
from phloem.shared.transfer_bench.memory import gpu_used_mib, growth_mib, resident_mib
from phloem.shared.transfer_bench.models import ModelShape, write_model, write_weights

VOCABULARY: dict[ModelShape, int] = {"exact": 512, "tiny": 256}
MAX_NEXT_REQUEST_S = 2.0
MAX_GROWTH_MIB = 64.0
TRANSFER_TIMEOUT_S = 2.0
# A layer of a page has 64 KiB: small slots make a transfer last long enough to be interrupted.
_SLOW_STAGING = ((131_072, 1), (2**20, 1))


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """Where the engines run; `gpus` of the prefill and the decode side, or None for CPUs."""

    shape: ModelShape
    gpus: tuple[int, int] | None
    options: EngineOptions

    @property
    def vocabulary(self) -> int:
        return VOCABULARY[self.shape]

    def gpu(self, role: Role) -> int | None:
        """A unified engine sits beside the decode engine."""
        return None if self.gpus is None else self.gpus[role != "prefill"]


def make_setting(device: str, gpus: str, folder: Path) -> Setting:
    cuda = device == "cuda" or (device == "auto" and count_gpus(os.environ) >= 2)
    first, second = (int(number) for number in gpus.split(","))
    shape: ModelShape = "exact" if cuda else "tiny"
    model = write_weights(write_model(shape, folder / "model"))
    options = EngineOptions(
        model_path=str(model),
        dtype="float32",
        num_threads=4 if cuda else 1,
        max_total_tokens=131_072 if cuda else 16_384,
        max_running_requests=32,
        cuda_graph_max_bs=16,
        transfer_timeout_s=TRANSFER_TIMEOUT_S,
    )
    return Setting(shape=shape, gpus=(first, second) if cuda else None, options=options)


# -- equality ----------------------------------------------------------------------------------------------


async def equality(setting: Setting, lab: Lab, arguments: argparse.Namespace) -> list[Bar]:
    prefill, decode, unified = await asyncio.gather(
        lab.start("prefill", setting.gpu("prefill")),
        lab.start("decode", setting.gpu("decode")),
        lab.start("unified", setting.gpu("unified")),
    )
    await prefill.peer_up(decode)
    questions = make_questions(
        arguments.requests,
        longest_prompt=arguments.longest,
        most_tokens=arguments.tokens,
        vocabulary=setting.vocabulary,
        seed=arguments.seed,
    )
    report = await compare([prefill], [decode], unified, questions)
    print("\n".join(explain(report)))
    return [
        Bar("requests whose tokens differ from the unified worker's", len(report.differing), "", 0),
        Bar("requests that failed", len(report.failed), "", 0),
        Bar("requests compared to the end", report.num_complete, "", 0.5 * len(questions), ">="),
    ]


# -- damage ------------------------------------------------------------------------------------------------


async def damage(setting: Setting, lab: Lab, arguments: argparse.Namespace) -> list[Bar]:
    """A byte of every third piece is altered in the decode side's staging slot."""
    count = arguments.requests
    faults = Faults(corrupt_pieces=tuple(range(4, 100_000, 3)))
    prefill, decode = await asyncio.gather(
        lab.start("prefill", setting.gpu("prefill")),
        lab.start("decode", setting.gpu("decode"), faults=faults),
    )
    await prefill.peer_up(decode)
    await prove_channel(prefill, decode, "first")
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    refused = right = wrong = 0
    for index in range(count):
        prompt = [(7 * index + n * n) % setting.vocabulary for n in range(64 + 16 * index)]
        expected = await whole(prefill, f"alone-{index}", prompt, sampling)
        pair = await hand_over(prefill, decode, f"damaged-{index}", prompt, sampling)
        await pair.until_end()
        refused += pair.decode.error is not None and pair.decode.error.code == "kv_digest_mismatch"
        right += pair.is_complete and pair.token_ids == expected
        wrong += pair.token_ids != expected[: len(pair.token_ids)]
    for engine in (prefill, decode):
        await engine.audit_idle()
    return [
        Bar("damaged hand-overs refused for their digest", refused, "", 1, ">="),
        Bar("undamaged hand-overs with the right tokens", right, "", 1, ">="),
        Bar("hand-overs neither refused nor right", count - refused - right, "", 0),
        Bar("hand-overs with a wrong token", wrong, "", 0),
    ]


# -- kills -------------------------------------------------------------------------------------------------


async def kills(setting: Setting, lab: Lab, arguments: argparse.Namespace) -> list[Bar]:
    losses: list[Loss] = []
    growths: list[float] = []
    half, stops = arguments.count // 2, arguments.stop // 2
    rounds: list[tuple[Role, signal.Signals, int]] = [
        ("decode", signal.SIGKILL, arguments.count - half),
        ("prefill", signal.SIGKILL, half),
        ("decode", signal.SIGSTOP, arguments.stop - stops),
        ("prefill", signal.SIGSTOP, stops),
    ]
    for survivor, how, count in rounds:
        if count:
            print(f"{count} x {how.name}, a {survivor} engine survives", flush=True)
            found = await LossRun(
                lab, _loss_plan(setting, survivor, how, count), _memory_of(setting, survivor), _tell
            ).run()
            await lab.close()
            losses += found
            growths.append(growth_mib([loss.memory_mib for loss in found]))
    return _loss_bars(losses, growths)


def _loss_plan(setting: Setting, survivor: Role, how: signal.Signals, count: int) -> LossPlan:
    peer: Role = "prefill" if survivor == "decode" else "decode"
    cuda = setting.gpus is not None
    return LossPlan(
        count=count,
        survivor=survivor,
        how=how,
        prompt_tokens=12_000 if cuda else 1000,
        vocabulary=setting.vocabulary,
        survivor_gpu=setting.gpu(survivor),
        peer_gpu=setting.gpu(peer),
        staging=_SLOW_STAGING if cuda else ((65_536, 1),),
        noticed_within_s=2.0 if how == signal.SIGKILL else TRANSFER_TIMEOUT_S + 1.5,
        num_spares=6 if cuda else 2,
    )


def _memory_of(setting: Setting, survivor: Role) -> Callable[[EngineClient], float]:
    """Of the survivor's whole GPU: nobody else is on it."""
    gpu = setting.gpu(survivor)
    return (lambda engine: resident_mib(engine.pid)) if gpu is None else (lambda engine: gpu_used_mib(gpu))


def _loss_bars(losses: list[Loss], growths: list[float]) -> list[Bar]:
    nan = float("nan")
    return [
        Bar("peers lost in mid-transfer, all answered rightly, audits clean", len(losses)),
        Bar(
            "next request's first token at the survivor, slowest",
            max((loss.next_request_s for loss in losses), default=nan),
            "s",
            MAX_NEXT_REQUEST_S,
        ),
        Bar(
            "loss noticed by the survivor, slowest",
            max((loss.noticed_s for loss in losses), default=nan),
            "s",
        ),
        Bar("survivor's memory, growth over a run", max(growths, default=nan), "MiB", MAX_GROWTH_MIB),
    ]


def _tell(text: str) -> None:
    print(f"  {text}", flush=True)


# ----------------------------------------------------------------------------------------------------------

Proof = Callable[[Setting, Lab, argparse.Namespace], Awaitable[list[Bar]]]
PROOFS: dict[str, Proof] = {"equality": equality, "damage": damage, "kills": kills}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("proof", choices=PROOFS)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--gpus", default="0,1", help="of the prefill and the decode side")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--longest", type=int, default=16_000, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=50, help="kills")
    parser.add_argument("--stop", type=int, default=4, help="of peers that freeze instead")
    parser.add_argument("--output", type=Path, help="write the bars as JSON")
    return parser.parse_args(argv)


async def prove(arguments: argparse.Namespace, folder: Path) -> list[Bar]:
    setting = make_setting(arguments.device, arguments.gpus, folder)
    async with open_lab(setting.options, folder) as lab:
        return await PROOFS[arguments.proof](setting, lab, arguments)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="phloem-check-") as name:
        try:
            bars = asyncio.run(prove(arguments, Path(name)))
        except PhloemError as error:
            print_logs(Path(name))
            print(f"{arguments.proof} FAILED: {error}")
            return 1
    print("\n".join(bar_lines(bars)))
    print(f"{arguments.proof}: {time.monotonic() - began_s:.0f} s")
    if arguments.output is not None:
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(bars)))
    return 0 if all_met(bars) else 1


def print_logs(folder: Path) -> None:
    """The ends of the engines' logs, without what every start says."""
    for path in sorted(folder.glob("*.log")):
        lines = [line for line in path.read_text(errors="replace").splitlines() if " info " not in line]
        print(f"== {path.name}", *lines[-6:], sep="\n")


if __name__ == "__main__":
    sys.exit(main())
