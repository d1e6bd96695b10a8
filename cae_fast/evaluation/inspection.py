"""What a model knows: a k-NN probe of its frozen encoder and reconstructions of masked images.

B batch, N patches, Nm masked, D width, S image side, P = 3 p^2 values of a patch.
"""

import logging
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cae_fast.config import PretrainConfig, UserError
from cae_fast.data.decode import resize
from cae_fast.data.index import ImageIndex, index_for
from cae_fast.data.loader import Mask, labelled_loader
from cae_fast.data.normalize import Normalize
from cae_fast.evaluation.knn_probe import extract_features, knn_accuracy
from cae_fast.evaluation.task import check_classes
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.targets import PixelTargets, Targets, Tokenizer, patchify
from cae_fast.models.teacher import TeacherFeatures
from cae_fast.training.pictures import save_reconstructions

log = logging.getLogger(__name__)


@dataclass
class Inspection:
    """The model in training, with all it needs to look at images."""

    config: PretrainConfig
    index: ImageIndex
    model: ContextAutoencoder
    targets: Targets
    normalize: Normalize
    mask: Mask
    dtype: torch.dtype
    device: torch.device

    def knn_accuracy(self) -> float:
        """Top-1 of the weighted k-NN probe on `probe.train` and `probe.test`, features = mean of the patch tokens."""
        probe = self.config.probe
        train, test = self._probe_index(probe.train), self._probe_index(probe.test)
        if min(train.labels.min(), test.labels.min()) < 0:
            raise UserError(f"probe.train {probe.train} and probe.test {probe.test}: a probe needs a folder per class")
        check_classes("probe.train and probe.test", train, test)
        train_x, train_y = extract_features(self.patch_features, self._labelled(train))
        test_x, test_y = extract_features(self.patch_features, self._labelled(test))
        return knn_accuracy(train_x, train_y, test_x, test_y, k=probe.k, num_classes=len(train.classes))

    def patch_features(self, images: Tensor) -> Tensor:
        tokens = self.model.encoder(self.normalize(images.to(self.device)).to(self.dtype))  # (B, N + 1, D)
        return tokens[:, 1:].float().mean(1)  # (B, D)

    @torch.no_grad()
    def save_reconstructions(self, out: Path) -> bool:
        """Input, mask and prediction of eight images, of the probe's test images where there are some.

        Codes are shown as the picture that the tokenizer's decoder makes of them. Returns whether there was something
        to show: not for features, and not for codes without a decoder.
        """
        if isinstance(self.targets, TeacherFeatures):
            log.info("no reconstructions.png: features are no pictures")
            return False
        if not isinstance(self.targets, PixelTargets) and not self.targets.has_decoder:
            log.info("no reconstructions.png: %s holds no decoder", self.config.target.tokenizer)
            return False

        # Eight images from all over the set, masked as in training.
        index = self._probe_index(self.config.probe.test) if self.config.probe.test else self.index
        spread = torch.linspace(0, len(index) - 1, min(8, len(index))).long().tolist()
        side = self.model.shape.image_size
        with closing(labelled_loader(index, side, batch_size=8, num_workers=0, sample_ids=spread)) as batches:
            raw = next(batches)[0].to(self.device)
        if not len(raw):
            raise UserError(f"none of eight images of {index.source} can be read")
        visible_ids, masked_ids = (ids.to(self.device) for ids in self.mask(torch.arange(len(raw))))
        images = self.normalize(raw)  # (8, 3, S, S)

        # What the decoder says of the masked patches, as pixels.
        predicted = self.model.predict(images.to(self.dtype), visible_ids, masked_ids).float()  # (8, Nm, P or V)
        if isinstance(self.targets, PixelTargets):
            pixels = self.targets.decode(predicted, images, masked_ids).unflatten(-1, (-1, 3))
            pixels = self.normalize.invert(pixels.movedim(-1, 1)).movedim(1, -1).flatten(-2)
        else:
            pixels = self._picture_of_codes(self.targets, raw, predicted.argmax(-1), masked_ids)
        save_reconstructions(out, raw.float() / 255, masked_ids, pixels, patch_size=self.model.shape.patch_size)
        return True

    def _picture_of_codes(self, tokenizer: Tokenizer, raw: Tensor, predicted: Tensor, masked_ids: Tensor) -> Tensor:
        """Pixels (K, Nm, P) in [0, 1] of the tokenizer's picture: predicted codes (K, Nm) among the true ones."""
        grid, side = self.model.encoder.grid, self.model.shape.image_size
        size = tokenizer.token_size(grid)
        rows = raw.movedim(1, -1).cpu().numpy()
        token_images = torch.stack([resize(pixels, size, size, "lanczos") for pixels in rows]).to(self.device)
        every = torch.arange(grid**2, device=self.device).expand(len(raw), -1)  # (K, N)
        codes = tokenizer.encode(token_images, every).scatter(1, masked_ids, predicted)  # (K, N)
        picture = tokenizer.decode(codes.unflatten(1, (grid, grid)))  # (K, 3, T, T)
        picture = F.interpolate(picture, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        patches = patchify(picture, self.model.shape.patch_size)  # (K, N, P)
        return patches.gather(1, masked_ids[..., None].expand(-1, -1, patches.shape[-1]))

    def _probe_index(self, path: str | None) -> ImageIndex:
        assert path
        return index_for(replace(self.config.data, path=path, index=None), Path(self.config.train.run_dir))

    def _labelled(self, index: ImageIndex) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Batches of images and labels; those of which nothing can be read are left out."""
        with closing(labelled_loader(index, self.model.shape.image_size, 256, num_workers=0)) as batches:
            yield from ((images, labels) for images, labels in batches if len(labels))
