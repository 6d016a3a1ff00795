"""One Linear, then a chain: scale, clamp, GELU, scale."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, in_features, out_features, factor, limit):
        super().__init__()
        self.gemm = nn.Linear(in_features, out_features)
        self.factor = factor
        self.limit = limit

    def forward(self, x):
        y = torch.clamp(self.gemm(x) * self.factor, -self.limit, self.limit)
        return F.gelu(y) / self.factor


batch_size = 1024
in_features = 8192
out_features = 4096
factor = 1.5
limit = 3.0


def get_inputs():
    return [torch.rand(batch_size, in_features)]


def get_init_inputs():
    return [in_features, out_features, factor, limit]
