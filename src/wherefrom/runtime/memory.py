"""How much memory there is and what a batch takes: free bytes, out-of-memory errors, batch sizes that fit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from wherefrom.runtime.errors import MemoryLimitError, first_line
from wherefrom.runtime.placement import is_sharded_tensor

# Enough tokens a batch to fill the matrix units; more only costs memory.
_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}
# The part of the free memory that is used by default, and of that what a batch may take.
FREE_SHARE, _BATCH_SHARE = 0.8, 0.3
# What PyTorch, CUDA's pinned memory, cuBLAS, cuSOLVER and the system (for a mapping) say in plain RuntimeErrors.
_OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "Cannot allocate memory",
)  # fmt: skip


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, PyTorch's cache included; on the host, within its container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + cached
    return int(min(psutil.virtual_memory().available, memory_left()))


def usable_memory(device: torch.device, budget: int | None) -> int:
    """Bytes to plan with: the budget, but no more than what is free; without one, most of what is free."""
    free = free_memory(device)
    return int(FREE_SHARE * free) if budget is None else min(budget, free)


def pinned_as(tensor: Tensor, source: Tensor) -> Tensor:
    """A tensor on the host in pinned memory if what it was made of is, so that a GPU copies it without a wait."""
    return tensor.pin_memory() if source.is_pinned() and not tensor.is_pinned() else tensor


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error says that an allocation failed: PyTorch on the CPU raises a plain RuntimeError for it."""
    plainly = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return plainly or any(words in str(error) for words in _OUT_OF_MEMORY)


