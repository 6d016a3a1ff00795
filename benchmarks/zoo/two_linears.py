"""Two Linears, each with a chain of its own."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, in_features, hidden_features, out_features):
        super().__init__()
        self.first = nn.Linear(in_features, hidden_features)
        self.second = nn.Linear(hidden_features, out_features)

    def forward(self, x):
        x = F.hardswish(self.first(x)) * 1.5
        return torch.tanh(F.elu(self.second(x)))


batch_size = 1024
in_features = 4096
hidden_features = 8192
out_features = 4096


def get_inputs():
    return [torch.rand(batch_size, in_features)]


def get_init_inputs():
    return [in_features, hidden_features, out_features]
