"""What mmengine and PyTorch lack, as patches that could become part of them.

Each is one module that needs nothing else of this package, says in its first lines which upstream
call makes it superfluous, and has its tests in ``tests/contrib``. OneDL's mmengine 0.10.12,
mmpretrain 1.3.6 and PyTorch 2.11 make none so:

- ``cpu_amp``: mixed precision on a CPU.
- ``exact_resume``: random numbers that go on, checkpoints that stay until the next one is whole.
- ``checkpoint_form``: checkpoints of every form for EMA and FlexibleRunner.
- ``gloo``: process groups on a CPU, and their end.
- ``pooling``: max poolings in programs of ``torch.export`` that take images of every size.
- ``rmse``: the error of maps.
- ``safe_load``: checkpoints that are read without running code.
- ``whole_files``: files that are whole or not there.
"""
