"""Recurrences that a model calls as functions: their cells against the functions."""

from __future__ import annotations

import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from places import ROOT
from refusals import refused
from torch import Tensor, nn

from xlstm_export.errors import BuildError, UsageError
from xlstm_export.lift import functions
from xlstm_export.lift.functions import FunctionCell, register_function
from xlstm_export.lift.lift import Lifted, lift, run_lifted
from xlstm_export.load.checkpoint import load_live
from xlstm_export.trace import export as trace

pytest.importorskip("mlstm_kernels")  # it has no release for Python 3.10
from mlstm_kernels.torch import get_mlstm_kernel, get_mlstm_sequence_kernel
from mlstm_kernels.torch.backend_module import mLSTMBackend, mLSTMBackendConfig

HEADS, DIM = 2, 4
WIDTH = HEADS * DIM
# float64, computed in another order: measured 2e-15.
FLOAT64 = 1e-10
# Parallel kernels add eps to a normalizer in another unit than the recurrence does: measured 3e-8.
WITH_EPS = 1e-6


class Layer(nn.Module):
    """Projections around a function of q, k, v (B, H, S, D) and gates (B, H, S)."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Linear(WIDTH, 3 * WIDTH + 2 * HEADS)
        self.outer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        *vectors, gates = self.inner(x).split([WIDTH] * 3 + [2 * HEADS], -1)
        q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in vectors)
        i, f = (3 * gates).transpose(1, 2).chunk(2, 1)
        h = self.function(q, k, v, i, f)
        return x + self.outer(h.transpose(1, 2).flatten(2))


def model(*functions: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*map(Layer, functions)).to(dtype).eval()


def backend(kernel: str, **options: Any) -> mLSTMBackend:
    config = {"return_last_states": False, "autocast_kernel_dtype": "float32", **options}
    return mLSTMBackend(mLSTMBackendConfig(chunkwise_kernel=kernel, **config))


def pieces(lifted: Lifted, x: Tensor, cuts: tuple[int, ...] = (1, 2, 7)) -> Tensor:
    """The result of a stream that comes in pieces."""
    past, parts = lifted.fresh_state(len(x), x.dtype), []
    for part in x.tensor_split(cuts, 1):
        y, present = run_lifted(lifted.module, (part,), past)
        past = {name.replace("present", "past"): value for name, value in present.items()}
        parts.append(y)
    return torch.cat(parts, 1)


def with_states(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    zeros = q.new_zeros(len(q), HEADS, DIM, DIM)
    kernel = get_mlstm_sequence_kernel("native_sequence__native")
    h, _ = kernel(
        q,
        k,
        v,
        i,
        f,
        c_initial=zeros,
        n_initial=zeros[..., 0],
        m_initial=zeros[:, :, :1, 0],
        return_last_states=True,
        dtype_state=q.dtype,
    )
    return h


KERNELS: dict[str, Callable[..., Tensor]] = {
    "parallel": lambda *x: get_mlstm_kernel("parallel--native_autograd")(*x),
    "fetched before": get_mlstm_kernel("parallel--native_stablef_autograd"),
    "sigmoid": get_mlstm_kernel("parallel--native_siging_autograd"),
    "sigmoid, not normalized": lambda *x: get_mlstm_kernel("parallel--native_siging_autograd")(
        *x, normalize=False
    ),
    "zero states": with_states,
    "module": backend("parallel--native_autograd"),
    "sigmoid module": backend("parallel--native_siging_autograd"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_mlstm_kernels(name: str) -> None:
    """Whole and in pieces; the module is untouched, and so is the function afterwards."""
    module, x = model(KERNELS[name], KERNELS[name]), torch.randn(2, 16, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        done = lift(module, (x,))
        assert [block.cell for block in done.blocks] == ["mlstm", "mlstm"]
        limit = FLOAT64 if name == "zero states" or "sigmoid" in name else WITH_EPS
        assert float((pieces(done, x) - expected).abs().max()) < limit
        assert torch.equal(module(x), expected)
    assert not [part for part in module.modules() if isinstance(part, FunctionCell)]


class Flash(nn.Module):
    """A layer that calls `flashrnn.flashrnn`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        from flashrnn import FlashRNNConfig

        self.config = FlashRNNConfig(
            hidden_dim=WIDTH, num_heads=HEADS, head_dim=DIM, function="slstm", backend="vanilla", **options
        )
        layouts = {"H": HEADS, "G": 4, "D": DIM, "P": DIM}
        self.R = nn.Parameter(torch.randn([layouts[x] for x in self.config.recurrent_shape]) / 2)
        self.b = nn.Parameter(torch.randn([layouts[x] for x in self.config.bias_shape]))
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.zeros = False

    def forward(self, x: Tensor) -> Tensor:
        from flashrnn import flashrnn

        gates = self.inner(x).unflatten(-1, (4, HEADS, DIM))
        states = x.new_zeros(4, len(x), 1, HEADS, DIM) if self.zeros else None
        h, _ = flashrnn(gates, self.R, self.b, states=states, config=self.config)
        return x + h[0].flatten(2)


