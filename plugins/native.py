"""The C interface of the native libraries (`common/call.h`) for Python: calls on addresses of tensors.

Every library of kernels exports the same functions, whether its kernels run on a GPU, on a CPU, or are GPU
kernels run on a CPU for tests. `NativeLibrary` takes NumPy arrays or PyTorch tensors. It copies nothing, and
checks that they are contiguous and have the shapes and types of the operator's contract.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from xlstm_export.ops.operands import MLSTM, SLSTM, Operator

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from xlstm_export.ops.reference import MlstmGates, SlstmGates

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}


class NativeError(RuntimeError):
    """A library refused a call or failed in it."""


class MlstmCall(ctypes.Structure):
    """`xlstm::Mlstm` of common/call.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "length", "heads", "dk", "dv", "io", "state")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
        *((name, ctypes.c_int32) for name in ("forget_exp", "input_sigmoid", "normalize", "processors")),
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "k", "v", "i", "f", "C0", "n0", "m0", "h", "C", "n", "m")
        ),
    )


class SlstmCall(ctypes.Structure):
    """`xlstm::Slstm` of common/call.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "length", "heads", "dim", "io", "weight")),
        ("forget_max", ctypes.c_float),
        ("forget_exp", ctypes.c_int32),
        ("normalizer_min", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x", "R", "R_scale", "bias", "y0", "c0", "n0", "m0")),
        *((name, ctypes.c_void_p) for name in ("y", "y_n", "c_n", "n_n", "m_n")),
    )


class Array(Protocol):
    """What NumPy arrays and PyTorch tensors have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...


Tensors = Mapping[str, Array]


