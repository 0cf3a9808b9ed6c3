"""Features that mmengine and PyTorch lack, written so that upstream could take them.

Each is one module that does not depend on the rest of this package, states in its first lines which
upstream change makes it superfluous, and has its tests in ``tests/contrib``. All of them are needed
with OneDL's mmengine 0.10.12, mmpretrain 1.3.6 and PyTorch 2.11:

- ``cpu_amp``: mixed precision on a CPU.
- ``exact_resume``: resumes random number generators; keeps a checkpoint until the next is complete.
- ``checkpoint_form``: checkpoints in every format for EMA and FlexibleRunner.
- ``gloo``: process groups on a CPU.
- ``memory``: glibc keeps the memory of freed tensors.
- ``pooling``: max pooling in ``torch.export`` programs with dynamic image sizes.
- ``rmse``: root mean squared error of maps.
- ``safe_load``: loads checkpoints without executing code.
- ``whole_files``: writes files atomically.
"""
