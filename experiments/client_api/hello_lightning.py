"""Hello, Lightning: a classifier of points on a plane; each site sees one half of it.

fedsim script experiments/client_api/hello_lightning.py --clients 2 --rounds 3
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedsim.client.lightning as flare


class Classifier(LightningModule):
    """Two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, number):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, number):
        self.log("val_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def points(count, half=None):
    at = torch.rand(count, 2, generator=torch.Generator().manual_seed(count)) * 2 - 1
    if half is not None:
        at[:, 0] = at[:, 0].abs() * half
    return TensorDataset(at, (at.prod(1) > 0).long())


flare.init()
site = flare.get_site_name()
train = DataLoader(points(256, half=-1 if site.endswith("1") else 1), batch_size=16, shuffle=True)
validation = DataLoader(points(200), batch_size=200)

module = Classifier()
trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

flare.patch(trainer)
while flare.is_running():
    trainer.validate(module, validation, verbose=False)
    print(f"{site}: accuracy of the global model {trainer.callback_metrics['val_accuracy']:.3f}")
    trainer.fit(module, train)
