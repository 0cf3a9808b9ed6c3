"""One format for every checkpoint that a runner loads.

For mmengine: superfluous once ``FlexibleRunner.load_checkpoint`` and
``EMAHook.after_load_checkpoint`` accept a plain state dict, as ``Runner.load_checkpoint`` does, and
the latter removes the prefix of DistributedDataParallel; once mmpretrain's ``EMAHook`` loads an
average with other sizes as mmengine's ``load_state_dict`` does; and once ``FlexibleRunner`` calls
``before_run`` before it loads.
"""

import copy

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present


class OneCheckpointForm(Hook):
    """Moves a plain state dict to the key ``state_dict``, removes the prefix ``module.``, and drops
    the moving average of a model with other sizes unless a training is resumed."""

    priority = "VERY_HIGH"  # before EMAHook

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Bring the checkpoint into this format before its weights are copied into the model."""
        if "state_dict" not in checkpoint:
            weights = copy.copy(checkpoint)  # keeps the attribute with the modules' versions
            checkpoint.clear()
            checkpoint["state_dict"] = weights
        consume_prefix_in_state_dict_if_present(checkpoint["state_dict"], "module.")
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        own = model.state_dict()
        for name, value in checkpoint.get("ema_state_dict", {}).items():
            own_value = own.get(name.removeprefix("module."), value)
            if own_value.shape != value.shape and not runner._resume:
                # The average itself is what Runner saves as `state_dict`.
                del checkpoint["ema_state_dict"]
                break
        for hook in runner.hooks:
            # FlexibleRunner loads before it calls `before_run`, where EMAHook copies the model.
            if isinstance(hook, EMAHook) and not hasattr(hook, "ema_model"):
                hook.before_run(runner)
                hook.before_run = lambda runner: None
