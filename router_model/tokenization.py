"""From text to token ids: prompts for the router's backbone, prompt and response for the student.

Text that a user or a teacher wrote never becomes a control token: a prompt that contains
``<|im_end|>`` is encoded as those characters and cannot close its own turn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError

from clients.types import ChatMessage
from router_model.errors import RouterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARS_PER_TOKEN = 32
"""Characters read per token of the limit. Real text has 1 to 6 characters a token, so a longer text is
cut long before its tokens are counted, and a prompt of a megabyte costs no more than one of 64 kB."""

_SYSTEM_ROLES = frozenset({"system", "developer"})


@dataclass(frozen=True, slots=True)
class PromptEncoding:
    """One prompt as the backbone reads it.

    ``ids`` holds at most ``max_tokens`` ids, the tokenizer's own control tokens included. ``n_tokens`` is
    the length before truncation; for a text cut at the character bound it is a lower bound of it.
    """

    ids: list[int]
    truncated: bool
    n_tokens: int


def sanitize(text: str) -> str:
    """Text that a tokenizer can take: lone surrogates become U+FFFD, split pairs are joined."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def message_text(message: ChatMessage) -> str:
    """Text of one chat message: its string, or its parts of type ``text`` joined by newlines.

    Parts of other types (images, audio) hold nothing that a text model reads and are left out.
    """
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = (part for part in content if isinstance(part, Mapping) and part.get("type") == "text")
    return "\n".join(str(part.get("text", "")) for part in parts)


def prompt_text(messages: Sequence[ChatMessage]) -> str:
    """The one rendering of a prompt for the router.

    A lone user turn is its content. Anything else becomes role-labelled lines (``user: ...``), system and
    developer turns first, the rest in order.
    """
    if len(messages) == 1 and messages[0].get("role") == "user":
        return message_text(messages[0])
    ordered = sorted(messages, key=lambda message: message.get("role") not in _SYSTEM_ROLES)
    return "\n".join(f"{message.get('role', 'user')}: {message_text(message)}" for message in ordered)


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    max_tokens: int,
    keep: Literal["start", "end"] = "start",
    frame: tuple[list[int], list[int]] | None = None,
) -> list[PromptEncoding]:
    """Encode prompts for the backbone, within ``max_tokens`` ids each.

    Args:
        tokenizer: The backbone's tokenizer.
        texts: Prompts, as ``prompt_text`` renders them.
        max_tokens: Limit per prompt, control tokens included.
        keep: Which end of a too long text stays: ``start`` for encoders, which are trained on openings;
            ``end`` for decoders, whose last token is what is pooled.
        frame: Ids before and after each text; by default the tokenizer's own control tokens.

    Raises:
        RouterError: ``max_tokens`` leaves no room beside the tokenizer's control tokens.
    """
    prefix, suffix = control_frame(tokenizer) if frame is None else frame
    n_frame = len(prefix) + len(suffix)
    if max_tokens <= n_frame:
        raise RouterError(f"max_tokens is {max_tokens}, expected more than {n_frame} for this tokenizer")
    max_chars = max_tokens * _CHARS_PER_TOKEN
    pieces = [text[:max_chars] if keep == "start" else text[-max_chars:] for text in texts]
    encodings = []
    for text, ids in zip(texts, plain_ids(tokenizer, pieces), strict=True):
        n_tokens = len(ids) + n_frame
        room = max_tokens - n_frame
        kept = ids[:room] if keep == "start" else ids[-room:]
        truncated = n_tokens > max_tokens or len(text) > max_chars
        encodings.append(PromptEncoding([*prefix, *kept, *suffix], truncated, n_tokens))
    return encodings


def plain_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts as ordinary text: no control token is added, none is recognised in the text."""
    return [list(ids) for ids in _plain_encoding(tokenizer, texts).get("input_ids", [])]


def token_starts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Character of the sanitized text at which each token of ``plain_ids`` begins.

    Raises:
        RouterError: The tokenizer does not tell.
    """
    if not tokenizer.is_fast:
        raise RouterError(f"{type(tokenizer).__name__} does not tell where in the text its tokens begin")
    encoded = _plain_encoding(tokenizer, texts, return_offsets_mapping=True)
    return [[start for start, _ in offsets] for offsets in encoded.get("offset_mapping", [])]


def _plain_encoding(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], **options: bool
) -> Mapping[str, Any]:
    """What the tokenizer makes of texts as ordinary text; nothing for no texts."""
    if not texts:
        return {}
    encoded: Mapping[str, Any] = tokenizer(
        [sanitize(text) for text in texts],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
        **options,
    )
    return encoded


