"""Tensors to and from messages. Bytes are moved as they are: no NumPy (it has no bfloat16), no pickle."""

from __future__ import annotations

import ctypes
import math
import warnings

import torch
from torch import Tensor

from afd.errors import InvalidRequest
from afd.v1 import tensor_pb2 as pb

_DTYPES: dict[torch.dtype, pb.Dtype] = {
    torch.float32: pb.DTYPE_FLOAT32,
    torch.bfloat16: pb.DTYPE_BFLOAT16,
    torch.int32: pb.DTYPE_INT32,
    torch.float8_e4m3fn: pb.DTYPE_FLOAT8_E4M3FN,
}

# A received tensor is only read: that its buffer is not writable is as it should be.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def dtype_to_proto(dtype: torch.dtype) -> pb.Dtype:
    return _DTYPES[dtype]


def to_proto(tensor: Tensor) -> pb.Tensor:
    """A message with a copy of the tensor's bytes."""
    host = tensor.detach().to("cpu").contiguous()
    return pb.Tensor(
        dtype=_DTYPES[tensor.dtype],
        shape=tensor.shape,
        inline=ctypes.string_at(host.data_ptr(), host.nbytes) if host.nbytes else b"",
    )


def dtype_from_proto(dtype: pb.Dtype) -> torch.dtype:
    """Raises InvalidRequest for a dtype that no tensor here has."""
    for ours, theirs in _DTYPES.items():
        if theirs == dtype:
            return ours
    raise InvalidRequest(f"{dtype_name(dtype)} is not a dtype of frames")


def from_proto(name: str, message: pb.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor in the message, on the CPU and without a copy. Raises InvalidRequest, before anything is allocated,
    unless it has exactly this dtype, shape and number of bytes."""
    if message.dtype != _DTYPES[dtype]:
        raise InvalidRequest(f"{name} is {dtype_name(message.dtype)}, not {dtype_name(_DTYPES[dtype])}", name)
    if tuple(message.shape) != shape:
        raise InvalidRequest(f"{name} is {list(message.shape)}, not {list(shape)}", name)
    num_bytes = math.prod(shape) * dtype.itemsize
    if len(message.inline) != num_bytes:
        raise InvalidRequest(f"{name} has {len(message.inline)} bytes, but its shape asks for {num_bytes}", name)
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(message.inline, dtype=dtype).view(shape)


def dtype_name(dtype: int) -> str:
    name = pb.Dtype.Name(dtype) if dtype in pb.Dtype.values() else f"dtype {dtype}"
    return name.removeprefix("DTYPE_").lower()
