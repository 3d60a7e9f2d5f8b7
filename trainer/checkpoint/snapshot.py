"""A copy of a nest of tensors in host memory that is allocated once and used again and again.

Fresh memory costs several times the copy itself (the kernel clears every page at its first touch), so all tensors are
copied into one block that was touched before. Knows nothing of files.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64  # bytes: a cache line, and more than any element's size
_WORTH_A_THREAD = 16 << 20  # bytes: copying them takes a few ms, starting a thread 0.1
_PLAIN = (str, int, float, bool, bytes, type(None))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece:
    """Bytes that are copied in one go, and the tensors that are views of them."""

    source: Tensor
    size: int  # bytes
    views: tuple[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...], int], ...]  # (number, dtype, shape, strides, offset in elements)

    @property
    def layout(self) -> tuple[Any, ...]:
        return self.size, self.views


class Snapshot:
    """Copies nested states into its own memory. One copy at a time: the next `take` overwrites the last."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._layouts: list[tuple[Any, ...]] = []
        self._targets: list[tuple[Tensor, list[Tensor]]] = []  # per piece: where its bytes go, and the views of them
        self._stream: torch.cuda.Stream | None = None
        self._copied: Any = None  # the CUDA event after the copy

    def reserve(self, size: int, device: torch.device | None = None) -> None:
        """Allocate and touch `size` bytes; pinned where `device` is a GPU, so that copies run beside computation."""
        if self._block.numel() >= size:
            return
        self._targets, self._layouts = [], []
        self._block = torch.empty(0, dtype=torch.uint8)  # give the old memory back first
        self._block = torch.empty(size, dtype=torch.uint8).fill_(0)
        if device is not None and device.type == "cuda":
            _pin(self._block, device)

    @property
    def size(self) -> int:
        """Bytes reserved."""
        return self._block.numel()

    def take(self, state: Any) -> Any:
        """`state` with every tensor replaced by its copy, and every container by a plain one.

        On a GPU this returns before the copy is done; training's next kernels wait for it on the device, `finish()` on the host.
        """
        tensors: list[Tensor] = []
        skeleton = _strip(state, tensors, "checkpoint")
        pieces = _pieces(tensors)
        self._lay_out(pieces)
        copies: list[Tensor] = [torch.empty(0)] * len(tensors)
        for piece, (_, views) in zip(pieces, self._targets, strict=True):
            for (number, *_), view in zip(piece.views, views, strict=True):
                copies[number] = view
        self._copy(pieces)
        return _fill(skeleton, copies)

    def finish(self) -> None:
        """Wait until the last copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, pieces: list[_Piece]) -> None:
        device = next((p.source.device for p in pieces if p.source.is_cuda), None)
        if device is None:
            copy_in_two(list(zip((target for target, _ in self._targets), (piece.source for piece in pieces), strict=True)))
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        main = torch.cuda.current_stream(device)
        self._stream.wait_stream(main)  # the state as of now, not as of some earlier kernel
        with torch.cuda.stream(self._stream):
            for piece, (target, _) in zip(pieces, self._targets, strict=True):
                target.copy_(piece.source, non_blocking=True)
            self._copied = self._stream.record_event()
        # What comes next on the device may overwrite the weights, or get the memory of a temporary that is still being read.
        main.wait_stream(self._stream)

    def _lay_out(self, pieces: list[_Piece]) -> None:
        """Give every piece its place in the block; remembered, as states hardly ever change their shape."""
        layouts = [piece.layout for piece in pieces]
        if layouts == self._layouts:
            return
        self.reserve(sum(_aligned(piece.size) for piece in pieces), next((p.source.device for p in pieces if p.source.is_cuda), None))
        memory = self._block.numpy()
        self._targets, at = [], 0
        for piece in pieces:
            # A storage of its own for each piece: torch.save writes whole storages, and the block is one for all.
            storage = torch.from_numpy(memory[at : at + piece.size]).untyped_storage()
            views = [torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride) for _, dtype, shape, stride, offset in piece.views]
            target = torch.empty(0, dtype=torch.uint8).set_(storage) if _is_bytes(piece) else views[0]
            self._targets.append((target, views))
            at += _aligned(piece.size)
        self._layouts = layouts


def copy_in_two(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, half of the bytes in a thread of its own.

    One core alone cannot use up the memory's bandwidth: two take 0.6 of the time. torch's own threads would do the same, but
    launchers set OMP_NUM_THREADS=1, torchrun among them.
    """
    total, done, split = sum(target.nbytes for target, _ in pairs), 0, 0
    while split < len(pairs) and 2 * done < total:
        done += pairs[split][0].nbytes
        split += 1
    failed: list[BaseException] = []

    def copy(part: list[tuple[Tensor, Tensor]]) -> None:
        try:
            for target, source in part:
                target.copy_(source)
        except BaseException as error:  # told to whoever asked for the copy
            failed.append(error)

    beside = threading.Thread(target=copy, args=(pairs[split:],), name="snapshot") if total > _WORTH_A_THREAD else None
    if beside is not None:
        beside.start()
        copy(pairs[:split])
        beside.join()
    else:
        copy(pairs)
    if failed:
        raise failed[0]