def control_frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Control ids that the tokenizer puts before and after a single text, for example [CLS] and [SEP]."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    framed = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def chat_frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Ids that the chat template puts before and after a lone user turn, the start of the answer included.

    Raises:
        RouterError: The template refuses a user turn, or hides its text.
    """
    (mark,) = _marks(1, "")
    before, found, after = _apply_template(tokenizer, [{"role": "user", "content": mark}]).partition(mark)
    if not found:
        raise RouterError("the chat template does not show the text of a user turn")
    first, last = (
        list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) if part else []
        for part in (before, after)
    )
    return first, last


def encode_chat_pair(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[ChatMessage], response: str
) -> tuple[list[int], int]:
    """Encode a prompt and its response as the student sees them when it generates.

    The ids are those of ``encode_chat_prompt`` followed by the response's own ids, because that is what
    log p(y | x) is about: in generation the prompt's ids are fixed before the response begins. No
    end-of-turn token follows: whether a teacher's answer was cut or came to its end would otherwise
    enter the mean over its tokens, and the two could not be compared.

    Returns:
        All ids, and the number of them that belong to the prompt.

    Raises:
        RouterError: The chat template does not take the messages.
    """
    prompt_ids = encode_chat_prompt(tokenizer, messages)
    return prompt_ids + plain_ids(tokenizer, [response])[0], len(prompt_ids)


def encode_chat_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[ChatMessage]) -> list[int]:
    """Ids of a prompt through the student's chat template, up to where the response begins.

    Ordinary text gets exactly the ids of ``apply_chat_template(..., add_generation_prompt=True)``. Text that
    contains a control token of the tokenizer is encoded apart from the template, as plain text. A template
    that refuses system turns gets them at the head of the first user turn. A tokenizer without template
    gets ``User:\\n...\\n\\nAssistant:\\n``, with its beginning-of-text token if it has one.

    Raises:
        RouterError: The chat template does not take the messages, or it rewrites a text that contains
            control tokens, so that the text cannot be told from the template.
    """
    turns = [
        {"role": str(message.get("role", "user")), "content": sanitize(message_text(message))}
        for message in messages
    ]
    if not tokenizer.chat_template:
        text = "".join(f"{turn['role'].capitalize()}:\n{turn['content']}\n\n" for turn in turns)
        return control_frame(tokenizer)[0] + plain_ids(tokenizer, [f"{text}Assistant:\n"])[0]
    rendered, turns = _render(tokenizer, turns)
    controls = control_texts(tokenizer)
    if any(control in turn["content"] for turn in turns for control in controls):
        return _encode_apart(tokenizer, turns, rendered)
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def control_texts(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The texts that the tokenizer would read as control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return {text for text in texts if text}


def _render(
    tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]]
) -> tuple[str, list[dict[str, str]]]:
    """The template's text, and the turns it was made from (with system turns folded if it refuses them)."""
    try:
        return _apply_template(tokenizer, turns), turns
    except TemplateError as error:
        folded = _fold_system(turns)
        if folded == turns:
            raise _refused(turns, error) from error
    try:
        return _apply_template(tokenizer, folded), folded
    except TemplateError as error:
        raise _refused(turns, error) from error


def _apply_template(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]]) -> str:
    rendered: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return str(rendered)


def _refused(turns: list[dict[str, str]], error: TemplateError) -> RouterError:
    roles = [turn["role"] for turn in turns]
    return RouterError(f"the student's chat template refuses turns with the roles {roles!r}: {error}")


def _fold_system(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same turns with all system text at the head of the first user turn."""
    system = [turn["content"] for turn in turns if turn["role"] in _SYSTEM_ROLES]
    others = [dict(turn) for turn in turns if turn["role"] not in _SYSTEM_ROLES]
    first_user = next((turn for turn in others if turn["role"] == "user"), None)
    if not system or first_user is None:
        return turns
    first_user["content"] = "\n\n".join([*system, first_user["content"]])
    return others


def _encode_apart(
    tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]], rendered: str
) -> list[int]:
    """Encode template and contents apart: control tokens only where the template put them.

    The template is rendered once more with a mark in place of each content, and cut at the marks. That the
    pieces joined again give ``rendered`` proves that each content stands where its mark stood.
    """
    marks = _marks(len(turns), rendered)
    marked = _apply_template(
        tokenizer, [{**turn, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
    )
    pieces = re.split(f"({'|'.join(marks)})", marked)
    for trim in (str, str.strip, str.lstrip, str.rstrip):
        contents = {mark: trim(turn["content"]) for turn, mark in zip(turns, marks, strict=True)}
        if "".join(contents.get(piece, piece) for piece in pieces) == rendered:
            return _encode_pieces(tokenizer, pieces, contents)
    raise RouterError(
        "a prompt contains control tokens of the student, and the student's chat template rewrites the "
        "text, so the two cannot be told apart: remove the control tokens from the prompt"
    )


def _marks(n_turns: int, rendered: str) -> list[str]:
    """One word per turn that does not occur in the prompt; letters only, so templates leave it alone."""
    stem = "xcontentx"
    while stem in rendered:
        stem += "x"
    return [f"{stem}{index:06d}z" for index in range(n_turns)]


def _encode_pieces(
    tokenizer: "PreTrainedTokenizerBase", pieces: Sequence[str], contents: Mapping[str, str]
) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        if piece in contents:
            ids += plain_ids(tokenizer, [contents[piece]])[0]
        elif piece:
            ids += list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
    return ids
