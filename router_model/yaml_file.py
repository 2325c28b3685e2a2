"""A YAML file of settings, read strictly: what it holds, and on which line each part stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from clients.errors import ConfigurationError


@dataclass(frozen=True, slots=True, eq=False)
class YamlFile:
    """A mapping, and the nodes it was read from."""

    path: Path
    root: yaml.Node
    content: dict[str, Any]

    def line(self, location: Sequence[int | str]) -> int:
        """1-based line of the value at ``location``, or of the nearest one above it that exists."""
        node, line = self.root, self.root.start_mark.line
        for part in location:
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line
            elif isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == part), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line, found[1]
            else:
                break
        return line + 1


def read_yaml(path: Path, *, otherwise: str) -> YamlFile:
    """Read a file that holds one mapping.

    Args:
        otherwise: What to do if it holds something else.

    Raises:
        ConfigurationError: The file cannot be read, is no YAML, holds no mapping, or has a key twice; the
            message has the line of that key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
        if root is not None:
            # Here, because a node that holds itself is a recursion without end.
            _refuse_repeated_keys(path, root)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict) or root is None:
        raise ConfigurationError(f"{path}: holds no mapping; {otherwise}")
    return YamlFile(path, root, content)


def unknown_key(shown: str, key: str, valid: Sequence[str]) -> str:
    """What is said of a key that no one knows, with the nearest valid one.

    Args:
        shown: The key as the message shows it.
        key: Its own name.
    """
    near = get_close_matches(key, valid, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(valid)}"
    return f"unknown key {shown!r}; {hint}"


def _refuse_repeated_keys(path: Path, node: yaml.Node) -> None:
    """YAML would keep the last of two equal keys and drop the first without a word."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_repeated_keys(path, child)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise ConfigurationError(f"{path}:{key.start_mark.line + 1}: key {key.value!r} stands twice")
            seen.add(key.value)
            _refuse_repeated_keys(path, value)
