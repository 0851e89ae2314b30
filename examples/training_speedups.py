"""Same mathematics as the `xlstm` package's CPU cells, arranged for faster training.

Only training uses this: the metrics that the examples report come from the unmodified package.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from xlstm.blocks.mlstm.backends import chunkwise_simple
from xlstm.blocks.mlstm.cell import mLSTMCell
from xlstm.blocks.slstm.cell import sLSTMCell_vanilla

MLSTM_CHUNK = 64


def use_fast_cells(model: nn.Module) -> None:
    """Replace, in place, the forward functions of all cells; sequences must divide into chunks of 64."""
    for module in model.modules():
        if isinstance(module, mLSTMCell):
            module.backend_fn = mlstm_chunkwise
        elif isinstance(module, sLSTMCell_vanilla):
            module._impl = partial(slstm_scan, module)


def mlstm_chunkwise(
    queries: torch.Tensor,  # (B, NH, S, DH)
    keys: torch.Tensor,  # (B, NH, S, DH)
    values: torch.Tensor,  # (B, NH, S, DH)
    igate_preact: torch.Tensor,  # (B, NH, S, 1)
    fgate_preact: torch.Tensor,  # (B, NH, S, 1)
    lower_triangular_matrix: torch.Tensor,  # unused: the chunkwise form makes its own masks
) -> torch.Tensor:  # (B, NH, S, DH)
    """The package's chunkwise form behind the signature of its parallel form.

    The parallel form keeps several (S, S) matrices per head; chunks keep (64, 64) ones.
    """
    return chunkwise_simple(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        igate_preact.squeeze(-1),
        fgate_preact.squeeze(-1),
        chunk_size=MLSTM_CHUNK,
    )


def slstm_scan(
    cell: sLSTMCell_vanilla,
    training: bool,
    inputs: torch.Tensor,  # (S, B, 4 * NH * DH), gates i, f, z, o
    states: torch.Tensor,  # (4, B, NH * DH), must be zero
) -> torch.Tensor:  # (1, S + 1, B, NH * DH)
    """The sLSTM recurrence from a zero state, without in-place writes.

    The vanilla loop writes each step into one large tensor, so that its backward pass copies the
    whole tensor once per step: quadratic in S. A list and one `stack` at the end are linear.
    """
    steps, batch, _ = inputs.shape
    heads, dim = cell.config.num_heads, cell.config.head_dim
    kernel = cell._recurrent_kernel_.transpose(1, 2)  # (NH, DH, 4 * DH)
    raw = (inputs + cell._bias_).view(steps, batch, 4, heads, dim)
    raw = raw.permute(0, 3, 1, 2, 4).reshape(steps, heads, batch, 4 * dim)

    first, *rest = raw.unbind(0)  # each (NH, B, 4 * DH)
    # With n = 0 the first step has no past: its stabilizer is the input gate itself.
    m, _, z, o = first.chunk(4, dim=-1)
    c, n = torch.tanh(z), torch.ones_like(m)
    y = torch.sigmoid(o) * c
    outputs = [torch.zeros_like(y), y]
    for step in rest:
        i, f, z, o = torch.baddbmm(step, y, kernel).chunk(4, dim=-1)
        log_f = m + F.logsigmoid(f)
        m = torch.maximum(i, log_f)
        i_gate, f_gate = torch.exp(i - m), torch.exp(log_f - m)
        c = f_gate * c + i_gate * torch.tanh(z)
        n = f_gate * n + i_gate
        y = torch.sigmoid(o) * c / n
        outputs.append(y)
    stacked = torch.stack(outputs)  # (S + 1, NH, B, DH)
    return stacked.transpose(1, 2).reshape(1, steps + 1, batch, heads * dim)
