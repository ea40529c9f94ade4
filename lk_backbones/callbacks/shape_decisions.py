"""Whether a classifier goes by the outline of things or by their texture."""

from typing import Any

import lightning as L
import torch

from lk_backbones._processes import gathered

__all__ = ["ShapeDecisions"]


class ShapeDecisions(L.Callback):
    """Print the share of shape decisions, after a training and after a test.

    It is measured on pictures that have the outline of one class and the texture of another, which the data module
    gives (`cue_conflict_dataloader`, as that of `SyntheticShapesDataModule`): of the pictures that are taken for one of
    the two, how many are taken for the outline's (Geirhos et al., ICLR 2019). Half is chance, 1 goes by the outline
    alone, 0 by the texture alone. Where the data module gives no such pictures nothing happens.

    Attributes:
        outline: Number of the decisions for the outline, at the last time.
        texture: Number of the decisions for the texture.
        neither: Number of the others.
    """

    def __init__(self) -> None:
        self.outline = self.texture = self.neither = 0

    @property
    def share(self) -> float:
        """Share of shape decisions, NaN if there was no decision for either."""
        decided = self.outline + self.texture
        return self.outline / decided if decided else float("nan")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and print; Lightning calls it."""
        self._measure(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and print; Lightning calls it."""
        self._measure(trainer, pl_module)

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, task: Any) -> None:
        loader = getattr(getattr(trainer, "datamodule", None), "cue_conflict_dataloader", None)
        if loader is None:
            return
        counts = torch.zeros(3, dtype=torch.long)
        was_training = task.training
        task.eval()
        for batch in loader():
            with trainer.precision_plugin.forward_context():
                chosen = task(batch["image"].to(task.device)).argmax(dim=1).cpu()
            outline, texture = chosen == batch["label"], chosen == torch.tensor(batch["texture"])
            counts += torch.stack([outline.sum(), texture.sum(), (~outline & ~texture).sum()])
        task.train(was_training)
        self.outline, self.texture, self.neither = (sum(each) for each in zip(*gathered(counts.tolist()), strict=True))
        if trainer.is_global_zero:
            total = self.outline + self.texture + self.neither
            print(
                f"shape:      {100 * self.share:.1f} % of the decisions go by the outline ({self.outline} outline, "
                f"{self.texture} texture, {self.neither} neither, of {total} pictures in which the two disagree)"
            )