def state_size(state: Any) -> tuple[int, torch.device | None]:
    """The bytes a snapshot of `state` needs, and the GPU it lies on, if any."""
    tensors: list[Tensor] = []
    _strip(state, tensors, "checkpoint")
    pieces = _pieces(tensors)
    return sum(_aligned(p.size) for p in pieces), next((p.source.device for p in pieces if p.source.is_cuda), None)


def _strip(value: Any, tensors: list[Tensor], at: str) -> Any:
    """Plain containers with a `_Slot` in the place of every tensor. Refuses what a reader with `weights_only` would refuse."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return _Slot(len(tensors) - 1)
    if isinstance(value, Mapping):
        for key in value:
            assert isinstance(key, str | int), f"{at}: a key is {key!r}; use text or integers"
        return {k: _strip(v, tensors, f"{at}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_strip(v, tensors, f"{at}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.generic):  # a metric that numpy computed
        return value.item()
    raise TypeError(
        f"{at} holds a {type(value).__module__}.{type(value).__qualname__}; only tensors, numbers, text, lists, tuples and dicts can be saved"
    )


def _fill(skeleton: Any, copies: list[Tensor]) -> Any:
    if isinstance(skeleton, _Slot):
        return copies[skeleton.number]
    if isinstance(skeleton, dict):
        return {k: _fill(v, copies) for k, v in skeleton.items()}
    if isinstance(skeleton, list):
        return [_fill(v, copies) for v in skeleton]
    if isinstance(skeleton, tuple):
        return tuple(_fill(v, copies) for v in skeleton)
    return skeleton


@dataclass(frozen=True, slots=True)
class _Slot:
    number: int


def _pieces(tensors: list[Tensor]) -> list[_Piece]:
    """What to copy. Tensors that share memory (tied weights, views of one flat buffer) are copied together and share it again."""
    shared: dict[tuple[Any, int], list[int]] = {}
    for number, tensor in enumerate(tensors):
        assert tensor.layout == torch.strided, f"a {tensor.layout} tensor cannot be saved"
        storage = tensor.untyped_storage()
        # Empty tensors all have address 0.
        shared.setdefault((tensor.device, storage.data_ptr() or -number - 1), []).append(number)
    pieces = []
    for numbers in shared.values():
        storage = tensors[numbers[0]].untyped_storage()
        used = sum(tensors[n].numel() * tensors[n].element_size() for n in numbers)
        same = len({tensors[n].dtype for n in numbers}) == 1  # torch.save refuses one storage under two types
        if len(numbers) > 1 and same and used >= storage.nbytes():
            whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            views = tuple((n, t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset())) for n, t in ((n, tensors[n]) for n in numbers))
            pieces.append(_Piece(whole, storage.nbytes(), views))
        else:  # alone, or small cuttings of something large, which need not be saved whole
            pieces.extend(_single(n, tensors[n]) for n in numbers)
    return pieces


def _single(number: int, tensor: Tensor) -> _Piece:
    tensor = tensor.resolve_conj().resolve_neg()
    strides = tensor.stride()
    if not tensor.is_contiguous():  # channels-last stays so; anything with gaps is packed
        strides = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
    return _Piece(tensor, tensor.numel() * tensor.element_size(), ((number, tensor.dtype, tuple(tensor.shape), strides, 0),))


def _is_bytes(piece: _Piece) -> bool:
    """Whether the piece is a whole storage, copied byte by byte."""
    return len(piece.views) > 1


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _pin(block: Tensor, device: torch.device) -> None:
    """Lock the block's pages in memory, so that the GPU reads and writes them by itself.

    Registered after the fact: torch's own pinned allocator rounds up to a power of two, a gigabyte too much for a ViT-B.
    """
    torch.cuda.set_device(device)  # this may run in the writer's thread, which would otherwise open a context on GPU 0
    cudart: Any = torch.cuda.cudart()
    address = block.data_ptr()
    error = cudart.cudaHostRegister(address, block.numel(), 1)  # 1 = cudaHostRegisterPortable: for every context
    if int(error) != 0:
        log.warning(
            "the snapshot's memory (%.2f GB) could not be pinned (CUDA error %s): checkpoints stall training longer",
            block.numel() / 1e9,
            error,
        )
        return
    weakref.finalize(block, cudart.cudaHostUnregister, address)
