"""Conversations as text: the teacher's chat template applied to messages, and which of the text is
learned.

    conversations = Conversations(tokenizer, loss_on="assistant")
    for text, spans in conversations.documents(messages):

`spans` are the [start, stop) characters of what is learned; the rest is read as context only.
"""

from __future__ import annotations

import re
from pathlib import Path

from .data import DataError
from .files import one_line

LOSS_ON = ("all", "assistant", "completion")
OPTION = "--loss_on"
# Keys under which messages carry their reasoning apart from the content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING = re.compile(r"<think>(.*?)</think>", re.DOTALL)
# Stand for the names of special tokens in a message while a template is applied, so that the names
# are not encoded as those tokens; private-use characters, which no text should hold.
FIRST_STAND_IN = 0xF0000


def chat_template(tokenizer, chosen: str | None = None) -> str:
    """The template as Jinja text: the file `chosen`, the tokenizer's template of that name, or by
    default the tokenizer's own. Raises DataError if there is none or it is empty."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if chosen is None:
        template = named.get("default") if named else tokenizer.chat_template
        missing = f"--tokenizer: {tokenizer.name_or_path!r} has no chat template"
        cure = "take the instruct model's tokenizer, or name a Jinja file by --chat_template"
    else:
        file = Path(chosen).expanduser()
        template = file.read_text(encoding="utf-8") if file.is_file() else named.get(chosen)
        missing = f"--chat_template: {chosen!r} is neither a file nor a template of the tokenizer"
        cure = f"it has {', '.join(named) or 'none by name'}"
    if template is None:
        raise DataError(f"{missing}; {cure}")
    if not template.strip():
        raise DataError(
            f"{chosen or tokenizer.name_or_path}: its chat template is empty; name another by --chat_template"
        )
    return template


def reasoning_of(message: dict) -> str:
    """The reasoning trace of a message, without surrounding white space; "" if it has none."""
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str):
            return message[key].strip()
    found = REASONING.search(message.get("content") or "")
    return found[1].strip() if found else ""


def _plain(messages) -> list[dict]:
    """The messages without keys that are None. Raises DataError for what is no list of messages of
    text."""
    if not isinstance(messages, list) or not messages:
        raise DataError("is no list of messages; each is an object with role and content")
    plain = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} has no role; each is an object with role and content")
        kept = {name: value for name, value in message.items() if value is not None}
        content = kept.setdefault("content", "")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise DataError(f"message {number} has content of type {kind}, not text; join its parts to one string")
        plain.append(kept)
    if not any(message["role"] == "assistant" for message in plain):
        raise DataError("has no assistant turn to learn; remove the conversation, or call the model's role assistant")
    return plain


class Conversations:
    """Applies a chat template to conversations.

    loss_on: what is learned: all text; the assistant's turns; or only the last of them, the
    completion. template: see `chat_template`. Raises DataError if the template cannot be applied to
    a question and its answer.
    """

    def __init__(self, tokenizer, loss_on: str, template: str | None = None):
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.template = chat_template(tokenizer, template)
        self.names = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._name = re.compile("|".join(map(re.escape, self.names)))
        stand_ins = "".join(chr(FIRST_STAND_IN + i) for i in range(len(self.names)))
        self.stand_in = re.compile(f"([{stand_ins}])")
        try:
            self.documents([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}])
        except DataError as error:
            raise DataError(f"--chat_template: a question and its answer: {error}") from None

    def name_of(self, stand_in: str) -> str:
        """The special token that a match of `stand_in` stands for."""
        return self.names[ord(stand_in) - FIRST_STAND_IN]

    def _hidden(self, text: str) -> str:
        """The text with stand-ins for the names of special tokens."""
        text = self.stand_in.sub("\ufffd", text)
        return self._name.sub(lambda found: chr(FIRST_STAND_IN + self.names.index(found[0])), text)

    def _render(self, messages: list[dict], prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise anything: TemplateError, TypeError, KeyError
            raise DataError(f"the chat template refuses it ({one_line(error)}); correct the messages") from None

    def _turn(self, messages: list[dict], index: int) -> tuple[str, int]:
        """The text up to and with the assistant's turn `index`, as the model would write it, and
        the character at which the turn begins."""
        prompt = self._render(messages[:index], prompt=True) if index else ""
        text = self._render(messages[: index + 1])
        if reasoning_of(messages[index]) not in text:
            raise DataError(
                f"the chat template drops the thinking of message {index + 1}; write it to the content between "
                "<think> and </think>, or name a template that keeps it by --chat_template"
            )
        if not text.startswith(prompt):
            raise DataError(
                f"the chat template shows message {index + 1} otherwise than its generation prompt begins it, "
                f"{prompt[-40:]!r}; name another by --chat_template"
            )
        return text, len(prompt)

    def documents(self, messages) -> list[tuple[str, list[tuple[int, int]]]]:
        """The conversation as (text, spans to be learned): one document, in which special tokens'
        names in messages have stand-ins.

        A turn that the template shows otherwise once the conversation goes on (some drop the
        thinking of earlier turns) is learned in a document of its own, which ends with it: each
        turn is learned as it is generated. Of `all`, only turns whose thinking would be lost are.
        Raises DataError, which does not name the place of the conversation.
        """
        plain = []
        for message in _plain(messages):
            hidden = {name: self._hidden(value) for name, value in message.items() if isinstance(value, str)}
            plain.append(message | hidden)
        turns = [i for i, message in enumerate(plain) if message["role"] == "assistant"]
        if self.loss_on != "all":
            plain = plain[: turns[-1] + 1]
        if self.loss_on == "completion":
            turns = turns[-1:]
        documents = [(self._render(plain), [])]
        for index in reversed(turns):
            whole, spans = documents[-1]
            text, start = self._turn(plain, index)
            if self.loss_on == "all":
                if reasoning_of(plain[index]) not in whole:
                    documents.append((text, []))
                continue
            if not whole.startswith(text):
                spans = []
                documents.append((text, spans))
            # What the template puts behind the turn's last token is white space.
            spans.insert(0, (start, len(text.rstrip())))
        if self.loss_on == "all":
            documents = [(text, [(0, len(text))]) for text, _ in documents]
        return documents[::-1]
