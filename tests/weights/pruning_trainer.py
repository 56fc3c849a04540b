"""The stock Trainer on a tiny Llama whose next tokens can be learnt."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from serpette.weights import sequential
from serpette.zoo import tiny

USUAL = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "seed": 1,
}


def rows(n=24):
    x = torch.randint(3, 100, (n, 8), generator=torch.Generator().manual_seed(0))
    x[:, 1::2] = x[:, ::2]
    return [{"input_ids": row, "labels": row} for row in x]


def llama(kind="lora"):
    model = tiny("llama")
    if kind == "plain":
        return model
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return sequential(model) if kind == "sequential" else model


def trainer_of(folder, pruner, model, data=None, callbacks=(), **options):
    arguments = TrainingArguments(str(folder), **(USUAL | options))
    trainer = Trainer(model, arguments, train_dataset=data or rows(), callbacks=[pruner, *callbacks])
    trainer.pop_callback(PrinterCallback)
    return trainer


def train(folder, pruner, model=None, resume=None, **options):
    """The model after 12 steps."""
    model = llama() if model is None else model
    trainer = trainer_of(folder, pruner, model, **options)
    torch.manual_seed(0)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return model
