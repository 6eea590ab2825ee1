"""A line fitted by each site to its own noisy points: one linear layer, plain PyTorch."""

import torch

import fedsim.client as flare  # in NVFlare: import nvflare.client as flare

flare.init()
net, loss_of = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
x = torch.rand(64, 1)  # of the site's own stream
y = 2 * x - 1 + 0.1 * torch.randn(64, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
while flare.is_running():
    model = flare.receive()
    if model.params:
        net.load_state_dict({name: torch.as_tensor(value) for name, value in model.params.items()})
    with torch.no_grad():
        loss = loss_of(net(x), y).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(net(x), y).backward()
        optimizer.step()
    answer = {"params": net.state_dict(), "metrics": {"loss": loss}, "meta": {"NUM_STEPS_CURRENT_ROUND": 10}}
    flare.send(flare.FLModel(**answer))
