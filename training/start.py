"""Starting a run from the weights of another one, with other data and other classes: `train.py --init RUN`."""

from dataclasses import replace
from pathlib import Path

import torch

from runtime.errors import UserError
from training.checkpoint import load_model, read_model
from training.config import TrainConfig
from training.state import TrainState

NOT_SHAPE = {"in_channels", "num_classes", "solver", "random_steps"}  # what the data and the flags of a run decide
SAME = ("timesteps", "schedule", "prediction_type")  # what the weights have learned to answer


def shaped_like_source(config: TrainConfig) -> TrainConfig:
    """`config` with the shape of the network that `config.init` has, where the config says nothing else.

    A source of another model, which `start_from` refuses, changes nothing. Raises UserError if it cannot be read.
    """
    _, about = read_model(str(config.init))
    if about["model"] != config.model:
        return config
    shape = {name: value for name, value in about["model_config"].items() if name not in NOT_SHAPE}
    return replace(config, model_config=shape | config.model_config)


@torch.no_grad()
def start_from(path: str | Path, state: TrainState) -> str:
    """Take over the weights of a run or `model.safetensors` into `state` at step 0; returns a line that says what.

    The vectors of classes are taken over by the classes' names; a class that the source lacks starts as no class. With
    other colour channels the first and the last layer start anew, and so does everything that has another shape. Raises
    UserError, naming --init and the mend, if the source is of another model or diffusion process.
    """
    source, _, about = load_model(path)
    own = state.about
    if about["model"] != own["model"]:
        raise UserError(f"--init: {path} is of the model {about['model']}; add --model {about['model']}")
    for name in SAME:
        if about[name] != own[name]:
            flag = f"--{name.replace('_', '-')} {about[name]}"
            raise UserError(f"--init: {path} was trained with {flag}, this run has {own[name]}; add {flag}")
    weights, target = source.state_dict(), state.model.state_dict()
    taken = [name for name, value in target.items() if name in weights and weights[name].shape == value.shape]
    for name in taken:
        target[name].copy_(weights[name])
    new = [name for name in target if name not in taken]
    said = []
    if own["model_config"]["num_classes"] and hasattr(state.model, "embedding"):
        name = "embedding.classes.weight"
        new = [other for other in new if other != name]
        before = list(about["classes"]) if about["model_config"]["num_classes"] else []
        known = [label for label in own["classes"] if label in before]
        nothing = weights[name][-1] if before else torch.zeros_like(target[name][-1])
        target[name].copy_(nothing.expand_as(target[name]))
        for label in known:
            target[name][own["classes"].index(label)] = weights[name][before.index(label)]
        said.append(f"{len(known)} of {len(own['classes'])} classes")
    if not taken:
        raise UserError(f"--init: {path} has no weights that fit this model")
    for mean, value in zip(state.ema.parameters(), state.model.parameters(), strict=True):
        mean.copy_(value)
    said.insert(0, f"{len(taken)} of {len(target)} tensors of {path}")
    return "; ".join([f"{' and '.join(said)} taken over", *([f"new: {', '.join(new)}"] if new else [])])
