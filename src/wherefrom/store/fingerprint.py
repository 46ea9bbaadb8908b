"""What makes two runs the same: digests of model weights and datasets, and the comparison of two descriptions.

A fingerprint is a flat mapping of readable names to readable values or digests, so that a refusal can say what changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.runtime.placement import is_sharded_tensor, read_tensor

Fingerprint = Mapping[str, str]

Example_co = TypeVar("Example_co", covariant=True)


class Dataset(Protocol[Example_co]):
    """Anything with a length and integer positions: a list, a torch Dataset, a Hugging Face Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Example_co: ...


# Entries that say what a result is about, and one that tells a reader something and tells no two results apart.
QUERIES, TRAIN, MODEL, LEFT_OUT, UNIT = "queries", "training data", "model", "left out", "unit"
# Entries that are others for each set of queries.
BY_QUERIES = (QUERIES, "candidates", "tokens")
_ADVICE = "Give the queries, the training set and the model that were scored, or score these."
_DIGITS = 24  # hexadecimal, of a digest in a fingerprint
# Bytes that one thread hashes at a time. SHA-256 of a whole is not made of those of its parts, so that a digest depends
# on this number, and on nothing else: not on how many threads there are.
_PIECE = 2**20


def model_digest(model: nn.Module) -> str:
    """The structure of a model and every byte of its parameters and buffers, sharded over processes or not."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    digest = hashlib.sha256()
    known: dict[Hashable, str] = {}  # tied weights are read once
    with _hashing() as pool:
        # One by one: weights that were offloaded may not fit into memory together.
        for name, value in sorted(state.items()):
            same = _identity(value)
            found = known.get(same) or _tensor_digest(read_tensor(model, name, value), pool)
            if same is not None:
                known[same] = found
            digest.update(f"{name} {found}\n".encode())
    structure = repr(model).replace("FSDP", "")  # what fully_shard puts before the names of classes
    return _sha256((structure + digest.hexdigest()).encode()).hex()[:_DIGITS]


def _identity(tensor: Tensor) -> Hashable:
    """Equal for tensors, all alive, that are the same numbers in the same memory; None where that cannot be told."""
    if tensor.is_meta or type(tensor) not in {Tensor, nn.Parameter}:  # sharded or quantized ones have no address
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Names, dtypes, shapes and bytes of tensors, as a SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with _hashing() as pool:
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {_tensor_digest(tensor, pool)}\n".encode())
    return digest.hexdigest()


def _hashing() -> ThreadPoolExecutor:
    """Threads to hash in, as many as PyTorch computes with; none is started before there is something to do."""
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="wherefrom-hashing")


def _tensor_digest(tensor: Tensor, pool: ThreadPoolExecutor) -> str:
    """The dtype, shape and bytes of a tensor: the SHA-256 of those of its pieces, which threads find side by side."""
    if type(tensor).__module__.startswith("torchao."):  # numbers of few bits, and what they are multiplied with
        parts, settings = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        described = [f"{part} {_tensor_digest(getattr(tensor, part), pool)}" for part in parts]
        return _sha256("\n".join([*described, str(settings)]).encode()).hex()
    data = _bytes(tensor)
    pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
    digests = pool.map(_sha256, pieces) if len(pieces) > 1 else map(_sha256, pieces)
    header = f"{tensor.dtype} {list(tensor.shape)}\n".encode()
    return _sha256(header + b"".join(digests)).hex()


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def dataset_digest(dataset: Dataset[object]) -> str:
    """Every example of a dataset, in order; refuses an empty one, and values that have no bytes of their own."""
    count, digest = checked_length("The dataset", dataset), hashlib.sha256()
    for position in range(count):
        digest.update(_example_bytes(dataset, position) + b"\n")
    return f"{count} examples {digest.hexdigest()[:_DIGITS]}"


def example_digests(dataset: Dataset[object]) -> Tensor:
    """A digest of each example by itself, 64 bits of a SHA-256 as int64 [examples]; refuses as `dataset_digest`."""
    count = checked_length("The dataset", dataset)
    found = (_sha256(_example_bytes(dataset, position))[:8] for position in range(count))
    return torch.tensor([int.from_bytes(each, "big", signed=True) for each in found])


def _example_bytes(dataset: Dataset[object], position: int) -> bytes:
    example = read_example(dataset, position)
    try:
        return json.dumps(example, sort_keys=True, default=_describe).encode()
    except (TypeError, ValueError, RecursionError, RuntimeError, InputError) as error:
        raise InputError(
            f"Example {position} of the dataset cannot be fingerprinted ({error}). Expected numbers, strings, "
            "tensors, arrays or images, in lists or dicts with names for keys."
        ) from error


def checked_length(name: str, dataset: Dataset[object]) -> int:
    """How many examples a dataset has; refuses one that is empty, or no dataset."""
    try:
        count = len(dataset)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} is a {type(dataset).__name__} whose length cannot be told ({error}). Expected anything with len "
            "and integer positions."
        ) from error
    if count == 0:
        raise InputError(f"{name} is empty: expected at least one example. Check the path or the filter.")
    return count


def read_example(dataset: Dataset[object], position: int) -> object:
    """One example, by its position; an error of the dataset's own code is raised as it is, with a note."""
    try:
        return dataset[position]
    except (IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"Example {position} of the dataset, a {type(dataset).__name__} of length {len(dataset)}, cannot be read "
            f"({type(error).__name__}: {error}). Expected examples at the positions 0 to {len(dataset) - 1}."
        ) from error
    except Exception as error:
        error.add_note(
            f"wherefrom was reading example {position} of a {type(dataset).__name__} of length {len(dataset)}."
        )
        raise


