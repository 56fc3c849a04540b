r"""Prunes the weights of a model while its LoRA, or the whole of it, is being tuned.

    J_bar_t = lambda J_bar_(t-1) + (1 - lambda) J_t,      the lowest J_bar go, more of them at each cut

"Pruning meets low-rank parameter-efficient fine-tuning" (LoRAPrune) 2023, arXiv 2305.18403, Algorithm 1 and
Eq. 11. Differs: Eq. 11 prints J_(t-1) of one step before in place of the average. Weights are scored before
the optimizer's step, not after it, so that A, B and their gradients belong together. A weight that is cut
never comes back: W0 is zeroed in place. Gradients are scored as the optimizer gets them, clipped if it clips
them, which changes no ranking within a step, only the weight of that step in the average.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..types import LayerStats
from . import state as states
from .config import PruneConfig
from .groups import Group, base_layer, find_groups
from .layers import PrunedLayer, plain_name, pruned_layers
from .patterns import Unstructured, pattern_of
from .structured import Importances, Units


class Pruner(TrainerCallback):
    """Callback of a `transformers.Trainer` that prunes weights while the model is tuned.

    The model may be a peft LoRA model (or `serpette.weights.sequential` of one), whose layers with LoRA are
    pruned, or a plain one that trains whole. Afterwards `merge_and_unload()` keeps exactly the zeros, and
    `serpette.shrink` makes a structured result smaller. Works with gradient accumulation and checkpointing,
    bf16 and fp16, several processes (DDP), rsLoRA and rank_pattern, and checkpoints, from which a resumed
    training goes on with the same bits.

    Args:
        importance, sparsity, **settings: of `PruneConfig`; or one `PruneConfig`.
        example_inputs: with which a model of no known family is traced for `"structured"`; see `find_groups`.
        resume_from: the checkpoint that the Trainer resumes from, if it lies outside output_dir.

    Attributes:
        masks_: {name: (O, I) bool}, True where a weight stays; names are those after merge_and_unload.
        sparsity_: {name: share of the layer's weights that is cut}.
        history_: [(step, sparsity)] at each cut.
        seconds_: spent in scoring and in cutting.

    Raises:
        ValueError: settings without a meaning; when training begins: nothing to prune, `lora_dropout` above
            0, DoRA, several active adapters, tied weights, layers that do not fit the pattern, a model that
            is pruned already, DeepSpeed or FSDP; on resume another configuration.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> pruner = attach(net, PruneConfig("lora_prune", 0.5), steps=10)
        >>> for _ in range(10):
        ...     loss = net(torch.randn(5, 4)).square().sum()
        ...     loss.backward()
        ...     pruner.step()  # between backward() and the optimizer
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> pruner.finish().sparsity_
        {'0': 0.5}
        >>> int((net.merge_and_unload()[0].weight == 0).sum())
        16
    """

    def __init__(
        self,
        importance: Any = "lora_prune",
        sparsity: float | None = None,
        *,
        example_inputs: Any = None,
        resume_from: str | Path | None = None,
        **settings: Any,
    ):
        if isinstance(importance, PruneConfig):
            if sparsity is not None or settings:
                raise ValueError("give a PruneConfig, or the settings themselves, not both")
            self.config = importance
        else:
            self.config = PruneConfig(importance, 0.5 if sparsity is None else sparsity, **settings)
        self.example_inputs, self.resume_from = example_inputs, resume_from
        if example_inputs is not None and self.config.shrink:
            raise ValueError(
                "a traced model cannot shrink while it trains; leave shrink off, and shrink the result"
            )
        self.method = self.config.method()
        self.history_: list[tuple[int, float]] = []
        self.seconds_, self.skipped_, self.step_ = {"scoring": 0.0, "cutting": 0.0}, 0, 0
        self._layers: dict[str, PrunedLayer] = {}
        self._averages: dict[str, Tensor] = {}
        self._units: Units | None = None
        self._model: nn.Module | None = None
        self._leaving: Any = None

    # a training, step by step

    def begin(self, model: nn.Module, steps: int, optimizer: Any = None) -> Pruner:
        """Finds the layers of `model` and gets ready for a training of `steps` optimizer steps.

        Args:
            optimizer: with `shrink=True`, whose states become smaller with the layers.
        """
        config = self.config
        if "hessian" in self.method.weight_needs:
            raise ValueError(
                f"importance {self.method.name!r} prunes at once; use serpette.prune(model, 'obs')"
            )
        if config.steps is not None and config.steps > steps:
            warnings.warn(
                f"the schedule has steps={config.steps}, the training {steps}: it will end before sparsity "
                f"{config.sparsity:g} is reached",
                stacklevel=2,
            )
        self._scores, self._cuts = config.plan(steps)
        if config.sparsity and 0 < len(self._cuts) < 3 and config.schedule != "one_shot":
            warnings.warn(
                f"a training of {steps} steps leaves {len(self._cuts)} to cut in, at every_k="
                f"{config.interval(steps)}; train longer, or lower every_k",
                stacklevel=2,
            )
        if config.shrink and optimizer is None:
            raise ValueError(
                "shrink=True needs the optimizer, whose states shrink too: attach(..., optimizer=)"
            )
        self._model, self._steps, self._optimizer, self.step_ = model, steps, optimizer, 0
        self._averages, self.history_, self._units = {}, [], None
        self.seconds_, self.skipped_ = {"scoring": 0.0, "cutting": 0.0}, 0
        structured = config.pattern == "structured"
        # before the layers are swapped: a trace does not see through ours
        groups = find_groups(model, config.targets, self.example_inputs) if structured else []
        layers = pruned_layers(model, config.targets, config.exclude, config.mask_grad)
        if structured:
            self._units = self._make_units(model, groups, layers)
            layers = [*self._units.layers.values()]
        self._layers = {layer.name: layer for layer in layers}
        if config.shrink and any(layer.lora and layer.masked.sequential for layer in layers):
            raise ValueError(
                "shrink=True needs a parallel LoRA: W0 B of a sequential one changes with the inputs that "
                "leave; leave shrink off, and shrink the merged model"
            )
        if self._units is None:
            pattern_of(config.pattern).check(config.sparsity, {layer.name: layer.shape for layer in layers})
        if "lora" in self.method.weight_needs and not any(layer.lora for layer in layers):
            raise ValueError(
                f"importance {self.method.name!r} needs LoRA, and {type(model).__name__} has none; "
                "peft.get_peft_model makes one, or use 'magnitude', 'movement' or 'original_gradient'"
            )
        for layer in layers:
            layer.keep_zero()
            if "input_norms" in self.method.weight_needs:
                layer.watch_inputs()
        self._prepare()
        return self

    def _make_units(self, model: nn.Module, groups: list[Group], layers: list[PrunedLayer]) -> Units:
        """Of the groups that have one of the `layers`; their other layers are pruned with them."""
        known = {layer.name: layer for layer in layers}
        groups = [g for g in groups if any(plain_name(member.module) in known for member in g.members)]
        if not groups:
            raise ValueError(
                "pattern='structured' finds no head and no channel with LoRA on one of its layers; add "
                "attention projections or FFN layers to target_modules"
            )
        named = [member.module for group in groups for member in group.members]
        for name in named:
            module = model.get_submodule(name)
            if plain_name(name) not in known and isinstance(base_layer(module), (nn.Linear, nn.Conv2d)):
                known[plain_name(name)] = PrunedLayer(name, module, self.config.mask_grad)
        mine = {plain_name(name) for name in named}
        return Units(
            model,
            groups,
            {n: layer for n, layer in known.items() if n in mine},
            self.config.round_to,
            self.config.scope,
        )

    def _prepare(self) -> None:
        """The gradients of the weights are kept in the next step if that scores."""
        wanted = "gradient" in self.method.weight_needs and self.step_ + 1 in self._scores
        for layer in self._layers.values():
            layer.collect(wanted)
            if layer.lora:
                layer.masked.offset = self.step_ + self.config.seed

    def step(self, optimizer: Any = None, scaler: Any = None) -> None:
        """Scores and cuts if this step is due; between `backward()` and the optimizer's step.

        Args:
            optimizer, scaler: where a `torch.amp.GradScaler` scales the loss. The gradients are unscaled
                here, which `scaler.step` then leaves out.
        """
        scale = 1.0
        if scaler is not None and scaler.is_enabled():
            scale = float(scaler.get_scale())
            optimizer = self._optimizer if optimizer is None else optimizer
            if optimizer is None:
                raise ValueError("the scaler needs its optimizer, too: step(optimizer, scaler)")
            try:
                scaler.unscale_(optimizer)
            except RuntimeError:
                pass  # they are already, for clipping
        self.step_ += 1
        if self.step_ in self._scores:
            start = time.perf_counter()
            self.score(scale)
            self.seconds_["scoring"] += time.perf_counter() - start
        if self.step_ in self._cuts:
            start = time.perf_counter()
            self.cut(self.config.at(self.step_, self._steps))
            self.seconds_["cutting"] += time.perf_counter() - start
        if self._cuts and self.step_ >= self._cuts[-1]:
            self._averages = {}
        self._prepare()

    def finish(self) -> Pruner:
        """Ends the pruning; what is cut stays cut."""
        if self._model is not None:
            for layer in self._layers.values():
                layer.release()
            self._averages, self._model = {}, None
            if self._cuts and self.step_ < self._cuts[-1]:
                warnings.warn(
                    f"the training ended after step {self.step_}, before the last cut at {self._cuts[-1]}: "
                    f"the sparsity is {self.history_[-1][1] if self.history_ else 0.0:g}, not "
                    f"{self.config.sparsity:g}",
                    stacklevel=2,
                )
        return self

    # scoring

    @torch.no_grad()
    def score(self, gradient_scale: float = 1.0, decay: float | None = None) -> None:
        """Takes the present gradients into account; a step whose gradients are not finite is left out.

        Args:
            gradient_scale: what the loss was multiplied by, of the gradients that the layers keep themselves.
            decay: of the average; None: that of the configuration for the steps since the last score.
        """
        stats = {}
        for name, layer in self._layers.items():
            found = layer.stats(self.method.weight_needs, gradient_scale)
            if found is not None:
                _average_over_processes(found)
                stats[name] = found
        gradients = [g for s in stats.values() for g in (s.grad_A, s.grad_B, s.gradient) if g is not None]
        if any(not bool(torch.isfinite(g.sum())) for g in gradients):
            self.skipped_ += 1
            return
        for layer in self._layers.values():
            layer.collect(layer.collecting)  # afresh
        if hasattr(self.method, "update"):
            for found in stats.values():
                self.method.update(found)
        elif self.method.averaged and stats:
            if decay is None:
                decay = self.config.average ** self.config.interval(self._steps)
            if self._units is not None:
                self._average(self._unit_sums(stats), decay)
            else:
                for name, found in stats.items():
                    self._average({name: self.method.of_weights(found)}, decay)

    def _average(self, values: dict[str, Tensor], decay: float) -> None:
        for name, value in values.items():
            if name in self._averages:
                self._averages[name].mul_(decay).add_(value, alpha=1 - decay)
            else:
                self._averages[name] = value.mul_(1 - decay)

    def _unit_sums(self, stats: dict[str, LayerStats]) -> dict[str, Tensor]:
        assert self._units is not None
        return self._units.sums(Importances(self.method.of_weights, stats))

    # cutting

    @torch.no_grad()
    def cut(self, sparsity: float) -> None:
        """Cuts the least important weights or units, up to `sparsity` in all."""
        if self.method.averaged and not self._averages:
            if self.skipped_ < len(self._scores):
                return  # nothing has been scored yet
            raise ValueError(
                "no step had finite gradients, so nothing can be ranked; lower the learning rate"
            )
        if self._units is not None:
            self._cut_units(self._units, sparsity)
        else:
            self._cut_weights(sparsity)
        self.history_.append((self.step_, sparsity))

    def _values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Importances (O, I), averaged or as they are now."""
        if self.method.averaged:
            return {name: self._averages[name] for name in names if name in self._averages}
        return {name: self.method.of_weights(stats) for name, stats in self._without_gradients(names)}

    def _without_gradients(self, names: Iterable[str]) -> Iterator[tuple[str, LayerStats]]:
        for name in names:
            stats = self._layers[name].stats(())
            assert stats is not None
            _average_over_processes(stats)
            yield name, stats

    def _cut_weights(self, sparsity: float) -> None:
        if hasattr(self.method, "keeps"):
            for layer in self._layers.values():
                stats = layer.stats(())
                assert stats is not None
                layer.remove(layer.cut | ~self.method.keeps(stats))
            return
        kind, scope = self.config.pattern, self.config.scope
        by_row = getattr(self.method, "per_row", False) and (kind, scope) == ("unstructured", "layer")
        pattern = Unstructured("row") if by_row else pattern_of(kind, scope)
        names = list(self._layers)
        for part in [names] if scope == "global" else [[name] for name in names]:
            values = self._values(part)
            cuts = pattern(values, {name: self._layers[name].cut for name in values}, sparsity)
            for name, cut in cuts.items():
                self._layers[name].remove(cut)

    def _cut_units(self, units: Units, sparsity: float) -> None:
        if self.method.averaged:
            sums = self._averages
        else:
            sums = self._unit_sums(dict(self._without_gradients(self._layers)))
        if units.choose(sums, sparsity):
            units.apply()
            if self.config.shrink and self._leaving is None:
                self._leaving = self._optimizer.register_step_post_hook(self._shrink)

    def _shrink(self, *args: Any) -> None:
        """After the optimizer's step: what is cut leaves the model, the optimizer and the averages."""
        assert self._units is not None and self._model is not None
        self._leaving.remove()
        self._leaving = None
        kept = self._units.leave(self._model, self.config.targets, self._optimizer)
        self._averages = {name: value[kept[name]] for name, value in self._averages.items()}

    # what came out

    @property
    def layers(self) -> list[PrunedLayer]:
        """The layers that are pruned."""
        return [*self._layers.values()]

    @property
    def masks_(self) -> dict[str, Tensor]:
        """{name: (O, I) bool}, True where a weight stays."""
        if self._units is not None:
            return self._units.masks()
        return {name: ~layer.cut for name, layer in self._layers.items()}

    @property
    def sparsity_(self) -> dict[str, float]:
        """{name: share of the layer's weights that is cut}."""
        return {name: float((~mask).double().mean()) for name, mask in self.masks_.items()}

    def save(self, folder: str | Path) -> Path:
        """Writes `pruning_state.safetensors`: masks, averages, and what a resumed training needs; its path.

        `serpette.weights.restore(model, folder)` reads the masks.
        """
        tensors = {f"average/{name}": value for name, value in self._averages.items()}
        for name, layer in self._layers.items():
            tensors |= {f"state/{name}/{key}": value for key, value in layer.state.items()}
        if self._units is not None:
            tensors |= {f"units/{name}": cut for name, cut in self._units.cut.items()}
        facts = {
            "config": self.config.to_dict(),
            "step": self.step_,
            "history": self.history_,
            "seconds": self.seconds_,
            "skipped": self.skipped_,
        }
        return states.write(folder, {n: layer.cut for n, layer in self._layers.items()}, tensors, facts)

    def load(self, folder: str | Path) -> None:
        """Goes on from what `save` wrote; after `begin`.

        Raises:
            ValueError: no state there, of another configuration, or of another model.
        """
        cuts, tensors, facts = states.read(folder)
        found, mine = facts["config"], json.loads(json.dumps(self.config.to_dict()))
        changed = sorted(k for k in {*found, *mine} if found.get(k) != mine.get(k))
        if changed:
            what = ", ".join(f"{k}: {found.get(k)!r} -> {mine.get(k)!r}" for k in changed)
            raise ValueError(f"{str(folder)!r} was saved with another Pruner ({what}); resume with the same")
        if {n: tuple(c.shape) for n, c in cuts.items()} != {n: v.shape for n, v in self._layers.items()}:
            raise ValueError(
                f"{str(folder)!r} has masks of other layers than the model; resume with the same model"
            )
        self.step_, self.seconds_, self.skipped_ = facts["step"], facts["seconds"], facts["skipped"]
        self.history_ = [(step, sparsity) for step, sparsity in facts["history"]]
        for name, layer in self._layers.items():
            start = f"state/{name}/"
            state = {k[len(start) :]: v.to(layer.device) for k, v in tensors.items() if k.startswith(start)}
            layer.state.update(state)
        devices = {name: layer.device for name, layer in self._layers.items()}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            if kind == "average":
                self._averages[name] = value.to(devices.get(name, "cpu"))
            elif kind == "units":
                assert self._units is not None
                self._units.cut[name] = value
        if self._units is not None:
            self._units.apply()
        elif self.history_:
            for name, cut in cuts.items():
                self._layers[name].remove(cut.to(devices[name]))
        self._prepare()

    # events of the Trainer

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Finds the layers, and on resume what was cut."""
        assert model is not None
        for engine, used in (("DeepSpeed", args.deepspeed), ("FSDP", getattr(args, "fsdp", None))):
            if used:
                raise ValueError(
                    f"Pruner does not work under {engine}, which keeps weights in parts; use DDP"
                )
        if self.config.shrink and args.world_size > 1:
            raise ValueError(
                "shrink=True needs a single process: DDP goes by the shapes of the start; shrink afterwards"
            )
        if state.global_step and self.config.shrink:
            raise ValueError(
                "a training with shrink=True cannot be resumed; start it afresh, or shrink afterwards"
            )
        self.begin(model, state.max_steps, getattr(optimizer, "optimizer", optimizer))
        if state.global_step:
            self.load(self.resume_from or _checkpoint(args, state))
            if self.step_ != state.global_step:
                raise ValueError(
                    f"the pruning state is of step {self.step_}, the Trainer resumes from step "
                    f"{state.global_step}; name the checkpoint that it resumes from with resume_from="
                )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Scores and cuts, between the gradients and the optimizer."""
        scaler = getattr(optimizer, "scaler", None)
        self.step(getattr(optimizer, "optimizer", optimizer), scaler)

    def on_save(self, args, state, control, **kwargs):
        """Writes what a resumed training needs into the checkpoint."""
        if state.is_world_process_zero:
            self.save(_checkpoint(args, state))

    def on_train_end(self, args, state, control, **kwargs):
        """Ends the pruning."""
        self.finish()


def attach(model: nn.Module, config: PruneConfig | Pruner, steps: int, optimizer: Any = None) -> Pruner:
    """A Pruner for a loop of one's own: `step()` between backward and optimizer, `finish()` at the end.

    Args:
        model: see `Pruner`.
        config: what is pruned, and how; or a Pruner.
        steps: optimizer steps of the training.
        optimizer: needed with `shrink=True`.

    Example: see `Pruner`.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be the number of optimizer steps of the training, at least 1")
    return (config if isinstance(config, Pruner) else Pruner(config)).begin(model, steps, optimizer)


def _average_over_processes(stats: LayerStats) -> None:
    """LoRA's gradients are averaged by DDP; what the layers keep themselves is not."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if stats.gradient is not None:
            stats.gradient = stats.gradient / dist.get_world_size()
            dist.all_reduce(stats.gradient)
        if stats.input_norms is not None:
            squares = stats.input_norms.square()
            dist.all_reduce(squares)
            stats.input_norms = squares.sqrt()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
