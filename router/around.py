"""What a block computes around its routed experts: latent projections, identity experts, scales, shared expert, bias.

Shapes: T tokens, D model dim, L width of the rows that travel to the servers, E routed experts, K top-k.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from protos.checkpoint import AroundWeights
from protos.model import BlockSpec

FloatArray = npt.NDArray[np.float32]


class Around:
    """The way into the routed experts of one layer and out of them.

    Args:
        spec: the block.
        weights: its projections, bias and norm, where it has any.
    """

    def __init__(self, spec: BlockSpec, weights: AroundWeights) -> None:
        self.spec = spec
        self._weights = weights
        for is_there, wanted in (
            (weights.latent_in_LD is not None, spec.latent_dim is not None),
            (weights.latent_out_DL is not None, spec.latent_dim is not None),
            (weights.output_bias_D is not None, spec.output_bias),
            (weights.output_norm_D is not None, spec.output_norm_eps is not None),
        ):
            assert is_there == wanted, "the checkpoint reader delivers what the spec asks for"
        self._averages = spec.shared is not None and spec.shared.combine == "average"
        surrounded = spec.latent_dim is not None or spec.output_bias or spec.output_norm_eps is not None
        scaled = self._averages or spec.output_scale != 1.0 or spec.gate.num_identity > 0
        self._plain = not (surrounded or scaled)

    def projection_flops(self, num_tokens: int) -> int:
        """Multiply-adds of one latent projection, 0 where there is none."""
        latent_LD = self._weights.latent_in_LD
        return 0 if latent_LD is None else num_tokens * latent_LD.numel()

    def enter(self, x_TD: Tensor) -> Tensor:
        """The rows that travel: `x_TD` itself, or its latent projection in the model dtype."""
        latent_LD = self._weights.latent_in_LD
        return x_TD if latent_LD is None else F.linear(x_TD.to(latent_LD.dtype), latent_LD)

    def leave(
        self,
        y_TL: FloatArray,
        x_TD: Tensor,
        shared_TD: Tensor | None,
        *,
        expert_TK: npt.NDArray[np.int32],
        weight_TK: FloatArray,
    ) -> Tensor:
        """The block's output [T, D]: everything is added in fp32 and rounded once to the dtype of `x_TD`.

        Args:
            y_TL: sum of all partials.
            x_TD: the block's input.
            shared_TD: output of the shared expert, None where the block has none.
            expert_TK, weight_TK: the effective routing; ids from E on are identity experts.
        """
        if not self._plain:
            y_TL, shared_TD = self._surround(y_TL, x_TD, shared_TD, expert_TK, weight_TK), None
        elif shared_TD is not None:
            y_TL = y_TL + shared_TD.float().numpy()
        # torch has no read-only tensors: a sum that is still in its message's memory is copied.
        output_TD = torch.from_numpy(y_TL if y_TL.flags.writeable else y_TL.copy())
        return output_TD if x_TD.dtype is torch.float32 else output_TD.to(x_TD.dtype)

    def _surround(
        self,
        y_TL: FloatArray,
        x_TD: Tensor,
        shared_TD: Tensor | None,
        expert_TK: npt.NDArray[np.int32],
        weight_TK: FloatArray,
    ) -> FloatArray:
        spec, weights = self.spec, self._weights
        if spec.gate.num_identity:
            share_T = np.where(expert_TK >= spec.gate.num_experts, weight_TK, np.float32(0)).sum(axis=1)
            y_TL = y_TL + share_T[:, None] * x_TD.float().numpy()
        if spec.output_scale != 1.0:
            y_TL = y_TL * np.float32(spec.output_scale)
        y_TD = torch.from_numpy(np.array(y_TL, copy=True))
        if weights.latent_out_DL is not None:
            y_TD = F.linear(y_TD.to(weights.latent_out_DL.dtype), weights.latent_out_DL).float()
        if shared_TD is not None:
            y_TD = y_TD + shared_TD.float()
            if self._averages:
                y_TD = y_TD / 2
        if weights.output_bias_D is not None:
            y_TD = y_TD + weights.output_bias_D.float()
        if spec.output_norm_eps is not None:
            assert weights.output_norm_D is not None, "checked with the weights"
            rms_T1 = y_TD.pow(2).mean(-1, keepdim=True) + spec.output_norm_eps
            y_TD = y_TD * torch.rsqrt(rms_T1) * weights.output_norm_D.float()
        return y_TD.numpy()
