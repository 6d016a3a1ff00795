"""One Linear, Swish written out, then a learned scale and shift by column."""

import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.gemm = nn.Linear(in_features, out_features)
        self.scale = nn.Parameter(torch.rand(out_features) + 0.5)
        self.shift = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        y = self.gemm(x)
        return torch.sigmoid(y) * y * self.scale + self.shift


batch_size = 2048
in_features = 2048
out_features = 8192


def get_inputs():
    return [torch.rand(batch_size, in_features)]


def get_init_inputs():
    return [in_features, out_features]
