"""Prompts and answers as documents: what a user says is read, what the model should say is learned.

{"prompt": "...", "completion": "..."}                      the completion is learned
{"messages": [{"role": "user", "content": "..."}, ...]}     the answers are learned
{"prompt": [message, ...], "completion": [message, ...]}    with two keys of messages those in the second one
"""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from yoco_megatron.corpus.chat_template import RESERVED, ChatTemplate, Message
from yoco_megatron.corpus.documents import Document, Segment
from yoco_megatron.corpus.readers import Batch, Parsed

# Further keys of a record, for its template.
TOOLS, VARIABLES = "tools", "chat_template_kwargs"
ROLES = ("system", "developer", "user", "assistant", "tool")
# A noncharacter of Unicode. Inside a special token that a message spells it parts the text, which then gives no such
# token.
BREAK = "\ufdd0"


class Prompts:
    """Texts after texts: two keys, of which the second one's text is learned.

    Args:
        keys: of the prompt and of what completes it.
        special: tokens that stay text where the texts spell them; None: all become tokens.
    """

    kind, names, is_masked = "prompt_completion", ["prompt_completion"], True

    def __init__(self, keys: list[str], special: "SpecialTokens | None") -> None:
        if len(keys) != 2:
            raise ValueError(f"--json-keys {' '.join(keys)}: --data-format {self.kind} reads two, as prompt completion")
        self.keys, self.columns, self.special = keys, keys, special
        self.nothing = f"has no text under {keys[1]!r}: nothing to learn"

    def read(self, batch: Batch) -> Parsed[list[Document]]:
        """Documents of a prompt and a completion."""
        return batch.objects(self.columns, lambda record: [self._document(record)])

    def _document(self, record: dict[str, Any]) -> Document:
        values = _values(record, self.keys)
        if all(isinstance(value, list) for value in values):
            raise ValueError(
                f"both values are lists: read messages with --data-format messages --json-keys {' '.join(self.keys)}"
            )
        for key, value in zip(self.keys, values):
            if not isinstance(value, str):
                raise ValueError(f"the value under the key {key!r} is {_type(value)}, not text")
        if self.special is None:
            return Document([*_segments(values[0], False), *_segments(values[1], True)])
        parts = map(self.special.part, values)
        return Document(
            [segment for part, flag in zip(parts, (False, True)) for segment in _segments(part, flag, True)]
        )


class Conversations:
    """Messages: of one key, whose answers are learned, or of two, which give one conversation.

    Args:
        keys: of the messages, and of those that go on.
        template: of the messages.
        special: looked for in the messages.
        split_special_tokens: those that are spelled there stay text.
    """

    kind, names, is_masked = "messages", ["messages"], True
    nothing = "has no answer, or an empty one: nothing to learn"

    def __init__(
        self, keys: list[str], template: ChatTemplate, special: "SpecialTokens", split_special_tokens: bool = False
    ) -> None:
        if len(keys) > 2:
            raise ValueError(f"--json-keys {' '.join(keys)}: --data-format {self.kind} reads one, or prompt completion")
        self.keys, self.columns = keys, [*keys, TOOLS, VARIABLES]
        self.template, self.special, self.split_special_tokens = template, special, split_special_tokens

    def read(self, batch: Batch) -> Parsed[list[Document]]:
        """A document for each conversation."""
        return batch.objects(self.columns, lambda record: [self._document(record)])

    def _document(self, record: dict[str, Any]) -> Document:
        """Raises ValueError for what is no such record."""
        *before, last = [self._messages(value, key) for key, value in zip(self.keys, _values(record, self.keys))]
        context = before[0] if before else []
        if context and context[-1]["role"] == "assistant":
            raise ValueError(f"the messages under {self.keys[0]!r} end with an answer: move it to {self.keys[1]!r}")
        messages, variables = context + last, _variables(record)
        special = self.special.spelled([messages, variables])
        if self.split_special_tokens:
            messages, variables, special = self.special.part(messages), self.special.part(variables), []
        try:
            text, answers = self.template.answers(messages, len(context), variables)
        except ValueError:
            raise
        except Exception as error:  # a template is a program: it may raise any type
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from None
        ends = [0, *(end for answer in answers for end in answer), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(ends)]  # every second one is an answer
        flags = itertools.cycle((False, True))
        parted = self.split_special_tokens
        return Document([part for text, flag in zip(parts, flags) for part in _segments(text, flag, parted)], special)

    def _messages(self, value: Any, key: str) -> list[Message]:
        """Raises ValueError for what is no list of messages."""
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise ValueError(f"the value under the key {key!r} is {_type(value)}, not a list of messages (objects)")
        if not value:
            raise ValueError(f"the list of messages under the key {key!r} is empty")
        return [self._message(message, f"message {number} of {key!r}") for number, message in enumerate(value, 1)]

    def _message(self, message: Message, name: str) -> Message:
        role = message.get("role")
        # A template may pass over a turn whose role it does not know.
        if not isinstance(role, str) or (role not in ROLES and not self.template.knows(role)):
            raise ValueError(
                f"{name} has the role {json.dumps(role):.40}: give one of {', '.join(ROLES)}, or one that the chat "
                "template names"
            )
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text_of_part(part, name) for part in content)
        elif content is None and not (role == "assistant" and message.get("tool_calls")):
            raise ValueError(f"{name} ({role}) has no content")
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"the content of {name} is {_type(content)}, not text")
        # As apply_chat_template does: null is what is not there.
        return {key: item for key, item in (message | {"content": content}).items() if item is not None}


