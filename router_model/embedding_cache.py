"""Embeddings cached by content: a prompt is read once by a backbone, however often a router is trained."""

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from router_model.backbone import Backbone, Encoded
from router_model.errors import RouterError

_BATCH = 64
_LOOKUP = 500
_WAIT_S = 30.0
_COLUMNS = "key BLOB PRIMARY KEY, features BLOB NOT NULL, input_tokens INT NOT NULL, truncated INT NOT NULL"

Row = tuple[bytes, int, int]


class EmbeddingCache:
    """A SQLite file of embeddings. Several processes may use it at once."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            RouterError: It cannot be opened or is no such cache.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute(f"CREATE TABLE IF NOT EXISTS embeddings ({_COLUMNS}) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise RouterError(f"{path}: cannot be used as a cache of embeddings: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=_WAIT_S)

    def read(self, keys: Sequence[bytes]) -> dict[bytes, Row]:
        """What is known of some keys."""
        found: dict[bytes, Row] = {}
        with closing(self._connect()) as connection:
            for start in range(0, len(keys), _LOOKUP):
                some = keys[start : start + _LOOKUP]
                marks = ",".join("?" * len(some))
                query = f"SELECT * FROM embeddings WHERE key IN ({marks})"  # noqa: S608, marks only
                rows = connection.execute(query, some)
                found |= {key: (features, tokens, cut) for key, features, tokens, cut in rows}
        return found

    def write(self, rows: Sequence[tuple[bytes, bytes, int, int]]) -> None:
        """Keep some embeddings."""
        with closing(self._connect()) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?)", rows)


def encode_all(
    backbone: Backbone,
    texts: Sequence[str],
    *,
    cache: EmbeddingCache | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Encoded:
    """Encode any number of prompts, in input order, taking from the cache what it has.

    What is new is written after each batch, so that a run that was cut off goes on from there.

    Args:
        progress: Called with the number of prompts done since the last call.
    """
    keys = [_key(backbone, text) for text in texts]
    known = {} if cache is None else cache.read(list(dict.fromkeys(keys)))
    if progress is not None and known:
        progress(sum(key in known for key in keys))
    missing = dict.fromkeys(index for index, key in enumerate(keys) if key not in known)
    # Prompts of like length share a batch with little padding.
    order = sorted(missing, key=lambda index: len(texts[index]))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        encoded = backbone.encode([texts[index] for index in batch])
        rows = [
            (
                keys[index],
                encoded.features_BD[row].tobytes(),
                int(encoded.input_tokens_B[row]),
                int(encoded.truncated_B[row]),
            )
            for row, index in enumerate(batch)
        ]
        if cache is not None:
            cache.write(rows)
        known |= {key: (features, tokens, cut) for key, features, tokens, cut in rows}
        if progress is not None:
            progress(len(batch))
    return _assembled(backbone, [known[key] for key in keys])


def _assembled(backbone: Backbone, rows: Sequence[Row]) -> Encoded:
    features_BD = np.zeros((len(rows), backbone.width), dtype=np.float32)
    for row, (features, _, _) in enumerate(rows):
        features_BD[row] = np.frombuffer(features, dtype=np.float32)
    return Encoded(
        features_BD=features_BD,
        input_tokens_B=np.array([tokens for _, tokens, _ in rows], dtype=np.int64),
        truncated_B=np.array([cut for _, _, cut in rows], dtype=np.bool_),
    )


def _key(backbone: Backbone, text: str) -> bytes:
    """Hash of the text and of all that its features depend on."""
    setting = (backbone.fingerprint, backbone.frame, backbone.max_tokens, *map(str, backbone.views))
    return hashlib.sha256(f"{setting}\x00{text}".encode("utf-8", "surrogatepass")).digest()
