"""A tiny Trainer for the callbacks that choose examples while training, and what it did."""

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from serpette.zoo import tiny


def rows(n=37, kind="bert", seed=0, **columns):
    """Token rows whose class (bert) or response (llama: all but the first three tokens) can be learnt."""
    x = torch.randint(3, 100, (n, 8), generator=torch.Generator().manual_seed(seed))
    labels = (x[:, 0] % 3).tolist() if kind == "bert" else [[-100] * 3 + row[3:] for row in x.tolist()]
    ids = [f"r{i}" for i in range(n)]
    held = {"input_ids": x.tolist(), "labels": labels, "id": ids} | columns
    return datasets.Dataset.from_dict(held).with_format("torch")


def model(kind="bert", lora=True, dropout=0.0):
    made = tiny(kind, num_labels=3)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    if not lora:
        return made
    targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    torch.manual_seed(0)
    return get_peft_model(made, LoraConfig(r=4, lora_dropout=dropout, task_type=task, target_modules=targets))


class Diary(TrainerCallback):
    """Learning rate after each step, and the steps and epochs at which things happened."""

    def __init__(self):
        self.rates, self.events = [], []
        self.scaled = False  # whether the Trainer leaves it to the model to divide by the accumulation

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(("evaluate", state.global_step, state.epoch))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step, state.epoch))


def arguments(folder, **options):
    usual = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    return TrainingArguments(str(folder), **(usual | options))


def train(folder, callback, data, net=None, resume=None, cls=Trainer, more=(), **options):
    """(model, diary) after a run of the stock Trainer with `callback`."""
    net = model() if net is None else net
    diary = Diary()
    trainer = cls(
        net,
        arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback, diary, *more],
    )
    trainer.pop_callback(PrinterCallback)
    torch.manual_seed(0)
    diary.scaled = trainer.model_accepts_loss_kwargs
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return net, diary


def orders(n, seed, number, kept=None):
    """Rows of pass `number` in the order in which they are read: the rule, written down once more."""
    kept = torch.arange(n) if kept is None else kept
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return kept[torch.randperm(len(kept), generator=generator)]


class ByHand:
    """A step of the Trainer without a Trainer; `scaled` as in `Diary`."""

    def __init__(self, net, data, scaled, rate=3e-3):
        plain = data.with_format(None)
        self.x, self.y = torch.tensor(plain["input_ids"]), torch.tensor(plain["labels"])
        self.net, self.scaled, self.rate = net.train(), scaled, rate
        self.trained = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, rate, weight_decay=0.0)

    def step(self, batches, share=1.0):
        """`batches`: (rows, weights) each; `share` of the learning rate. Losses of each batch."""
        found = []
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * share
        for batch, weights in batches:
            logits = self.net(input_ids=self.x[batch]).logits
            losses = torch.nn.functional.cross_entropy(logits, self.y[batch], reduction="none")
            ((losses * weights).mean() / (1 if self.scaled else len(batches))).backward()
            found.append(losses.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found


def same(one, other):
    """Whether two models have the same bits."""
    other = other.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


def close(one, other, tolerance=1e-6):
    other = other.state_dict()
    return all(
        torch.allclose(v, other[name], atol=tolerance, rtol=1e-4) for name, v in one.state_dict().items()
    )
