"""Proofs on a pair of GPUs (or CPU processes): equal tokens, damage that is noticed, peers that are killed.

    python benchmarks/check_pair.py equality [--requests 200] [--longest 16000] [--device cuda] [--gpus 0,1]
    python benchmarks/check_pair.py damage
    python benchmarks/check_pair.py kills [--count 50] [--stop 4]

Every command drives whole engine processes as a worker's front does. The model is random, float32, with
peaky attention: small enough to start in seconds, exact enough that two ways to the same token differ only
where something is wrong (`phloem.shared.transfer_bench.equality` says why not bfloat16). Exits with 1 when a
proof fails.

kills: `--count` peers get a SIGKILL in mid-transfer and `--stop` a SIGSTOP; one half is survived by a decode
engine, the other by a prefill engine. The next request starts with the signal, on a peer that lives on and
has ordinary staging slots (who is killed has small ones, so that a transfer has a middle). Bars: it gives a
token within 2 s; tokens are right; audits are clean; memory does not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from benchmarks.pair.kills import lose_peers
from benchmarks.pair.setting import Setting, make_setting
from phloem.shared.bench.bars import Bar, all_met, bar_lines
from phloem.shared.engine.fault_injection import Faults
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import SamplingParams
from phloem.shared.transfer_bench.equality import compare, explain, make_questions
from phloem.shared.transfer_bench.lab import Lab, hand_over, open_lab, prove_channel, whole

# -- equality ----------------------------------------------------------------------------------------------


async def equality(setting: Setting, lab: Lab, arguments: argparse.Namespace) -> list[Bar]:
    began_s = time.monotonic()
    prefill, decode, unified = await asyncio.gather(
        lab.start("prefill", setting.gpu("prefill")),
        lab.start("decode", setting.gpu("decode")),
        lab.start("unified", setting.gpu("unified")),
    )
    await prefill.peer_up(decode)
    await prove_channel(prefill, decode, "first")
    print(f"engines serve after {time.monotonic() - began_s:.0f} s", flush=True)
    questions = make_questions(
        arguments.requests,
        longest_prompt=arguments.longest or setting.longest_prompt,
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
        Bar("requests aborted", report.num_aborted, "", 0.1 * len(questions), ">="),
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


async def kills(setting: Setting, lab: Lab, arguments: argparse.Namespace) -> list[Bar]:
    return await lose_peers(setting, lab, kills=arguments.count, freezes=arguments.stop)


# ----------------------------------------------------------------------------------------------------------

Proof = Callable[[Setting, Lab, argparse.Namespace], Awaitable[list[Bar]]]
PROOFS: dict[str, Proof] = {"equality": equality, "damage": damage, "kills": kills}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("proof", choices=PROOFS)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--gpus", default="0,1", help="of the prefill and the decode side")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--longest", type=int, help="tokens of the longest prompt: 16000, on a CPU 2000")
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