class SpecialTokens:
    """Finds special tokens (id -> text) that a text, or the texts in a list or an object, spell."""

    def __init__(self, special: dict[int, str]) -> None:
        self.names = {text: f"{text!r} ({id_})" for id_, text in special.items()}
        longest_first = sorted(self.names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def spelled(self, value: Any) -> list[str]:
        """Text and id of each, once."""
        found = dict.fromkeys(token for text in _texts(value) for token in self.pattern.findall(text))
        return [self.names[token] for token in found]

    def part(self, value: Any) -> Any:
        """The value with each one parted after its first character."""
        if isinstance(value, str):
            return self.pattern.sub(lambda found: found[0][0] + BREAK + found[0][1:], value)
        if isinstance(value, dict):
            return {key: item if key == "role" else self.part(item) for key, item in value.items()}
        return [self.part(item) for item in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for key, item in value.items() if key != "role" for text in _texts(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in _texts(item))


def _values(record: dict[str, Any], keys: list[str]) -> list[Any]:
    for key in keys:
        if key not in record:
            raise ValueError(
                f"no key {key!r} (keys: {', '.join(record)}); name another one by --json-keys, or another --data-format"
            )
    return [record[key] for key in keys]


def _segments(text: str, is_learned: bool, is_parted: bool = False) -> list[Segment]:
    """The text, in the parts that `SpecialTokens.part` made of it if it `is_parted`."""
    try:
        return [Segment(part.encode(), is_learned) for part in (text.split(BREAK) if is_parted else [text]) if part]
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
        raise ValueError("a text holds a lone surrogate, which is not Unicode text") from None


def _text_of_part(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else _type(part)
        raise ValueError(f"the content of {name} has a part that is no text ({json.dumps(kind):.40})")
    return text


def _variables(record: dict[str, Any]) -> dict[str, Any]:
    """What else the template sees. Raises ValueError."""
    tools, variables = record.get(TOOLS), record.get(VARIABLES) or {}
    if isinstance(tools, str):  # in tables, whose columns have one type
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the text under the key {TOOLS!r} is not JSON ({error})") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"the value under the key {TOOLS!r} is {_type(tools)}, not a list of objects")
    if not isinstance(variables, dict) or (taken := RESERVED & variables.keys()):
        what = f"sets {min(taken)!r}" if isinstance(variables, dict) else f"is {_type(variables)}, not an object"
        raise ValueError(f"the value under the key {VARIABLES!r} {what}")
    return variables | ({"tools": tools} if tools else {})


def _type(value: Any) -> str:
    return "null" if value is None else f"of the type {type(value).__name__}"
