"""Lazy weights of a graph: shape and type are known, values are computed when the file is written.

A model may be larger than the memory. So graph passes never read the values of a large initializer. They
replace it by a tensor derived from it (transposed, joined, converted), whose values are computed from its
sources while the file is written, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

# Elements up to which a pass may look at values (biases, norm weights, conv taps); never a matrix.
SMALL = 1 << 16


def lazy(
    compute: Callable[[], np.ndarray], dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.LazyTensor:
    """A tensor of `dtype` and `shape` whose values `compute` returns, each time they are read."""
    return ir.LazyTensor(
        lambda: ir.Tensor(np.asarray(compute(), order="C"), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        cache=False,
        name=name,
    )


def transposed(source: ir.TensorProtocol, perm: Sequence[int], name: str) -> ir.LazyTensor:
    """`source` with its axes permuted."""
    shape = [_size(source, axis) for axis in perm]
    return lazy(lambda: _contiguous(source.numpy().transpose(perm)), source.dtype, shape, name)


def concatenated(sources: Sequence[ir.TensorProtocol], axis: int, name: str) -> ir.LazyTensor:
    """`sources`, of one type, joined along `axis`."""
    shape = [int(dim) for dim in sources[0].shape]
    shape[axis] = sum(_size(source, axis) for source in sources)
    return lazy(
        lambda: np.concatenate([source.numpy() for source in sources], axis=axis),
        sources[0].dtype,
        shape,
        name,
    )


def is_small(value: ir.Value) -> bool:
    """Whether `value` is an initializer or constant whose values a pass may read."""
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size <= SMALL


def _size(tensor: ir.TensorProtocol, axis: int) -> int:
    return int(tensor.shape.numpy()[axis])


def _contiguous(view: np.ndarray) -> np.ndarray:
    """A copy in row order. torch permutes in blocks and with all cores, several times faster than NumPy."""
    import torch

    bits = {2: np.int16, 4: np.int32, 8: np.int64}.get(view.dtype.itemsize)
    if bits is None:
        return np.ascontiguousarray(view)
    return torch.from_numpy(view.view(bits)).contiguous().numpy().view(view.dtype)
