"""A tower of five Linears with LeakyReLU between them."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(features, features) for _ in range(5)])

    def forward(self, x):
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.01)
        return x


batch_size = 1024
features = 4096


def get_inputs():
    return [torch.rand(batch_size, features)]


def get_init_inputs():
    return [features]
