"""Prompt templates."""

import pickle

import pytest

from sira_jax.errors import ConfigError
from tasks.preprocessors import render_prompts
from tasks.templates import ChatTemplate, PlainTemplate, make_template

CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_plain():
    assert PlainTemplate().render("Hi") == "Hi\n"
    assert PlainTemplate("Q: ", "\nA: ").render("Hi") == "Q: Hi\nA: "


def test_chat():
    assert ChatTemplate(CHATML).render("{{ Hi }}") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n{{ Hi }}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        ChatTemplate(CHATML, system="Be long.")
        .render("Hi")
        .startswith("<|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user\nHi")
    )


def test_special_tokens_reach_the_template():
    template = ChatTemplate(
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", None, "<s>", "</s>"
    )
    assert template.render("Hi") == "<s>Hi</s>"


def test_a_chat_template_survives_pickling_and_compares_by_value():
    template = ChatTemplate(CHATML)
    copy = pickle.loads(pickle.dumps(template))
    assert copy == template
    assert hash(copy) == hash(template)
    assert copy.render("Hi") == template.render("Hi")


def test_rendering_changes_only_the_inputs():
    examples = [{"inputs": "a", "targets": "b", "answers": "c"}]
    rendered = render_prompts(examples, PlainTemplate())
    assert rendered == [{"inputs": "a\n", "targets": "b", "answers": "c"}]
    assert examples[0]["inputs"] == "a"
    assert render_prompts(examples, None) == examples


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "chat_template, line 1:"),
        ("{% for m in messages %}", "chat_template, line 1:"),
    ],
)
def test_bad_templates(source, message):
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].content + 1 }}",
        "{{ range(99999999) | length }}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_that_fail_or_reach_out(source):
    with pytest.raises(ConfigError, match="chat_template cannot be rendered"):
        ChatTemplate(source).render("Hi")


def test_make_template():
    assert make_template("none") is None
    assert make_template("plain") == PlainTemplate()
    assert make_template("chat", chat_template=CHATML) == ChatTemplate(CHATML)
    with pytest.raises(ConfigError, match="this model has no chat_template"):
        make_template("chat")
    with pytest.raises(ConfigError, match="template='alpaca' is not allowed"):
        make_template("alpaca")
