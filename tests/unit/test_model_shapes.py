"""Shapes without weights: they get a tokenizer in the cache, and nothing else is touched."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from phloem.shared.errors import PhloemError
from phloem.shared.model_store.model_config import load_model_config
from phloem.shared.model_store.resolve import resolve_model
from phloem.shared.model_store.shapes import MARKER, is_shape

SHAPES = sorted((Path(__file__).parents[2] / "benchmarks" / "models").glob("*/config.json"))


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    directory = tmp_path / "my-shape"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({MARKER: True, "vocab_size": 1000}))
    return directory


def resolve(directory: Path, cache: Path, *, need_weights: bool = False) -> Path:
    return resolve_model(str(directory), cache_dir=cache, need_weights=need_weights)


def test_every_id_has_a_word_and_every_word_its_id(shape: Path, tmp_path: Path) -> None:
    made = resolve(shape, tmp_path / "cache")
    assert made.name == "my-shape"
    assert (made / "config.json").read_bytes() == (shape / "config.json").read_bytes()
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000
    assert tokenizer.decode([0, 17, 999]) == "w0 w17 w999 "
    assert (made / "chat_template.jinja").exists()
    assert sorted(path.name for path in shape.iterdir()) == ["config.json"]


def test_it_is_made_once_and_again_when_the_config_changes(shape: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = resolve(shape, cache)
    before = (first / "tokenizer.json").stat().st_mtime_ns
    assert resolve(shape, cache) == first
    assert (first / "tokenizer.json").stat().st_mtime_ns == before
    (shape / "config.json").write_text(json.dumps({MARKER: True, "vocab_size": 2000}))
    second = resolve(shape, cache)
    assert second != first
    assert Tokenizer.from_file(str(second / "tokenizer.json")).get_vocab_size() == 2000
    assert resolve(second, cache) == second, "what was made is an ordinary directory"


def test_many_at_once_find_one_result(shape: Path, tmp_path: Path) -> None:
    found: list[Path] = []
    start = threading.Barrier(4)

    def ask() -> None:
        start.wait(10)
        found.append(resolve(shape, tmp_path / "cache"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and len(set(found)) == 1
    assert not list((tmp_path / "cache").rglob(".making-*"))


def test_weights_can_not_be_asked_of_a_shape(shape: Path, tmp_path: Path) -> None:
    with pytest.raises(PhloemError, match="--load-format dummy") as caught:
        resolve(shape, tmp_path / "cache", need_weights=True)
    assert caught.value.code == "not_a_model"


def test_without_a_vocabulary_nothing_is_left_behind(shape: Path, tmp_path: Path) -> None:
    (shape / "config.json").write_text(json.dumps({MARKER: True}))
    with pytest.raises(PhloemError, match="vocab_size"):
        resolve(shape, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("tokenizer.json"))


@pytest.mark.parametrize("content", ['{"vocab_size": 10}', f'{{"{MARKER}": "yes"}}', "[1]", "{"])
def test_only_a_directory_that_says_so_is_a_shape(content: str, shape: Path) -> None:
    (shape / "config.json").write_text(content)
    assert not is_shape(shape)


@pytest.mark.parametrize("config", SHAPES, ids=[path.parent.name for path in SHAPES])
def test_committed_shapes_are_what_their_names_say(config: Path) -> None:
    """Parameters in billions, as their makers count them."""
    from phloem.shared.engine.weights.loader import count_parameters

    billions = {"llama-3.1-8b": 8.03, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19}
    assert is_shape(config.parent)
    model = load_model_config(config.parent)
    assert count_parameters(model) / 1e9 == pytest.approx(billions[config.parent.name], abs=0.005)
    assert model.head_dim == 128 and model.dtype == "bfloat16"


def test_all_three_shapes_are_there() -> None:
    assert [path.parent.name for path in SHAPES] == ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b"]
