"""A transformer's feed-forward block: GELU (tanh form) between two Linears."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, features, hidden_features):
        super().__init__()
        self.up = nn.Linear(features, hidden_features)
        self.down = nn.Linear(hidden_features, features)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


batch_size = 2048
features = 2048
hidden_features = 8192


def get_inputs():
    return [torch.rand(batch_size, features)]


def get_init_inputs():
    return [features, hidden_features]
