"""What the flags of `phloem bench offline` ask for, and how wrong ones are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from phloem.cli.bench.offline_flags import EngineFlags, WorkFlags, engine_options, offline_work
from phloem.cli.main import run
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.offline.work import OfflineWork, StepSampling
from phloem.shared.errors import PhloemError

SHAPE = Path(__file__).parents[2] / "benchmarks" / "models" / "llama-3.1-8b"


def test_shapes_are_lengths_and_batches() -> None:
    flags = WorkFlags(prefill="512, 1024", decode="1x64,8x128", steps=12, grammar_share=0.5)
    assert offline_work(flags) == OfflineWork(
        prefill=(512, 1024), decode=((1, 64), (8, 128)), steps=12, grammar_share=0.5
    )
    assert offline_work(WorkFlags(prefill="", decode="")) == OfflineWork(prefill=(), decode=())


def test_filters_are_of_the_decode_steps() -> None:
    flags = WorkFlags(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05)
    assert offline_work(flags).sampling == StepSampling(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prefill", "x"], "--prefill: 'x' is no positive number"),
        (["--prefill", "0"], "--prefill: '0' is no positive number"),
        (["--prefill", "9" * 5000], "is no positive number"),
        (["--decode", "64"], "--decode: '64' is not BATCHxCONTEXT, as 64x1024 is"),
        (["--decode", "0x64"], "--decode: '0' is no positive number"),
        (["--decode", "4x-64"], "--decode: '-64' is no positive number"),
        (["--steps", "0"], "--steps: 0 is not valid: expected an integer from 1"),
        (["--grammar-share", "2"], "--grammar-share: 2.0 is not valid: expected a number from 0.0 to 1.0"),
        (["--temperature", "-1"], "--temperature: -1.0 is not valid: expected a number from 0.0 to 2.0"),
        (["--temperature", "nan"], "--temperature: nan is not valid"),
        (["--temperature", "1", "--top-p", "0"], "--top-p: 0.0 is not valid"),
        (["--temperature", "1", "--top-k", "-1"], "--top-k: -1 is not valid"),
        (["--temperature", "1", "--min-p", "1.5"], "--min-p: 1.5 is not valid"),
        (["--top-p", "0.9"], "do nothing at --temperature 0, which is greedy: give --temperature 1"),
        (["--sampled", "--decode", "1x64"], "--sampled measures a batch of 64, and --decode has none"),
        (["--device", "CPU"], "--device: 'CPU' is not valid: expected text matching ^(auto|cpu|cuda"),
        (["--device", "cuda:0x"], "--device: 'cuda:0x' is not valid"),
        (["--device", "cpu", "--attention-backend", "triton"], "--attention-backend triton needs a CUDA"),
        (["--device", "cpu", "--attention-backend", "flashinfer"], "with --device cpu use torch"),
        (["--dtype", "float32", "--attention-backend", "flashinfer"], "flashinfer has no float32 kernels"),
        (["--max-running-requests", "-3"], "--max-running-requests: -3 is not valid"),
        (["--max-running-requests", "100000"], "expected an integer from 0 to 4,096"),
        (["--context-length", "-5"], "--context-length: -5 is not valid"),
        (["--mem-fraction-static", "5"], "--mem-fraction-static: 5.0 is not valid"),
        (["--max-total-tokens", "-1"], "--max-total-tokens: -1 is not valid"),
        (["--page-size", "5"], "--page-size 5 must divide 64"),
        (["--chunked-prefill-size", "-1"], "--chunked-prefill-size: -1 is not valid"),
        (["--cuda-graph-max-bs", "5000"], "--cuda-graph-max-bs: 5000 is not valid"),
        (["--output", "/nope/x.json"], "--output /nope/x.json: there is no such directory"),
        (["--output", "/"], "--output / is a directory: name a file in it"),
    ],
)
def test_a_wrong_flag_is_one_sentence_before_anything_is_loaded(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "offline", "--model-path", "/nope", *args]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("phloem: error: ") and message in line


def test_every_engine_flag_reaches_the_engine() -> None:
    given = {
        "device": "cpu",
        "dtype": "bfloat16",
        "attention_backend": "torch",
        "mem_fraction_static": 0.5,
        "context_length": 4096,
        "max_running_requests": 8,
        "max_total_tokens": 2048,
        "page_size": 32,
        "chunked_prefill_size": 512,
        "disable_overlap_schedule": True,
        "cuda_graph_max_bs": 4,
        "disable_cuda_graph": True,
        "disable_decode_kernels": True,
        "disable_cooperative_decode": True,
    }
    names = {field.name for field in dataclasses.fields(EngineFlags)}
    assert names == {*given, "model_path", "load_format"}
    options = engine_options(EngineFlags(model_path=str(SHAPE), **given))  # type: ignore[arg-type]
    assert {name: getattr(options, name) for name in given} == given


def test_what_is_not_given_is_the_engines_default() -> None:
    options = engine_options(EngineFlags(model_path=str(SHAPE)))
    assert options == EngineOptions(model_path=options.model_path, load_format="dummy")


def test_a_shape_without_weights_gets_random_ones() -> None:
    assert engine_options(EngineFlags(model_path=str(SHAPE))).load_format == "dummy"


def test_a_format_that_was_asked_for_is_not_guessed_at() -> None:
    with pytest.raises(PhloemError, match="give --load-format dummy"):
        engine_options(EngineFlags(model_path=str(SHAPE), load_format="safetensors"))
