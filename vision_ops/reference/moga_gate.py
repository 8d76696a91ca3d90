import torch.nn.functional as F
from torch import Tensor


def moga_gate(gate: Tensor, value: Tensor, *, double_gate_act: bool = False) -> Tensor:
    """SiLU(gate) * SiLU(value); arguments as in `fused_moga_gate`.

    double_gate_act applies SiLU twice to both, as the official code does with attn_force_fp32=True: weights that were
    trained so need it, whatever the precision.
    """
    gate, value = F.silu(gate), F.silu(value)
    if double_gate_act:
        gate, value = F.silu(gate), F.silu(value)
    return gate * value
