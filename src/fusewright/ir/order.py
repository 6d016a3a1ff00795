"""The order in which a graph's values are computed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from fusewright.ir.graph import Node


def products_last(nodes: Sequence[Node]) -> list[Node]:
    """`nodes`, inputs before users, each product only when nothing else can be placed.

    So whatever else an epilogue reads comes before its product, and the epilogue of one product ends before the next
    product begins. Otherwise the order is kept.
    """
    waiting = {node: len(set(node.inputs)) for node in nodes}
    users: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in set(node.inputs):
            users[source].append(node)
    place = {node: i for i, node in enumerate(nodes)}
    ready = [(node.op == "matmul", place[node], node) for node in nodes if not node.inputs]
    order = []
    while ready:
        *_, node = heapq.heappop(ready)
        order.append(node)
        for user in users[node]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (user.op == "matmul", place[user], user))
    return order
