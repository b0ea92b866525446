"""Renders messages by a chat template, in the sandbox of transformers, and finds the answers in the text.

Answers are the turns of the assistant with what ends each of them: what the template has in {% generation %}, or else
what a turn adds to the messages before it and the generation prompt.
"""

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

from yoco_megatron.data.tokenizer import hugging_face_wrapper, special_tokens

logger = logging.getLogger(__name__)

Span = tuple[int, int]
"""Start and end, in characters."""
Message = dict[str, Any]
# Names that a record may not set in a template: they are those of the function that renders it.
RESERVED = frozenset(
    {"conversations", "messages", "tools", "chat_template", "return_assistant_tokens_mask", "continue_final_message"}
    | {"add_generation_prompt", "self"}
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


class ChatTemplate:
    """The chat template of a tokenizer, as Megatron builds it; usable from several threads.

    Raises:
        ValueError: there is none, or it is not a template; the tokenizer is not of transformers, which renders it.
    """

    def __init__(self, tokenizer: Any) -> None:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        wrapper = hugging_face_wrapper(tokenizer)
        if wrapper is None:
            raise ValueError("--tokenizer-type: a chat template needs HuggingFaceTokenizer")
        if not wrapper.tokenizer.chat_template:
            raise ValueError(
                "--tokenizer-model: the tokenizer has no chat template, by which messages become a text; name a file "
                "with one by --chat-template"
            )
        self.tokenizer = wrapper.tokenizer
        self.special = tuple(special_tokens(tokenizer).values())  # which may end a turn
        self.render_jinja_template: Any = render_jinja_template
        # transformers notes in the compiled template, which it shares, where {% generation %} is.
        self.lock = threading.Lock()
        try:
            self.text = str(self.tokenizer.get_chat_template())
            render_jinja_template(conversations=[], chat_template=self.text)
        except TemplateSyntaxError as error:
            raise ValueError(f"--chat-template: line {error.lineno} is no Jinja template: {error.message}") from None
        if "strftime_now" in self.text:
            logger.warning("the chat template writes the date of today into documents: the same data give others then")

    @property
    def sha256(self) -> str:
        """Of all that decides what it writes, in hex."""
        used = [self.tokenizer.chat_template, self.tokenizer.special_tokens_map]
        return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()

    def knows(self, role: str) -> bool:
        """Whether the template names a role."""
        return any(f"{quote}{role}{quote}" in self.text for quote in "'\"")

    def answers(self, messages: list[Message], context: int, variables: dict[str, Any]) -> tuple[str, list[Span]]:
        """All messages as one text, and where the answers after the first `context` messages are.

        Args:
            variables: of the template, such as `tools`.
        Raises:
            ValueError: the text of the first messages changes with those that follow.
            Exception: whatever a template fails with.
        """
        text, marked = self._render(messages, variables)
        if marked is None:
            return text, list(self._added(messages, context, variables, text))
        before = self._length(messages, context, variables, text)
        return text, [(start, end) for start, end in marked if before <= start < end]

    def _added(self, messages: list[Message], context: int, variables: dict[str, Any], text: str) -> Iterator[Span]:
        for place in range(context, len(messages)):
            if messages[place]["role"] == "assistant":
                start = self._length(messages, place, variables, text, add_generation_prompt=True)
                end = self._length(messages, place + 1, variables, text)
                # A new line after the end of a turn belongs to what the template writes between turns.
                ended = text[start:end].rstrip()
                yield start, start + len(ended) if ended.endswith(self.special) else end

    def _length(self, messages: list[Message], count: int, variables: dict[str, Any], text: str, **prompt: bool) -> int:
        """Of the text of the first `count` messages, with which the text of all must begin."""
        if count == len(messages):
            return len(text)
        beginning = "" if count == 0 and not prompt else self._render(messages[:count], variables, **prompt)[0]
        if not text.startswith(beginning):
            raise ValueError(
                f"the chat template writes the first {count} messages{' and the generation prompt' if prompt else ''} "
                "otherwise where others follow: give one that does not, or has {% generation %}, by --chat-template"
            )
        return len(beginning)

    def _render(
        self, messages: list[Message], variables: dict[str, Any], add_generation_prompt: bool = False
    ) -> tuple[str, list[Span] | None]:
        """The text, and where the template says that it is generated; None if it does not say."""
        template = self.tokenizer.get_chat_template(tools=variables.get("tools"))
        has_marks = GENERATION.search(template) is not None
        with self.lock:
            texts, spans = self.render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=has_marks,
                add_generation_prompt=add_generation_prompt,
                **(self.tokenizer.special_tokens_map | variables),
            )
        return texts[0], spans[0] if has_marks else None
