"""A residual MLP block whose branch has a learned scale by column."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, features, hidden_features):
        super().__init__()
        self.first = nn.Linear(features, hidden_features)
        self.second = nn.Linear(hidden_features, features)
        self.branch = nn.Parameter(torch.full((features,), 0.1))

    def forward(self, x):
        return x + self.branch * self.second(F.gelu(self.first(x)))


batch_size = 4096
features = 1024
hidden_features = 4096


def get_inputs():
    return [torch.rand(batch_size, features)]


def get_init_inputs():
    return [features, hidden_features]
