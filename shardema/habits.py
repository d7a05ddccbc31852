"""What other EMA libraries call what `ShardedEMA` does, for those who try these names first."""

from __future__ import annotations

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


def missing(name: str) -> AttributeError:
    """For a name that `ShardedEMA` does not have; says which call does what it does elsewhere."""
    if name in _CALLS:
        return AttributeError(f"ShardedEMA has no {name}: call {_CALLS[name]}")
    return AttributeError(f"'ShardedEMA' object has no attribute {name!r}")


def names() -> tuple[str, ...]:
    """All names that are known."""
    return tuple(_CALLS)
