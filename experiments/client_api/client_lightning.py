"""LoRA on financial sentiment with Lightning: four lines make it a federated client."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from site_data import Site
from torch.utils.data import DataLoader
from transformers import get_scheduler

import fedsim.client.lightning as flare  # (1) in NVFlare: import nvflare.client.lightning as flare

parser = argparse.ArgumentParser()
parser.add_argument("--experiment", required=True)
args = parser.parse_args()

flare.init()
site = Site(args.experiment, flare.get_site_name())
exp, local, lora = site.exp, site.exp.local, site.exp.adapter


class Sentiment(LightningModule):
    """A base with LoRA; its adapter alone travels."""

    def __init__(self):
        super().__init__()
        config = LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules
        )
        self.model = get_peft_model(site.base(), config, autocast_adapter_dtype=exp.model.dtype != "float64")

    def training_step(self, batch, number):
        return self.model(**batch).loss

    def on_validation_epoch_start(self):
        self.sums = torch.zeros(3, dtype=torch.float64)

    def validation_step(self, batch, number):
        labels = batch.pop("labels")
        self.sums += site.scores(self.model(**batch).logits, labels).double().sum(0).cpu()

    def on_validation_epoch_end(self):
        loss, tokens, right = self.sums
        self.log_dict({"answer_loss": loss / tokens, "accuracy": right / len(site.validation)})

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=local.lr, betas=tuple(local.betas), weight_decay=local.weight_decay)
        steps = {"num_warmup_steps": local.warmup, "num_training_steps": local.steps * exp.rounds}
        return [optimizer], [{"scheduler": get_scheduler(local.schedule, optimizer, **steps), "interval": "step"}]


def train_batches(round):
    each = local.steps * local.batch_size  # the examples are in the order of the declared experiment
    return DataLoader(site.train[round * each : (round + 1) * each], local.batch_size, collate_fn=site.collate)


module = Sentiment()
trainer = Trainer(
    max_steps=local.steps,
    gradient_clip_val=local.clip,
    precision="64-true" if exp.model.dtype == "float64" else "32-true",
    num_sanity_val_steps=0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
validation = DataLoader(site.validation, exp.evaluate.batch_size, collate_fn=site.collate)

flare.patch(trainer)  # (2)
while flare.is_running():  # (3)
    received = flare.receive()
    trainer.validate(module, validation)  # (4) the global model: the server selects the best one by this
    trainer.fit(module, train_batches(received.current_round))
