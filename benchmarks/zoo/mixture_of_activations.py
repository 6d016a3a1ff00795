"""One Linear; a learned mixture, by column, of four activations."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.gemm = nn.Linear(in_features, out_features)
        self.weights = nn.ParameterList([nn.Parameter(torch.rand(out_features)) for _ in range(4)])

    def forward(self, x):
        y = self.gemm(x)
        relu, tanh, silu, softplus = self.weights
        return relu * F.relu(y) + tanh * torch.tanh(y) + silu * F.silu(y) + softplus * F.softplus(y)


batch_size = 1024
in_features = 4096
out_features = 8192


def get_inputs():
    return [torch.rand(batch_size, in_features)]


def get_init_inputs():
    return [in_features, out_features]
