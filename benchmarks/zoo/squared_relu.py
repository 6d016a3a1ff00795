"""A feed-forward block without biases whose activation is the square of ReLU."""

import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, features, hidden_features):
        super().__init__()
        self.up = nn.Linear(features, hidden_features, bias=False)
        self.down = nn.Linear(hidden_features, features, bias=False)

    def forward(self, x):
        return self.down(torch.square(torch.relu(self.up(x))))


batch_size = 2048
features = 2560
hidden_features = 10240


def get_inputs():
    return [torch.rand(batch_size, features)]


def get_init_inputs():
    return [features, hidden_features]
