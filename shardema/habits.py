"""What other EMA libraries call what `ShardedEMA` does, for those who try these names first."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from shardema.errors import ArgumentTypeError, linked

_F = TypeVar("_F", bound=Callable[..., Any])

_UPDATE = "ema.update() after optimizer.step(), or ema.attach(optimizer) once"
_SWAP = "`with ema.swap():`, which brings the weights back at its end"
_COPY = "ema.copy_to_model(), which replaces the weights for good"
_TENSORS = "ema.iter_full() or ema.full_state_dict(), which are collective"
_MODULE = "ema(x), `with ema.swap():`, or ShardedEMA(..., into=teacher) for a module of its own"
_MEMORY = 'ShardedEMA(..., shadow=ShadowPolicy(device="cpu")); averages lie beside the weights'
_MODE = "model.eval() inside `with ema.swap():`; ema(x) leaves the mode as it is"
_DECAY = "ema.metrics(), which has the decay of the last update"

# by the name that is tried: the call that does it
_CALLS = {
    **dict.fromkeys(
        (
            "step",
            "step_ema",
            "update_ema",
            "update_parameters",
            "ema_update",
            "update_average",
            "update_moving_average",
            "add_to_optimizer_post_step_hook",
        ),
        _UPDATE,
    ),
    **dict.fromkeys(
        ("store", "restore", "apply_shadow", "average_parameters", "apply_ema", "use_ema"), _SWAP
    ),
    **dict.fromkeys(
        ("copy_to", "copy_params_from_ema_to_model", "copy_params", "assign_to"), _COPY
    ),
    **dict.fromkeys(
        (
            "parameters",
            "named_parameters",
            "buffers",
            "named_buffers",
            "shadow",
            "shadow_params",
            "model_state_dict",
            "get_model_state_dict",
        ),
        _TENSORS,
    ),
    **dict.fromkeys(
        ("module", "ema_model", "ema", "averaged_model", "model", "online_model", "forward"),
        _MODULE,
    ),
    **dict.fromkeys(("to", "cpu", "cuda", "half", "float", "device", "pin_memory"), _MEMORY),
    **dict.fromkeys(("eval", "train", "requires_grad_"), _MODE),
    **dict.fromkeys(("decay", "get_decay", "cur_decay_value", "get_current_decay"), _DECAY),
    **dict.fromkeys(
        ("set", "copy_params_from_model_to_ema", "reset_num_updates"),
        "ema.reset(), which begins again with the weights",
    ),
    **dict.fromkeys(
        ("optimization_step", "initted", "n_averaged", "updates"),
        "ema.metrics(), which has num_updates and t",
    ),
    "set_decay": "ShardedEMA(model, schedule): a schedule says the decay of each step",
    "save_pretrained": "ema.export(folder), which from_pretrained reads",
    "from_pretrained": "ema.load_full(folder)",
    "save_checkpoint": "ema.save(folder)",
    "load_checkpoint": "ema.load(folder)",
    "register_for_checkpointing": "shardema.integrations.accelerate.attach(accelerator, ...), "
    "which saves and loads it with the accelerator's state",
}


# what a training loop of another library sets in the middle of a run
_SET = frozenset(
    (
        "decay",
        "beta",
        "momentum",
        "schedule",
        "cur_decay_value",
        "update_every",
        "update_after_step",
        "num_updates",
        "optimization_step",
        "n_averaged",
    )
)


def missing(name: str) -> AttributeError:
    """For a name that `ShardedEMA` does not have; says which call does what it does elsewhere."""
    if name in _CALLS:
        return linked(AttributeError(f"ShardedEMA has no {name}: call {_CALLS[name]}"))
    return linked(AttributeError(f"'ShardedEMA' object has no attribute {name!r}"))


def settable(name: str) -> None:
    """Raises AttributeError if other libraries have this attribute, and setting it acts there."""
    if name in _SET:
        raise linked(
            AttributeError(
                f"ShardedEMA.{name} cannot be set: build it with a schedule that changes, such as "
                "a callable (t, dt) -> decay; an update is made where ema.update() is called"
            )
        )
    if name in _CALLS:
        raise missing(name)


def unregistered(method: _F) -> _F:
    """A method that raises when accelerate's ``register_for_checkpointing`` looks for it.

    That function only asks whether an object has it, and pickles the object at the first save, on
    the main process alone.
    """
    return cast("_F", _Unregistered(method))


class _Unregistered:
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        functools.update_wrapper(self, method)  # type: ignore[arg-type]

    def __get__(self, instance: Any, owner: type) -> Any:
        frame = inspect.currentframe()
        caller = frame.f_back if frame else None
        if caller is not None and caller.f_code.co_name == "register_for_checkpointing":
            raise ArgumentTypeError(
                "register_for_checkpointing: got a ShardedEMA, whose pickle would contain one "
                "rank's shards only; omit the call, and build the EMA with "
                "shardema.integrations.accelerate.attach(accelerator, ...), after which "
                "save_state and load_state include it"
            )
        return self._method.__get__(instance, owner)


def names() -> tuple[str, ...]:
    """All names that are known."""
    return tuple(_CALLS)
