import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from ddf_mm.contrib.cpu_amp import CPUAmpOptimWrapper


def _build(model: nn.Module, **kwargs) -> OptimWrapper:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cfg = dict(type="CPUAmpOptimWrapper", optimizer=optimizer, **kwargs)
    return OPTIM_WRAPPERS.build(cfg)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(loss_scale="dynamic"),
        dict(loss_scale=512.0, dtype="float16"),
        dict(loss_scale=dict(init_scale=2.0), dtype=torch.float16, use_fsdp=True),
        dict(dtype="bfloat16"),
        dict(dtype=torch.bfloat16),
    ],
)
def test_convolves_in_bfloat16_and_updates_float32(kwargs):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    before = model.weight.detach().clone()
    wrapper = _build(model, **kwargs)
    with wrapper.optim_context(model):
        out = model(torch.randn(2, 3, 8, 8))
    assert out.dtype == torch.bfloat16
    assert model(torch.randn(2, 3, 8, 8)).dtype == torch.float32
    wrapper.update_params(out.float().square().mean())
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)


def test_gradients_are_those_of_autocast_without_scaling():
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    data = torch.randn(16, 8)
    wrapper = _build(model, loss_scale=1024.0)
    with wrapper.optim_context(model):
        loss = model(data).float().square().mean()
    wrapper.backward(loss)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad(model(data).float().square().mean(), model.weight)[0]
    assert torch.equal(model.weight.grad, expected)


def test_accumulates_gradients():
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    before = model.weight.detach().clone()
    wrapper = _build(model, accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 4)
    changed = []
    for _ in range(4):
        with wrapper.optim_context(model):
            loss = model(torch.randn(2, 8)).float().square().mean()
        wrapper.update_params(loss)
        changed.append(not torch.equal(model.weight, before))
        before = model.weight.detach().clone()
    assert changed == [False, True, False, True]


def test_loads_the_state_of_a_gpu_run():
    model = nn.Linear(8, 4)
    trained = _build(model)
    trained.update_params(model(torch.randn(2, 8)).square().mean())
    state = trained.state_dict()
    gpu_state = dict(state, loss_scaler=dict(scale=65536.0))
    resumed = _build(model)
    resumed.load_state_dict(gpu_state)
    assert "loss_scaler" in gpu_state
    assert "loss_scaler" not in resumed.state_dict()
    momentum = resumed.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, state["state"][0]["momentum_buffer"])


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (dict(loss_scale="static"), ValueError, "loss_scale must be .* got 'static'"),
        (dict(loss_scale=512), TypeError, "loss_scale must be .* got 512 of type int"),
        (dict(loss_scale=None), TypeError, "loss_scale must be .* got None"),
        (dict(dtype="float32"), ValueError, "dtype must be .* got 'float32'"),
        (dict(dtype=torch.float64), ValueError, "dtype must be .* got torch.float64"),
        (dict(dtype=16), TypeError, "dtype must be .* got 16 of type int"),
        (dict(use_fsdp="no"), TypeError, "use_fsdp must be True or False, got 'no'"),
    ],
)
def test_bad_argument(kwargs, error, match):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(error, match=match):
        CPUAmpOptimWrapper(optimizer=optimizer, **kwargs)


def test_rejects_a_model_on_another_device():
    model = nn.Linear(2, 2, device="meta")
    wrapper = CPUAmpOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with (
        pytest.raises(RuntimeError, match="the model is on meta; use AmpOptimWrapper"),
        wrapper.optim_context(model),
    ):
        pass
