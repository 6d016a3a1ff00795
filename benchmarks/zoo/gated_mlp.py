"""A gated MLP: SiLU of one projection times another, then a third."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, features, hidden_features):
        super().__init__()
        self.gate = nn.Linear(features, hidden_features, bias=False)
        self.up = nn.Linear(features, hidden_features, bias=False)
        self.down = nn.Linear(hidden_features, features, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


batch_size = 2048
features = 4096
hidden_features = 8192


def get_inputs():
    return [torch.rand(batch_size, features)]


def get_init_inputs():
    return [features, hidden_features]
