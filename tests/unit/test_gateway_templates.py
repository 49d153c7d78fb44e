"""Chat templates: what they may do, where they come from, and what is said of bad ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from phloem.services.gateway.text.chat_template import ChatTemplate
from phloem.services.gateway.text.loading import load_prompt_encoder
from phloem.shared.errors import ConfigError, PhloemError
from tests.support.gateway import make_model_dir


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def render(source: str, messages: list[dict[str, str]], **extra: str) -> str:
    return ChatTemplate(source, {"bos_token": "<|im_start|>"}, timeout_s=5.0).render(messages, extra=extra)


async def test_model_without_template_says_what_to_use(tmp_path: Path) -> None:
    encoder = load_prompt_encoder(make_model_dir(tmp_path, chat_template=None))
    with pytest.raises(PhloemError) as caught:
        await encoder.encode_chat(user("hi"), context_length=100, add_generation_prompt=True, extra={})
    assert caught.value.code == "chat_template_missing"
    assert "/v1/completions" in str(caught.value)
    encoder.close()


def test_template_message_reaches_the_client() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}ok"
    with pytest.raises(PhloemError, match=r"^user first$") as caught:
        render(source, [{"role": "system", "content": ""}])
    assert (caught.value.code, caught.value.info.http_status) == ("chat_template_error", 400)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0]['content'] + 3 }}",
        "{{ nothing.here.at_all }}",
        "{{ messages.append(1) }}",  # the sandbox is immutable
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10000000) %}{{ i }}{% endfor %}",
    ],
)
def test_a_failing_template_is_a_clear_400(source: str) -> None:
    with pytest.raises(PhloemError) as caught:
        render(source, user("x"))
    assert (caught.value.code, caught.value.info.param) == ("chat_template_error", "messages")


def test_a_template_that_runs_too_long_is_stopped() -> None:
    source = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].role }}{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(source, {}, timeout_s=0.05)
    started = time.monotonic()
    with pytest.raises(PhloemError, match="too long"):
        template.render(user("x"))
    assert time.monotonic() - started < 2.0


def test_a_template_that_prints_too_much_is_stopped() -> None:
    source = "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(PhloemError, match="more than"):
        render(source, user("x" * 1000))


def test_templates_have_what_transformers_gives_them() -> None:
    assert render("{{ messages[0] | tojson }}", user("<é>")) == '{"role": "user", "content": "<é>"}'
    assert len(render("{{ strftime_now('%Y') }}", user(""))) == 4
    assert render("{% for m in messages %}{% break %}{% endfor %}ok", user("")) == "ok"
    assert render("{% generation %}said{% endgeneration %}", user("")) == "said"
    assert render("{{ bos_token }}{{ tools is none }}{{ mode }}", user(""), mode="m") == "<|im_start|>Truem"
    assert render("  {% if true %}\nx\n  {% endif %}\n", user("")) == "x\n"


def test_template_files_win_over_the_configuration(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, chat_template="from config")
    (tmp_path / "chat_template.jinja").write_text("from file")
    other = tmp_path / "operator.jinja"
    other.write_text("from operator")
    for override, expected in (("", "from file"), (str(other), "from operator")):
        encoder = load_prompt_encoder(model_dir, chat_template=override)
        assert encoder._template is not None
        assert encoder._template.render(user("")) == expected
        encoder.close()


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer_config.json", "{"), ("tokenizer.json", "{}"), ("tokenizer.json", None)]
)
def test_a_broken_model_directory_is_a_config_error(tmp_path: Path, name: str, content: str | None) -> None:
    make_model_dir(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        load_prompt_encoder(tmp_path)


def test_a_malformed_template_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="malformed"):
        load_prompt_encoder(make_model_dir(tmp_path, chat_template="{% if %}"))


def test_a_missing_template_file_is_a_config_error(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="can't read"):
        load_prompt_encoder(model_dir, chat_template="/nowhere.jinja")
