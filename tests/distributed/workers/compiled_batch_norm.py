"""On each rank: SyncBatchNorm in a compiled network, in one graph, does what it does uncompiled.

Argument: the backend of torch.compile.
"""

import copy

import torch
from torch import nn

from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.batch_norm import SyncBatchNorm


def main(env: DistEnv, backend: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), SyncBatchNorm(4), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), SyncBatchNorm(3)
    )
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend=backend, fullgraph=True, dynamic=False)
    generator = torch.Generator().manual_seed(env.rank)
    for size in (2, 2, 2 - env.rank):
        x = 3 * torch.randn(size, 2, 9, 9, generator=generator) + 1
        results = []
        for model, parameters in ((net, net), (compiled, twin)):
            parameters.zero_grad()
            own = x.clone().requires_grad_()
            y = model(own)
            (y * torch.arange(float(y.shape[-1]))).sum().backward()
            gradients = {f"gradient of {name}": p.grad for name, p in parameters.named_parameters()}
            results.append({"y": y.detach(), "x.grad": own.grad, **gradients, **dict(parameters.named_buffers())})
        for name, expected in results[0].items():
            torch.testing.assert_close(
                results[1][name], expected, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: n + text
            )