def names_summary(names: Sequence[str]) -> str:
    """A list of names on one short line that differs whenever the list does."""
    digest = _sha256("\n".join(names).encode()).hex()[:8]
    return f"{len(names)}, {names[0]} to {names[-1]} ({digest})"


def differences(stored: Fingerprint, current: Fingerprint) -> list[str]:
    """What differs, a readable phrase for each name."""
    return [
        f"{name}: stored {stored.get(name, 'nothing')}, now {current.get(name, 'nothing')}"
        for name in sorted({*stored, *current} - {LEFT_OUT})
        if stored.get(name) != current.get(name)
    ]


def _describe(value: object) -> object:
    """What json cannot write: tensors, arrays and images, as their kind, shape and bytes."""
    if isinstance(value, Tensor):
        data = _bytes(value)
    elif str(getattr(value, "dtype", "")) == "object":
        raise InputError("it holds an array of Python objects")  # whose bytes are addresses
    elif callable(getattr(value, "tobytes", None)):
        data = value.tobytes()  # type: ignore[attr-defined]  # numpy arrays and PIL images
    elif isinstance(value, Mapping):
        return dict(value)
    elif isinstance(value, Sequence):
        return list(value)
    else:
        raise InputError(f"it holds a {type(value).__name__}")
    kind = f"{type(value).__name__} {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')}"
    return [kind, _sha256(data).hex()]


def _bytes(tensor: Tensor) -> memoryview:
    if is_sharded_tensor(tensor):
        tensor = tensor.full_tensor()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def subjects(fingerprint: Fingerprint) -> dict[str, str]:
    """The digests of a result's queries, training examples and model, of those that it has."""
    return {name: fingerprint[name] for name in (QUERIES, TRAIN, MODEL) if name in fingerprint}


def unlike(result: Fingerprint, shown: Mapping[str, str]) -> list[str]:
    """What a result is about and what it would be shown beside, where they differ, a readable phrase for each.

    What only one of them says is not compared: self-influence has no queries, and scores made by hand say nothing.

    Args:
        shown: digests of `dataset_digest` and `model_digest` under the names of this module.
    """
    about = subjects(result)
    return [
        f"{name}: scored {about[name]}, given {digest}"
        for name, digest in shown.items()
        if about.get(name, digest) != digest
    ]


def check_about(result: Fingerprint, shown: Mapping[str, str], advice: str = _ADVICE) -> None:
    """Raise a `MismatchError` where a result would be shown beside anything but what it is about, as by `unlike`."""
    found = unlike(result, shown)
    if found:
        raise MismatchError(f"The scores belong to something else. {'; '.join(found)}. {advice}")
