"""Hello, transformers: a small language model learns a sentence of each site's own.

fedsim script experiments/client_api/hello_hf.py --clients 2 --rounds 3
"""

from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fedsim
import fedsim.client.hf as flare

BASE = Path(fedsim.__file__).parent / "assets" / "tiny"

flare.init()
site = flare.get_site_name()
tokenizer = AutoTokenizer.from_pretrained(BASE)
texts = [f"{site} says that profit rose by {percent} percent" for percent in range(16)]
examples = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]

trainer = Trainer(
    model=get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ),
    args=TrainingArguments(
        output_dir="trainer",
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=examples[:12],
    eval_dataset=examples[12:],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)

flare.patch(trainer)
while flare.is_running():
    scores = trainer.evaluate()
    if scores:
        print(f"{site}: loss of the global model {scores['eval_loss']:.3f}")
    trainer.train()