@pytest.mark.parametrize("recurrent_shape", ["HPGD", "GHDP"])
@pytest.mark.parametrize("zeros", [True, False])
def test_flashrnn(recurrent_shape: str, zeros: bool) -> None:
    pytest.importorskip("flashrnn", reason="pip install --no-deps flashrnn")
    torch.manual_seed(0)
    module = Flash(recurrent_shape=recurrent_shape, bias_shape="HGD").double().eval()
    module.zeros = zeros
    x = 3 * torch.randn(2, 16, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        done = lift(module, (x,))
        assert [block.cell for block in done.blocks] == ["slstm"]
        assert float((pieces(done, x) - module(x)).abs().max()) < FLOAT64


# Names and defaults of fla 0.5's functions, which run on a GPU only; the equations are theirs.
FLA = """
import torch
def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
                     cu_seqlens=None, **kwargs):
    state, rows = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]), []
    decay = torch.zeros_like(q[..., 0]) + (g if g is not None else 0 if g_gamma is None else g_gamma)
    for t in range(q.shape[1]):
        state = decay[:, t].exp()[..., None, None] * state + k[:, t][..., None] * v[:, t][..., None, :]
        rows.append((q.shape[-1] ** -0.5 * q[:, t][..., None, :] @ state)[..., 0, :])
    return torch.stack(rows, 1), None
def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True,
                      head_first=False):
    assert not normalize
    return chunk_simple_gla(q, k, v)
"""


@pytest.mark.parametrize("kind", ["g", "g_gamma", "no decay", "linear"])
def test_linear_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {}
    for path in (
        "fla",
        "fla.ops",
        "fla.ops.simple_gla",
        "fla.ops.simple_gla.chunk",
        "fla.ops.linear_attn",
        "fla.ops.linear_attn.chunk",
    ):
        space[path] = types.ModuleType(path)
        monkeypatch.setitem(sys.modules, path, space[path])
    for path in ("fla.ops.simple_gla.chunk", "fla.ops.linear_attn.chunk"):
        exec(FLA, space[path].__dict__)

    def function(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        q, k, v, f = (x.transpose(1, 2) for x in (q, k, v, f))
        if kind == "linear":
            return (
                space["fla.ops.linear_attn.chunk"]
                .chunk_linear_attn(q, k, v, normalize=False)[0]
                .transpose(1, 2)
            )
        given = {"g": {"g": F.logsigmoid(f)}, "g_gamma": {"g_gamma": -torch.rand(HEADS)}}.get(kind, {})
        return space["fla.ops.simple_gla.chunk"].chunk_simple_gla(q, k, v, **given)[0].transpose(1, 2)

    x = torch.randn(2, 16, WIDTH, dtype=torch.float64)
    module = model(function)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = module(x)
        done = lift(module, (x,))
        past, parts = done.fresh_state(2, x.dtype), []
        for part in x.tensor_split((1, 2, 7), 1):
            torch.manual_seed(1)
            y, present = run_lifted(done.module, (part,), past)
            past = {name.replace("present", "past"): value for name, value in present.items()}
            parts.append(y)
    assert float((torch.cat(parts, 1) - expected).abs().max()) < FLOAT64


# --- Functions of one's own ---------------------------------------------------------------------------


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The adapter of docs/adapters.md, and the function that it is for."""
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    block = next(block for block in blocks if "@register_function" in block)
    module = types.ModuleType("mypackage.kernels")
    module.__dict__["torch"] = torch
    exec(
        "def decayed(x, rate, start=None):\n"
        "    y = torch.zeros_like(x[:, 0]) if start is None else start\n"
        "    rows = []\n"
        "    for row in x.unbind(1):\n"
        "        y = rate * y + row\n"
        "        rows.append(y)\n"
        "    return torch.stack(rows, 1), y\n",
        module.__dict__,
    )
    package = types.ModuleType("mypackage")
    package.kernels = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mypackage", package)
    monkeypatch.setitem(sys.modules, "mypackage.kernels", module)
    monkeypatch.setattr(functions, "FUNCTIONS", dict(functions.FUNCTIONS))
    assert len(block.strip().splitlines()) <= 25
    exec(block, {})
    return module


class Decays(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.rate = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.function(x, self.rate, start=None)
        return y


def test_adapter_of_the_docs(mine: types.ModuleType, tmp_path: Any) -> None:
    """A streaming export of a module that calls the function, twice."""
    torch.manual_seed(0)
    module = nn.Sequential(Decays(mine.decayed), Decays(mine.decayed)).eval()
    x = torch.randn(2, 16, WIDTH)
    with torch.no_grad():
        assert torch.allclose(pieces(lift(module, (x,)), x), module(x), atol=1e-5)
    out = trace.export(load_live(module, x), tmp_path / "out")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    names = [value.name for value in session.get_inputs()]
    feeds = {names[0]: x.numpy(), **{name: torch.zeros(2, WIDTH).numpy() for name in names[1:]}}
    assert len(names) == 3
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(session.run(None, feeds)[0]), module(x), atol=1e-5)


def test_other_threads_reach_the_original(mine: types.ModuleType) -> None:
    module, found = Decays(mine.decayed).eval(), []
    x = torch.randn(1, 4, WIDTH)
    expected = mine.decayed(x, 0.5)[0]

    class Meanwhile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: found.append(mine.decayed(x, 0.5)[0]))
            thread.start()
            thread.join()
            return x

    lift(nn.Sequential(Meanwhile(), module).eval(), (x,))
    assert found
    assert all(torch.equal(y, expected) for y in found)


def test_adapter_that_computes_something_else(mine: types.ModuleType) -> None:
    class Wrong(FunctionCell):
        cell = "wrong"

        def __init__(self) -> None:
            super().__init__(1, WIDTH, {"last": (WIDTH,)})

        def forward(self, x: Tensor, rate: Tensor, start: Any) -> Any:
            self.keep("last", x[:, -1] + self.past("last"))
            return x, None

    register_function("mypackage.kernels.decayed")(lambda **_: Wrong())
    with refused(BuildError, "called_decayed", "computes something else than the original"):
        lift(Decays(mine.decayed).eval(), (torch.randn(2, 4, WIDTH),))


def test_adapter_that_returns_no_cell(mine: types.ModuleType) -> None:
    register_function("mypackage.kernels.decayed")(lambda **_: nn.Identity())
    with refused(BuildError, "returned Identity", "FunctionCell", "None"):
        lift(Decays(mine.decayed).eval(), (torch.randn(2, 4, WIDTH),))


def test_state_of_the_caller_s_own(mine: types.ModuleType) -> None:
    class Starts(Decays):
        def forward(self, x: Tensor) -> Tensor:
            return self.function(x, self.rate, torch.ones_like(x[:, 0]))[0]

    with refused(BuildError, "called_decayed", "called with a state"):
        lift(Starts(mine.decayed).eval(), (torch.randn(2, 4, WIDTH),))


def test_path_that_is_none() -> None:
    with refused(UsageError, "register_function takes the path of a function"):
        register_function("decayed")
