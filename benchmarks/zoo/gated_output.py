"""Two Linears on one input: a sigmoid gate mixes what one computes with the input."""

import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.candidate = nn.Linear(features, features)
        self.gate = nn.Linear(features, features)

    def forward(self, x):
        gate = torch.sigmoid(self.gate(x))
        return gate * torch.tanh(self.candidate(x)) + (1 - gate) * x


batch_size = 2048
features = 4096


def get_inputs():
    return [torch.rand(batch_size, features)]


def get_init_inputs():
    return [features]
