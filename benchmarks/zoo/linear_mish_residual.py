"""One Linear, Mish twice, and a residual from a second input."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.gemm = nn.Linear(in_features, out_features)

    def forward(self, x, residual):
        return F.mish(F.mish(self.gemm(x))) + residual


batch_size = 2048
in_features = 4096
out_features = 4096


def get_inputs():
    return [torch.rand(batch_size, in_features), torch.rand(batch_size, out_features)]


def get_init_inputs():
    return [in_features, out_features]
