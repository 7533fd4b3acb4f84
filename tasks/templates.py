"""Prompt templates: from a task's input text to the prompt a decoder-only model reads."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sira_jax.errors import ConfigError


class PromptTemplate(Protocol):
    """Turns an input text into a prompt; the target follows it directly."""

    def render(self, text: str) -> str:
        """The prompt. Raises ConfigError where it cannot be made."""
        ...


@dataclass(frozen=True)
class PlainTemplate:
    """`prefix` + text + `suffix`."""

    prefix: str = ""
    suffix: str = "\n"

    def render(self, text: str) -> str:
        """The prompt."""
        return f"{self.prefix}{text}{self.suffix}"


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat format: the text is the user's turn, the target the assistant's.

    Attributes:
      source: the model's `chat_template`, in Jinja, which runs in Jinja's sandbox.
      system: the system message; None leaves it to the template.
      bos_token, eos_token: texts the template may refer to.
      origin: whose template it is, for messages.
    """

    source: str
    system: str | None = None
    bos_token: str = ""
    eos_token: str = ""
    origin: str = ""
    _render: Callable[..., str] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        # The settings of Hugging Face's apply_chat_template, for which these templates are written.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            template = environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{self._name}, line {error.lineno}: {error.message}") from None
        object.__setattr__(self, "_render", template.render)

    @property
    def _name(self) -> str:
        return f"{self.origin}: chat_template" if self.origin else "chat_template"

    def __getstate__(self):
        fields = ("source", "system", "bos_token", "eos_token", "origin")
        return {name: getattr(self, name) for name in fields}

    def __setstate__(self, state):
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def render(self, text: str) -> str:
        """The prompt, up to where the assistant's turn begins."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": text})
        try:
            return self._render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{self._name} cannot be rendered: {error}") from None


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def make_template(
    name: str,
    *,
    chat_template: str | None = None,
    system: str | None = None,
    bos_token: str = "",
    eos_token: str = "",
    origin: str = "",
) -> PromptTemplate | None:
    """The template "none" (the text itself, as for encoder-decoder models), "plain" or "chat".

    Raises ConfigError for another name, or for "chat" where the model has no chat template.
    """
    if name == "none":
        return None
    if name == "plain":
        return PlainTemplate()
    if name == "chat":
        if not chat_template:
            raise ConfigError("template='chat' is not allowed: this model has no chat_template")
        return ChatTemplate(chat_template, system, bos_token, eos_token, origin)
    raise ConfigError(f"template={name!r} is not allowed: use none, plain or chat")
