"""Pictures of the filters of one image during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ddf_mm.ops.checks import check_int
from ddf_mm.visualization.drawing import draw_combined, draw_filters, figure_to_image
from ddf_mm.visualization.filters import (
    capture_filters,
    choose_points,
    find_layers,
    network_image,
)


@HOOKS.register_module()
class DDFFilterVisualizationHook(Hook):
    """Draws the filters that a model predicts for one image at intervals during training.

    The pictures are those of ``tools/analysis/visualize_filters.py``. They are added to the
    runner's visualizer, and so to each of its backends (files, TensorBoard, …), as ``ddf_filters``
    and ``ddf_combined_filters``, before training and then in intervals, always of the same image
    and points. For this the model predicts in evaluation mode, with the current weights (not their
    moving average), in the main process only.

    Args:
        interval: epochs, or iterations, between pictures.
        by_epoch: whether ``interval`` and the pictures' steps count epochs instead of iterations.
        sample: index of the image in the validation dataset or, without one, the training dataset.
        stages: stages of a ResNet to draw, counted from 1; of each, the last DDF layer.
        layers: names of DDF layers to draw. With neither, the last of each stage and every DDF
            layer outside stages.
        points: pixels (x, y) of the network's input whose filters to draw, or ``None`` for those
            whose filters differ most, before training, in the last layer drawn.
        combined: whether to draw ``ddf_combined_filters`` too.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Later errors, such as a missing stage, layer, sample or point, are logged and end the drawing,
    not the training.

    Example:
        >>> custom_hooks = [dict(type='ddf_mm.DDFFilterVisualizationHook', interval=5)]
    """

    priority = "LOW"

    def __init__(
        self,
        interval: int = 1,
        by_epoch: bool = True,
        sample: int = 0,
        stages: Sequence[int] | None = None,
        layers: Sequence[str] | None = None,
        points: Sequence[Sequence[int]] | None = None,
        combined: bool = True,
    ) -> None:
        check_int("interval", interval, 1)
        check_int("sample", sample, 0)
        for point in points or ():
            if len(point) != 2 or not all(isinstance(v, int) and v >= 0 for v in point):
                raise ValueError(f"points must hold pairs (x, y) of whole numbers, got {point!r}")
        if points is not None and not points:
            raise ValueError("points must hold at least one pixel (x, y), or be None, got none")
        self.interval = interval
        self.by_epoch = by_epoch
        self.sample = sample
        self.stages = stages
        self.layers = layers
        self.points = None if points is None else [tuple(point) for point in points]
        self.combined = combined
        self._data = None

    def before_train(self, runner: Runner) -> None:
        """Choose the image and draw the initial filters."""
        self._draw(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Draw at the interval, if by epochs."""
        if self.by_epoch and self.every_n_epochs(runner, self.interval):
            self._draw(runner, runner.epoch + 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        """Draw at the interval, if by iterations."""
        if not self.by_epoch and self.every_n_train_iters(runner, self.interval):
            self._draw(runner, runner.iter + 1)

    @master_only
    def _draw(self, runner: Runner, step: int | None = None) -> None:
        if step is None:
            step = runner.epoch if self.by_epoch else runner.iter
        elif self._data is None:
            return
        try:
            if self._data is None:
                self._data = self._sample(runner)
            for name, figure in self._figures(runner, step):
                runner.visualizer.add_image(name, figure_to_image(figure), step=step)
        except Exception as error:
            runner.logger.error(
                f"{type(self).__name__} draws nothing from now on: {type(error).__name__}: {error}",
                exc_info=not isinstance(error, ValueError),
            )
            self._data = None

    def _sample(self, runner: Runner) -> dict:
        loop = runner.train_loop if runner.val_loop is None else runner.val_loop
        dataset = loop.dataloader.dataset
        if self.sample >= len(dataset):
            raise ValueError(
                f"sample must be an index of the dataset, which has {len(dataset)} images, got "
                f"{self.sample}"
            )
        return dataset[self.sample]

    def _figures(self, runner: Runner, step: int) -> Iterator[tuple[str, Figure]]:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        layers = find_layers(model, self.stages, self.layers)
        image = network_image(model, self._data)
        filters, _ = capture_filters(model, self._data, layers)
        if self.points is None:
            last = filters[next(reversed(filters))]
            self.points = choose_points(last, *image.shape[:2])
        unit = "epoch" if self.by_epoch else "iteration"
        arguments = (image, filters, self.points, f"Decoupled dynamic filters  ·  {unit} {step}")
        yield "ddf_filters", draw_filters(*arguments)
        if self.combined:
            yield "ddf_combined_filters", draw_combined(*arguments)
