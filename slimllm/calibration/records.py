"""Text of a record: its field "text", or the conversation in its field "messages"."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimllm.calibration.bos import window_bos
from slimllm.calibration.files import shown
from slimllm.errors import InputError

_log = logging.getLogger("slimllm")

# Records read before one with neither field is refused: some writers leave out fields that are null.
_READ_FIRST = 100
_FIELDS_SHOWN = 12


@dataclass
class Records:
    """Extractor of the texts in the records of one source, which counts the records without a usable text.

    Attributes:
        source: Name of the source, for messages.
        tokenizer: The model's tokenizer, which renders conversations; None if there is none.
        read: Number of records so far.
    """

    source: str
    tokenizer: PreTrainedTokenizerBase | None = None
    read: int = 0
    _empty: int = 0
    _not_unicode: int = 0
    _fields: set[str] = field(default_factory=set)
    _odd: list[tuple[set[str], str]] = field(default_factory=list)

    def text(self, place: str, record: Any) -> str | None:
        """Return the text of the record at a place in the source, or None if it has none or is not valid Unicode.

        Raises:
            ValueError: (as InputError) the record is malformed.
        """
        self.read += 1
        text = self._text(place, record)
        if text is None:
            self._empty += 1
        elif not is_unicode(text):
            self._not_unicode += 1
            text = None
        return text

    def finish(self) -> None:
        """Log how many records were skipped.

        Raises:
            ValueError: (as InputError) a record had neither field, and has fields that no record with a text has.
        """
        self._check_odd()
        for count, what in ((self._empty, "have no text"), (self._not_unicode, "are not valid Unicode")):
            if count:
                _log.warning("%d of %d documents %s and are skipped (%s).", count, self.read, what, self.source)

    def _text(self, place: str, record: Any) -> str | None:
        if not isinstance(record, dict):
            raise InputError(f'{place} of {self.source} is {kind_of(record)}, not a JSON object with a "text" field.')
        if "text" in record or "messages" in record:
            self._fields.update(record)
        elif not self._fields.issuperset(record):
            needed = 'a field "text" (a string) or "messages" (a conversation) is needed'
            self._odd.append((set(record), f"{place} of {self.source} has {fields_of(record)}; {needed}."))
            if self.read >= _READ_FIRST:
                self._check_odd()
        text, messages = record.get("text"), record.get("messages")
        if text is None and messages is None:
            return None
        if text is None:
            return rendered(messages, self.tokenizer, f"{place} of {self.source}")
        if not isinstance(text, str):
            raise InputError(f'{place} of {self.source} has {kind_of(text)} as "text"; it must be a string.')
        return text

    def _check_odd(self) -> None:
        for fields, sentence in self._odd:
            if not fields <= self._fields:
                raise InputError(sentence)
        self._odd.clear()


def rendered(messages: Any, tokenizer: PreTrainedTokenizerBase | None, where: str, *, answer: bool = False) -> str | None:
    """Render a conversation with the model's chat template.

    A BOS at the beginning is left out if the tokenizer itself adds one to every text.

    Args:
        messages: A list of objects with "role" and "content".
        tokenizer: The model's, with a chat template.
        where: Place of the conversation, for messages.
        answer: Append the prompt that the template puts before an answer of the model.

    Returns:
        The text; None if there are no messages, or one has no content.

    Raises:
        ValueError: (as InputError) the messages are not such a list, or the template is missing or does not accept them.
    """
    if has_empty(messages):
        return None
    check_messages(messages, where)
    if not messages:
        return None
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f'{where} has "messages", but the model\'s tokenizer has no chat template to render them; give texts in a '
            'field "text".'
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # a template is a program supplied with the model, and may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"The model's chat template does not take the messages of {where}: {shown(reason)}.") from error
    return text.removeprefix(tokenizer.bos_token) if window_bos(tokenizer, "auto") is not None else text


def has_empty(messages: Any) -> bool:
    """Return whether a message of a conversation has null as content, such as one that calls a tool."""
    entries = messages if isinstance(messages, list) else []
    return any(isinstance(entry, dict) and "content" in entry and entry["content"] is None for entry in entries)


def check_messages(messages: Any, where: str) -> None:
    """Raise ValueError (as InputError) unless `messages` is a list of objects with "role" and "content" as strings."""
    checked = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not checked:
        raise InputError(f'{where} has "messages" that are not a list of objects with "role" and "content" as strings.')


def is_unicode(text: str) -> bool:
    """Return whether a string is valid Unicode. JSON can hold unpaired surrogates, at which tokenizers raise."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def fields_of(record: dict[str, Any]) -> str:
    """List the fields of a record in words, for messages."""
    names = [f'"{shown(name)[:40]}"' for name in list(record)[:_FIELDS_SHOWN]]
    more = f" and {len(record) - len(names)} more" if len(record) > len(names) else ""
    return f"the fields {', '.join(names)}{more}" if names else "no fields"


def kind_of(value: Any) -> str:
    """Name the type of a JSON value in words, for messages."""
    if isinstance(value, bool):
        return "true or false"
    names = {type(None): "null", str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