@contextmanager
def within_memory(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """Raise a `MemoryLimitError` with the numbers when an allocation has failed.

    Args:
        what: that does not fit, as the beginning of a sentence, such as "Gradients of 8 queries do".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryLimitError(f"{what} not fit into memory ({shortage(error, device)}). {advice}") from error


def shortage(error: RuntimeError | MemoryError, device: torch.device) -> str:
    """What is free on a device, and what the allocator says that was requested."""
    reason = first_line(error) or "the size is not known"
    return f"{free_memory(device) / 2**30:.2f} GiB free on {device}; {reason}"


@dataclass(frozen=True)
class Footprint:
    """What one example takes.

    Attributes:
        tokens: vectors that a layer sees, the most of any layer.
        saved_bytes: what autograd and hooks keep for the backward pass.
        gradient_bytes: the largest layer's gradient, or what is captured of it if that is more.
        flop: floating-point operations of a forward and backward pass.
        layer_tokens: vectors that each layer sees, where they differ from `tokens`.
        shared_bytes: what autograd keeps once for a batch of any size: weights cast to another type.
        largest_bytes: the largest tensor that autograd keeps, such as logits; its own gradient is as large.
    """

    tokens: int
    saved_bytes: int
    gradient_bytes: int
    flop: int
    layer_tokens: Mapping[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    largest_bytes: int = 0

    def tokens_of(self, layer: str) -> int:
        """Vectors that one layer sees."""
        return self.layer_tokens.get(layer, self.tokens)

    @property
    def bytes(self) -> int:
        """Memory for each example of a batch.

        A layer's gradient lives up to three times at once, itself, rotated, squared. The gradient of the largest saved
        tensor, which a loss makes first, is gone by then.
        """
        return self.saved_bytes + max(3 * self.gradient_bytes, self.largest_bytes)

    def batch_bytes(self, examples: int) -> int:
        """Memory for a batch."""
        return self.shared_bytes + examples * self.bytes

    def affordable(self, available: int) -> int:
        """The largest batch that takes no more than the available bytes; 0 when a single example takes more."""
        return max(0, available - self.shared_bytes) // self.bytes

    def filling(self, device: torch.device) -> int:
        """The smallest batch that fills a device; larger ones only take more memory."""
        return max(1, _TOKENS_PER_BATCH.get(device.type, 4096) // self.tokens)

    def batch_size(self, examples: int, usable: int, device: torch.device) -> int:
        """As many examples as fill the device and take no more than a share of the usable bytes; at least one."""
        return max(1, min(examples, self.affordable(int(_BATCH_SHARE * usable)), self.filling(device)))


def halved(tried: Sequence[int], smallest: int, sweep: str, reason: str, device: torch.device) -> int:
    """The next batch size to try after those that did not fit; a `MemoryLimitError` where the smallest did not.

    Args:
        reason: the `shortage`.
    """
    batch_size = tried[-1]
    if batch_size <= smallest:
        examples = "a single example does" if batch_size == 1 else f"a batch of {batch_size} examples does"
        raise MemoryLimitError(
            f"{sweep}: {examples} not fit into memory ({reason}; batches of {', '.join(map(str, tried))} were tried). "
            "Shorten the sequences, track fewer layers, or use a device with more memory."
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return max(smallest, batch_size // 2)


class SavedBytes:
    """Counts what autograd saves for the backward pass.

    Each storage counts once, with its own size, however many views of it are saved.

    Args:
        model: its weights and buffers are saved too, and take nothing.

    Attributes:
        total: bytes that belong to the examples of a batch; largest: of the largest storage among them.
        shared: bytes of weights cast to another type, which a batch of any size saves once.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = list(model.parameters())
        whole = [each for each in (*weights, *model.buffers()) if not is_sharded_tensor(each)]
        # By storage rather than by address: without numbers, on the "meta" device, all addresses are 0.
        self._seen = {StorageWeakRef(each.untyped_storage()) for each in whole}
        # A cast weight, or a sharded one that is put together for each pass, is known by nothing but its shape.
        self._cast = {_any_order(each) for each in weights}
        self._gathered = {_any_order(each) for each in weights if is_sharded_tensor(each)}
        self._dtypes = {each.dtype for each in weights}
        self.total = self.largest = self.shared = 0

    def counting(self) -> AbstractContextManager[object]:
        """Within it, what a forward pass leaves for the backward pass is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.count, lambda tensor: tensor)

    def count(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is saved until the backward pass, and hand it back."""
        storage = tensor.untyped_storage()
        reference, shape, size = StorageWeakRef(storage), _any_order(tensor), storage.nbytes()
        if reference in self._seen:
            return tensor
        self._seen.add(reference)
        cast = tensor.is_floating_point() and tensor.dtype not in self._dtypes
        # Weights are frozen, so that what is made of them alone requires no gradient, unlike activations.
        if cast and shape in self._cast and not tensor.requires_grad:
            self.shared += size
        elif shape not in self._gathered:
            self.total += size
            self.largest = max(self.largest, size)
        return tensor


def _any_order(tensor: Tensor) -> tuple[int, ...]:
    return tuple(sorted(tensor.shape))


class Workspace:
    """One buffer for a result that every batch makes anew.

    Above 32 MiB, glibc returns freed memory to the system each time, and touching fresh pages costs a CPU as much as
    the product that fills them.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of any content, of the type and on the device of `like`, that overwrites the last one."""
        count = math.prod(shape)
        if self._buffer is None or self._buffer.numel() < count or self._buffer.dtype != like.dtype:
            self._buffer = None  # or both would be there at once
            self._buffer = like.new_empty(count)
        return self._buffer[:count].view(*shape)

    def release(self) -> None:
        """Give the memory back."""
        self._buffer = None


_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
# Of each version: the limit, what is used, and the part of that which is given back when it is needed.
_CGROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_left() -> float:
    """Bytes until the first limit of a control group that this process is in; infinite without one."""
    return min((_left(folder, version) for folder, version in _groups()), default=math.inf)


def _groups() -> Iterator[tuple[Path, int]]:
    """The groups that limit memory, each with its version: limits of those around it hold too."""
    with contextlib.suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root, version = (_ROOT / "memory", 1) if controllers else (_ROOT, 2)
                group = Path(path.lstrip("/"))
                # In a container, its own group is what it sees as the root, whatever the path says.
                yield from ((root / each, version) for each in (group, *group.parents))


def _left(folder: Path, version: int) -> float:
    limit_file, used_file, reclaimable = _CGROUP_FILES[version]
    try:
        limit, used = (folder / limit_file).read_text().strip(), int((folder / used_file).read_text())
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return math.inf
    return math.inf if limit == "max" else max(0, int(limit) - used + int(entries.get(reclaimable, 0)))
