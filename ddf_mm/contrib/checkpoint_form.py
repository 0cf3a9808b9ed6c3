"""One form for every checkpoint that a runner loads.

For mmengine: superfluous once ``FlexibleRunner.load_checkpoint`` and
``EMAHook.after_load_checkpoint`` take weights by themselves, as ``Runner.load_checkpoint`` does,
and the latter without the prefix of DistributedDataParallel; once mmpretrain's ``EMAHook`` loads
an average of other sizes as ``load_state_dict`` of mmengine does; and once ``FlexibleRunner`` calls
``before_run`` before it loads.
"""

import copy

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present


class OneCheckpointForm(Hook):
    """Puts weights under ``state_dict`` in what is loaded, without the prefix ``module.``, and
    leaves out the state of a moving average of another model that nobody resumes."""

    priority = "VERY_HIGH"  # before EMAHook

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Bring what is about to be copied into the model into this form."""
        if "state_dict" not in checkpoint:
            weights = copy.copy(checkpoint)  # with the versions of modules, an attribute
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