class NativeLibrary:
    """A loaded library of kernels.

    Args:
        path: the shared library.

    Raises:
        NativeError: the file cannot be loaded or is another library.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._lib = ctypes.CDLL(str(path))
            for op, call in (("mlstm", MlstmCall), ("slstm", SlstmCall)):
                check, workspace, run = (getattr(self._lib, f"xlstm_{op}_{f}") for f in _FUNCTIONS)
                check.argtypes, check.restype = [ctypes.POINTER(call)], ctypes.c_char_p
                workspace.argtypes, workspace.restype = [ctypes.POINTER(call)], ctypes.c_size_t
                run.argtypes = [ctypes.POINTER(call), ctypes.c_void_p, ctypes.c_void_p]
                run.restype = ctypes.c_int
        except (OSError, AttributeError) as error:
            raise NativeError(f"{path} is no library of recurrence kernels: {error}") from error

    def mlstm(
        self,
        tensors: Tensors,
        *,
        scale: float,
        eps: float,
        workspace: Array | None = None,
        context: int | None = None,
        **gates: Unpack[MlstmGates],
    ) -> None:
        """Run `XlstmMlstm`.

        Args:
            tensors: q, k, v, i, f, C0, n0, m0 and the results h, C, n, m, which are written.
            scale, eps, gates: as for `ops.reference.mlstm`.
            workspace: tensor of at least `mlstm_workspace` bytes, where the kernels run on a GPU; host
                memory is allocated when None.
            context: an address, see common/call.h; of a GPU's stream for instance.

        Raises:
            NativeError: a shape or type does not fit, the library refuses the call or fails.
        """
        call = mlstm_call(tensors, scale=scale, eps=eps, **gates)
        self._run("mlstm", call, workspace, context)

    def slstm(
        self,
        tensors: Tensors,
        *,
        workspace: Array | None = None,
        context: int | None = None,
        **gates: Unpack[SlstmGates],
    ) -> None:
        """Run `XlstmSlstm`.

        Args:
            tensors: x, R, R_scale (int8 only), bias, y0, c0, n0, m0 and the results y, y_n, c_n, n_n, m_n.
            gates: as for `ops.reference.slstm`.
            workspace, context: as for `mlstm`.

        Raises:
            NativeError: as `mlstm`.
        """
        call = slstm_call(tensors, **gates)
        self._run("slstm", call, workspace, context)

    def mlstm_workspace(self, call: MlstmCall) -> int:
        """Bytes of scratch memory that `mlstm` needs."""
        return int(self._lib.xlstm_mlstm_workspace(ctypes.byref(call)))

    def slstm_workspace(self, call: SlstmCall) -> int:
        """Bytes of scratch memory that `slstm` needs."""
        return int(self._lib.xlstm_slstm_workspace(ctypes.byref(call)))

    def _run(self, op: str, call: ctypes.Structure, workspace: Array | None, context: int | None) -> None:
        check, size, run = (getattr(self._lib, f"xlstm_{op}_{f}") for f in _FUNCTIONS)
        refusal = check(ctypes.byref(call))
        if refusal is not None:
            raise NativeError(f"{op}: {refusal.decode()}")
        if workspace is None:
            scratch = ctypes.create_string_buffer(size(ctypes.byref(call)) + 256)  # held during the call
            address = _aligned(ctypes.addressof(scratch))
        else:
            address = _address(workspace)
        status = run(ctypes.byref(call), address, context)
        if status != 0:
            raise NativeError(f"{op}: the library failed with error {status}")


_FUNCTIONS = ("check", "workspace", "run")


def mlstm_call(tensors: Tensors, *, scale: float, eps: float, **gates: Unpack[MlstmGates]) -> MlstmCall:
    """The call of `NativeLibrary.mlstm` as a structure; the tensors must outlive it."""
    bound = _bind(MLSTM, tensors)
    return MlstmCall(
        batch=bound.sizes["B"],
        length=bound.sizes["S"],
        heads=bound.sizes["H"],
        dk=bound.sizes["Dk"],
        dv=bound.sizes["Dv"],
        io=bound.types["io"],
        state=bound.types["state"],
        scale=scale,
        eps=eps,
        **_given(MLSTM, gates),
        **bound.addresses,
    )


def slstm_call(tensors: Tensors, **gates: Unpack[SlstmGates]) -> SlstmCall:
    """The call of `NativeLibrary.slstm` as a structure; the tensors must outlive it."""
    bound = _bind(SLSTM, tensors)
    return SlstmCall(
        batch=bound.sizes["B"],
        length=bound.sizes["S"],
        heads=bound.sizes["H"],
        dim=bound.sizes["D"],
        io=bound.types["io"],
        weight=bound.types["weight"],
        **_given(SLSTM, gates),
        **bound.addresses,
    )


def _given(operator: Operator, gates: Mapping[str, object]) -> dict[str, float | int]:
    """The attributes that nobody must give as fields of a call; what is absent has its default."""
    optional = (x for x in operator.attributes if not x.required)
    values = {x: cast(float, gates.get(x.name, x.default)) for x in optional}
    return {x.name: int(value) if x.flag else value for x, value in values.items()}


class _Bound(NamedTuple):
    """Tensors of a call: sizes by axis, types by kind as `common/call.h` numbers them, addresses by name."""

    sizes: dict[str, int]
    types: dict[str, int]
    addresses: dict[str, int]


def _bind(operator: Operator, tensors: Tensors) -> _Bound:
    """Check operands and results: the first tensor with an axis gives its size, the first of a kind its type.

    A scale is an operand only where the weight is int8.
    """
    sizes: dict[str, int] = {}
    types = {"f32": "float32"}
    addresses = {}
    for operand in (*operator.inputs, *operator.outputs):
        if operand.optional and types.get("weight") != "int8":
            continue
        tensor = tensors[operand.name]
        if len(tensor.shape) == len(operand.axes):
            for axis, size in zip(operand.axes, tensor.shape, strict=True):
                sizes.setdefault(str(axis), int(size))
        expected = tuple(axis if isinstance(axis, int) else sizes.get(axis, axis) for axis in operand.axes)
        dtype = types.setdefault(operand.kind, _dtype(tensor))
        addresses[operand.name] = _checked(operand.name, tensor, expected, dtype)
    return _Bound(sizes, {kind: DTYPES[dtype] for kind, dtype in types.items()}, addresses)


def _checked(name: str, tensor: Array, shape: tuple[int | str, ...], dtype: str) -> int:
    if tuple(tensor.shape) != shape:
        raise NativeError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if _dtype(tensor) != dtype:
        raise NativeError(f"{name} is {_dtype(tensor)}, expected {dtype}")
    if not _is_contiguous(tensor):
        raise NativeError(f"{name} is not contiguous")
    return _address(tensor)


def _is_contiguous(tensor: Array) -> bool:
    if hasattr(tensor, "is_contiguous"):
        return bool(tensor.is_contiguous())
    return bool(cast("np.ndarray", tensor).flags.c_contiguous)


def _dtype(tensor: Array) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise NativeError(f"no kernel takes {name}; they take {', '.join(DTYPES)}")
    return name


def _address(tensor: Array) -> int:
    if hasattr(tensor, "data_ptr"):
        return int(tensor.data_ptr())
    return int(cast("np.ndarray", tensor).ctypes.data)


def _aligned(address: int) -> int:
    return (address + 255) // 256 * 256
