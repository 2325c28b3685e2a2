"""What a router says of one prompt, as bytes: what a decision is made from, and what a cache keeps of it."""

import hashlib
import json
import math
import struct
import zlib

import numpy as np

from router_model.outlook import FloatArray, Parts, RouterOutput, TopDeviations

FORM_VERSION = 1
"""Raise it when the meaning of a row or of a key changes: older rows are never read again."""

_MAGIC = b"po"
_HEAD = struct.Struct("<2sBBIQ32s")
"""Magic, version, flags, number of values, tokens of the prompt, key. The values, float32, follow."""
_CHECK = struct.Struct("<I")
"""Last of a row: CRC-32 of all before."""
_TRUNCATED, _OUT_OF_DISTRIBUTION = 1, 2


class OutlookForm:
    """How one router's view of a prompt is written as a row of bytes, and read back.

    A row holds what the heads say of the prompt, so it serves every alpha and every option. What the router
    says of all prompts alike is not in it. Decisions are made from rows alone, whether a row was just written
    or comes from a cache, so that both give the same answer to the last bit.

    Args:
        example: Any output of the router: it shows which heads there are.
        checkpoint_id: Stands for the weights and for how a prompt becomes tokens.
        engine: Stands for the arithmetic that the backbone runs in.
    """

    def __init__(self, example: RouterOutput, *, checkpoint_id: str, engine: str) -> None:
        top = example.parts_F.top
        self._traits = example.traits
        self._top_alphas = () if top is None else top.alphas
        self._shapes = {
            name: _shape_of_one(values, axis) for name, (values, axis) in _sections(example).items()
        }
        self._n_values = sum(map(math.prod, self._shapes.values()))
        self._n_bytes = _HEAD.size + 4 * self._n_values + _CHECK.size
        scope = json.dumps([FORM_VERSION, checkpoint_id, engine])
        self._scope = hashlib.sha256(f"{scope}\n".encode())

    def key(self, text: str) -> bytes:
        """What counts as the same prompt for this router: 32 bytes that hash all that a row depends on.

        Args:
            text: The prompt as ``tokenization.prompt_text`` renders it.
        """
        digest = self._scope.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.digest()

    def pack(self, output: RouterOutput, row: int, key: bytes) -> bytes:
        """The row of one prompt of an output, its key inside."""
        sections = [values.take(row, axis).ravel() for values, axis in _sections(output).values()]
        flags = _TRUNCATED * bool(output.truncated_B[row])
        flags |= _OUT_OF_DISTRIBUTION * bool(output.out_of_distribution_B[row])
        n_tokens = int(output.input_tokens_B[row])
        head = _HEAD.pack(_MAGIC, FORM_VERSION, flags, self._n_values, n_tokens, key)
        content = head + np.concatenate(sections).astype("<f4").tobytes()
        return content + _CHECK.pack(zlib.crc32(content))

    def accepts(self, key: bytes, row: bytes) -> bool:
        """Whether these bytes are the whole, undamaged row of this router for this key.

        A store can hand out a foreign value (a reply left on a connection by a cancelled command), so the
        key inside is compared with the key asked for.
        """
        if len(row) != self._n_bytes:
            return False
        magic, version, _, n_values, _, written_key = _HEAD.unpack_from(row)
        if (magic, version, n_values, written_key) != (_MAGIC, FORM_VERSION, self._n_values, key):
            return False
        (check,) = _CHECK.unpack_from(row, self._n_bytes - _CHECK.size)
        return bool(check == zlib.crc32(row[: -_CHECK.size]))

    def unpack(self, row: bytes) -> RouterOutput:
        """The router's output for one prompt, from a row that ``pack`` wrote or ``accepts`` accepted."""
        _, _, flags, n_values, n_tokens, _ = _HEAD.unpack_from(row)
        values_V = np.frombuffer(row, "<f4", n_values, _HEAD.size).astype(np.float64)
        sections = self._split(values_V)
        top = sections.get("top")
        return RouterOutput(
            traits=self._traits,
            parts_F=Parts(
                sections["quality"],
                sections.get("learnability"),
                None if top is None else TopDeviations(self._top_alphas, top),
            ),
            fixed_FBM=sections.get("fixed"),
            quality_BM=sections["raw_quality"],
            learnability_BM=sections["raw_learnability"],
            input_tokens_B=np.array([n_tokens]),
            truncated_B=np.array([bool(flags & _TRUNCATED)]),
            out_of_distribution_B=np.array([bool(flags & _OUT_OF_DISTRIBUTION)]),
        )

    def _split(self, values_V: FloatArray) -> dict[str, FloatArray]:
        """The sections of one prompt's values, each with a B axis of length 1."""
        sections: dict[str, FloatArray] = {}
        start = 0
        for name, shape in self._shapes.items():
            end = start + math.prod(shape)
            sections[name] = values_V[start:end].reshape(shape)
            start = end
        return sections


def _sections(output: RouterOutput) -> dict[str, tuple[FloatArray, int]]:
    """What a row holds, in order: the arrays that there are, and which of their axes counts the prompts."""
    parts = output.parts_F
    sections = {
        "quality": (parts.quality, 1),
        "learnability": (parts.learnability, 1),
        "top": (None if parts.top is None else parts.top.values, 1),
        "fixed": (output.fixed_FBM, 1),
        "raw_quality": (output.quality_BM, 0),
        "raw_learnability": (output.learnability_BM, 0),
    }
    return {name: (values, axis) for name, (values, axis) in sections.items() if values is not None}


def _shape_of_one(values: FloatArray, axis: int) -> tuple[int, ...]:
    return (*values.shape[:axis], 1, *values.shape[axis + 1 :])
