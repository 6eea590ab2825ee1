"""LoRA on financial sentiment with transformers' Trainer: four lines make it a federated client."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from site_data import Site
from transformers import Trainer, TrainingArguments

import fedsim.client.hf as flare  # (1) in NVFlare: import nvflare.client.hf as flare

parser = argparse.ArgumentParser()
parser.add_argument("--experiment", required=True)
args = parser.parse_args()

flare.init()
site = Site(args.experiment, flare.get_site_name())
exp, local, lora = site.exp, site.exp.local, site.exp.adapter
config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules)
model = get_peft_model(site.base(), config, autocast_adapter_dtype=exp.model.dtype != "float64")


def metrics(predicted):
    loss, tokens, right = torch.as_tensor(predicted.predictions).double().unbind(1)
    return {"answer_loss": (loss.sum() / tokens.sum()).item(), "accuracy": right.mean().item()}


trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="trainer",
        max_steps=local.steps,
        per_device_train_batch_size=local.micro_batch,
        gradient_accumulation_steps=local.batch_size // local.micro_batch,
        per_device_eval_batch_size=exp.evaluate.batch_size,
        train_sampling_strategy="sequential",  # the examples are in the order of the declared experiment
        optim="adamw_torch",
        learning_rate=local.lr,
        weight_decay=local.weight_decay,
        adam_beta1=local.betas[0],
        adam_beta2=local.betas[1],
        max_grad_norm=local.clip,
        lr_scheduler_type=local.schedule,
        warmup_steps=local.warmup,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=site.train,
    eval_dataset=site.validation,
    data_collator=site.collate,
    preprocess_logits_for_metrics=site.scores,
    compute_metrics=metrics,
)

flare.patch(trainer)  # (2)
while flare.is_running():  # (3)
    trainer.evaluate()  # (4) the global model: the server selects the best one by this
    trainer.train()
