# The official training: train.py of theFoxofSky/ddfnet with timm 0.4.5 and
# `--lr 0.4 --warmup-epochs 5 --epochs 120 --sched cosine -b 128 --amp --dist-bn reduce`, 8 GPUs.
optim_wrapper = dict(
    _scope_="mmpretrain",
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="SGD", lr=0.4, momentum=0.9, nesterov=True, weight_decay=1e-4),
    # Biases, norm layers and FilterNorm's `std` are the one-dimensional parameters.
    paramwise_cfg=dict(flat_decay_mult=0.0),
)

# Learning rate of epoch e, constant within it: linear from 1e-4 (e = 0) towards 0.4 (e = 5), then
# 1e-5 + (0.4 - 1e-5) * (1 + cos(pi * e / 120)) / 2 up to e = 120, then 1e-5.
param_scheduler = [
    dict(_scope_="mmpretrain", type="LinearLR", start_factor=1e-4 / 0.4, begin=0, end=6),
    # timm's cosine starts at epoch 0, including the warm-up. CosineAnnealingLR computes each epoch
    # from the previous one, so at epoch 5 it needs the cosine of epoch 4, computed here as the
    # real part of a root of -1: mmengine 0.10.7 treats a config with an import, even of math, as
    # a lazy config.
    dict(
        _scope_="mmpretrain",
        type="ConstantLR",
        factor=(1e-5 + (0.4 - 1e-5) * (1 + ((-1) ** (4 / 120)).real) / 2) / 0.4,
        begin=5,
        end=6,
    ),
    dict(
        _scope_="mmpretrain",
        type="CosineAnnealingLR",
        T_max=120,
        eta_min=1e-5,
        last_step=4,
        begin=5,
        end=121,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=130, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# `--dist-bn reduce`: running statistics are averaged over the GPUs before every validation.
custom_hooks = [dict(_scope_="mmpretrain", type="SyncBuffersHook")]

auto_scale_lr = dict(base_batch_size=1024)
