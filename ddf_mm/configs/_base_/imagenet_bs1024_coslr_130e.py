# The official training; configs/_base_/schedules has the source of each number.
from mmengine.hooks import SyncBuffersHook
from mmengine.optim import AmpOptimWrapper, ConstantLR, CosineAnnealingLR, LinearLR
from torch.optim import SGD

optim_wrapper = dict(
    type=AmpOptimWrapper,
    loss_scale="dynamic",
    optimizer=dict(type=SGD, lr=0.4, momentum=0.9, nesterov=True, weight_decay=1e-4),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-4 / 0.4, begin=0, end=6),
    # The cosine of epoch 4, where CosineAnnealingLR starts at epoch 5: the real part of a root.
    dict(
        type=ConstantLR,
        factor=(1e-5 + (0.4 - 1e-5) * (1 + ((-1) ** (4 / 120)).real) / 2) / 0.4,
        begin=5,
        end=6,
    ),
    dict(type=CosineAnnealingLR, T_max=120, eta_min=1e-5, last_step=4, begin=5, end=121),
]
train_cfg = dict(by_epoch=True, max_epochs=130, val_interval=1)
val_cfg = dict()
test_cfg = dict()
custom_hooks = [dict(type=SyncBuffersHook)]
auto_scale_lr = dict(base_batch_size=1024)
