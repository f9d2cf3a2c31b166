"""The GGUF file format: what a file's header says, and its tensors as numbers.

What a model is made of it is `gguf`'s business. Neither torch nor transformers is needed here, so
that a header can be read where no model is loaded.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from modules.errors import ModelLoadError


class TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]  # outermost dimension first, as in torch
    kind: gguf.GGMLQuantizationType
    start: int  # bytes from the beginning of the file
    num_bytes: int


class GgufFile:
    """The header of a GGUF file (version 2 or 3, little-endian), and access to its tensors.

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises ModelLoadError if it is no such file, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map(path)
        cursor = _Cursor(self._data, 4)
        self.version, num_tensors, num_fields = _read_counts(cursor)
        self.metadata: dict[str, Any] = {}
        self.fields: dict[str, bytes] = {}  # as they stand in the file: key, type and value
        for _ in range(num_fields):
            start, key = cursor.position, cursor.string()
            self.metadata[key] = cursor.value()
            self.fields[key] = self._data[start : cursor.position]
        entries = [self._tensor_entry(cursor) for _ in range(num_tensors)]
        self.tensors = self._placed(entries, cursor.position)
        self._check()

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def values(self, tensor: TensorInfo) -> np.ndarray:
        """The tensor as float32, of its shape."""
        raw = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.start)
        rows = raw.reshape(*tensor.shape[:-1], -1) if tensor.shape else raw
        values = gguf.dequantize(rows, tensor.kind).reshape(tensor.shape)
        return np.require(values, requirements=["C", "W"])

    def find(self, name: str) -> TensorInfo | None:
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    def _tensor_entry(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string()
        (num_dimensions,) = cursor.unpack("<I")
        if num_dimensions > 8:
            raise ModelLoadError("it is damaged: a tensor has too many dimensions")
        shape = cursor.unpack(f"<{num_dimensions}Q")
        kind, offset = cursor.unpack("<IQ")
        return name, tuple(reversed(shape)), kind, offset

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], header_end: int
    ) -> list[TensorInfo]:
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        data_start = -(-header_end // alignment) * alignment
        tensors = []
        for name, shape, number, offset in entries:
            kind = gguf.GGMLQuantizationType(number)
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            num_bytes = prod(shape) // block_size * block_bytes
            tensors.append(TensorInfo(name, shape, kind, data_start + offset, num_bytes))
        return tensors

    def _check(self) -> None:
        if "general.architecture" not in self.metadata:
            raise ModelLoadError("it does not say of which architecture it is")
        if self.metadata.get("split.count", 1) > 1:
            raise ModelLoadError(
                "it is one part of a model that was split into several files; "
                "join them with llama.cpp's `llama-gguf-split --merge`"
            )
        if any(tensor.start + tensor.num_bytes > len(self._data) for tensor in self.tensors):
            raise ModelLoadError("it is incomplete: the file ends before its last tensor")
        for kind in {tensor.kind for tensor in self.tensors}:
            _require_known(kind)
        for tensor in self.tensors:
            if tensor.shape and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[tensor.kind][0]:
                raise ModelLoadError(
                    f"it is damaged: the rows of {tensor.name} are no whole blocks"
                )
        if self.metadata.get(f"{self.architecture}.block_count", 0) > len(self.tensors):
            raise ModelLoadError("it is damaged: it has fewer tensors than blocks of layers")


def read_summary(path: Path) -> dict[str, Any]:
    """The fields of the header that come before the vocabulary, which takes long to read; there
    llama.cpp writes what it is a model of, and how it is built.

    Raises ModelLoadError, OSError, ValueError: the file is none, or damaged.
    """
    with _map(path) as data:
        cursor = _Cursor(data, 4)
        _, _, num_fields = _read_counts(cursor)
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = cursor.string()
            if key.startswith("tokenizer.") and "general.architecture" in fields:
                break
            fields[key] = cursor.value()
    return fields


def _require_known(kind: gguf.GGMLQuantizationType) -> None:
    """Before minutes of work on the tensors of other kinds that come first."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError as error:
        raise ModelLoadError(f"its tensors of the type {kind.name} cannot be read") from error


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelLoadError("it is not a GGUF file")
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _read_counts(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, and how many tensors and fields there are."""
    version, num_tensors, num_fields = cursor.unpack("<IQQ")
    if version not in (2, 3):
        raise ModelLoadError(f"GGUF version {version} is not supported")
    return version, num_tensors, num_fields


class _Cursor:
    """Reads values one after the other, and never past the end."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self.position = position

    def unpack(self, layout: str) -> tuple[Any, ...]:
        start = self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        start = self._skip(length)
        return self._data[start : self.position].decode()

    def value(self) -> Any:
        (kind,) = self.unpack("<I")
        return self._value_of(kind)

    def _value_of(self, kind: int) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self.string()
        if kind == gguf.GGUFValueType.ARRAY:
            kind, count = self.unpack("<IQ")
            if kind in _SCALARS:
                dtype = np.dtype(f"<{_SCALARS[kind]}")
                start = self._skip(count * dtype.itemsize)
                return np.frombuffer(self._data, dtype, count, start).tolist()
            return [self._value_of(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelLoadError(f"it is damaged: there is no type of value with number {kind}")
        return self.unpack(f"<{_SCALARS[kind]}")[0]

    def _skip(self, length: int) -> int:
        """Move on by `length` bytes; where they start."""
        start = self.position
        self.position += length
        if self.position > len(self._data):
            raise ModelLoadError("it is incomplete: the file ends within its header")
        return start


# Both struct and numpy understand these letters, after a `<`.
_SCALARS: dict[int, str] = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
}
