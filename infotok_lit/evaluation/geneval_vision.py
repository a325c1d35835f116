"""What GenEval's rules need to see in an image: objects by an instance segmenter, their colours by CLIP.

The official scorer uses Mask2Former (Swin-S) in mmdetection 2 and CLIP ViT-L/14 in open_clip; here both run in
transformers: `facebook/mask2former-swin-small-coco-instance` and `openai/clip-vit-large-patch14`, or any others of
their kind. How far scores with these weights lie from the official ones has not been measured.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from infotok_lit.assets import BENCHMARKS
from infotok_lit.errors import DataError, MissingFileError
from infotok_lit.evaluation.geneval_rules import COLOURS, THRESHOLD, Detection, Verdict, judge
from infotok_lit.evaluation.models import fingerprint, loading

CLASSES = tuple((BENCHMARKS / "geneval" / "object_names.txt").read_text().split("\n")[:80])
GREY = (0x99, 0x99, 0x99)
"""What is painted over everything but the object whose colour is asked."""
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
MAX_DETECTIONS = 100
"""Of one image, as mmdetection keeps them."""

OTHER_NAMES = {
    "aeroplane": "airplane",
    "cellphone": "cell phone",
    "diningtable": "dining table",
    "hair dryer": "hair drier",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""What detectors call some of GenEval's classes."""


class ImageJudge:
    """Whether images show what GenEval's prompts ask for.

    Args:
        detector: folder of a transformers instance segmenter of the MaskFormer kind.
        classifier: folder of a transformers CLIP.
        device: where both run, in float32.

    Raises:
        MissingFileError: a folder is not there.
        DataError: one is damaged or of another kind, or the detector does not know all of GenEval's classes.
    """

    def __init__(self, detector: Path, classifier: Path, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoModelForUniversalSegmentation, AutoTokenizer

        self.device = device
        self.name = f"{detector.resolve().name}-{fingerprint(detector)[:6]}-{fingerprint(classifier)[:6]}"
        self.detector = _load(AutoModelForUniversalSegmentation, detector, device)
        self.detector_processor = _processor(detector)
        self.labels = _labels(self.detector, detector)
        self.classifier = _load(AutoModel, classifier, device)
        self.classifier_processor = _processor(classifier)
        with _loading(classifier):
            self.tokenizer = AutoTokenizer.from_pretrained(classifier, local_files_only=True)
        self._colour_features: dict[str, Tensor] = {}

    def __call__(self, image: Image.Image, metadata: dict[str, Any]) -> tuple[Verdict, list[Detection]]:
        """The verdict on an image, and the objects seen in it, with the colours that the rules asked for."""
        image = image.convert("RGB")
        detections = self.detect(image)
        named: dict[int, str] = {}

        def colours(kept: Sequence[Detection]) -> list[str]:
            found = self.colours(image, kept)
            named.update({id(one): colour for one, colour in zip(kept, found, strict=True)})
            return found

        verdict = judge(metadata, detections, colours)
        return verdict, [one._replace(colour=named.get(id(one)), mask=None) for one in detections]

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> list[Detection]:
        """Every object that is more certain than THRESHOLD, with its mask."""
        inputs = self.detector_processor(image, return_tensors="pt").to(self.device)
        output = self.detector(**inputs)
        shape = inputs["pixel_values"].shape[2:]
        valid = inputs["pixel_mask"][0].bool() if "pixel_mask" in inputs else torch.ones(shape, dtype=torch.bool)
        unpadded = (int(valid.any(1).sum()), int(valid.any(0).sum()))
        return instances(
            output.class_queries_logits[0],
            output.masks_queries_logits[0],
            padded=tuple(shape),
            unpadded=unpadded,
            size=(image.height, image.width),
            labels=self.labels,
        )

    @torch.inference_mode()
    def colours(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """The colour that CLIP finds likeliest for each object of one class."""
        crops = [crop_on_grey(image, detection) for detection in detections]
        pixels = self.classifier_processor(crops, return_tensors="pt")["pixel_values"].to(self.device)
        features = _normalised(_pooled(self.classifier.get_image_features(pixel_values=pixels)))
        best = (features @ self._colours_of(detections[0].label).T).argmax(1)
        return [COLOURS[number] for number in best.tolist()]

    def _colours_of(self, label: str) -> Tensor:
        """(10, width): for each colour, the mean of its texts' unit features, as a unit vector."""
        if label not in self._colour_features:
            texts = [template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            features = _normalised(_pooled(self.classifier.get_text_features(**tokens)))
            self._colour_features[label] = _normalised(features.unflatten(0, (len(COLOURS), -1)).mean(1))
        return self._colour_features[label]


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    unpadded: tuple[int, int],
    size: tuple[int, int],
    labels: Sequence[str | None],
) -> list[Detection]:
    """What a MaskFormer's output (Q, classes + 1) and (Q, h, w) says about one image.

    As in mmdetection: of all pairs of query and class the 100 likeliest; the confidence is the class's probability
    times the mean probability inside the mask; the box is the mask's.

    Args:
        padded: (height, width) of the detector's input.
        unpadded: what of it is image, from the upper left corner.
        size: of the image itself.
        labels: GenEval's name of each class; None for one that GenEval does not have.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    scores, order = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    # A mask's mean probability is at most 1, so the rest cannot pass the threshold.
    scores, order = scores[scores > THRESHOLD], order[scores > THRESHOLD]
    found = []
    for score, number in zip(scores, order.tolist(), strict=True):
        query, label = number // probabilities.shape[1], labels[number % probabilities.shape[1]]
        if label is None:
            continue
        logits = F.interpolate(mask_logits[None, None, query].float(), padded, mode="bilinear", align_corners=False)
        logits = F.interpolate(
            logits[..., : unpadded[0], : unpadded[1]], size, mode="bilinear", align_corners=False
        ).squeeze(0, 1)
        mask = logits > 0
        confidence = float(score * (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        if confidence > THRESHOLD:
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            found.append(Detection(label, box, confidence, mask=mask.cpu().numpy()))
    return found


def crop_on_grey(image: Image.Image, detection: Detection) -> Image.Image:
    """The object's box, with everything outside its mask grey."""
    pixels = np.where(detection.mask[..., None], np.asarray(image), np.array(GREY, np.uint8))
    return Image.fromarray(pixels).crop(tuple(map(int, detection.box)))


def _load(kind: Any, folder: Path, device: str) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise MissingFileError(
            f"there is no transformers model at {folder}: download one there, for GenEval "
            "`hf download facebook/mask2former-swin-small-coco-instance --local-dir DETECTOR` and "
            "`hf download openai/clip-vit-large-patch14 --local-dir CLASSIFIER`"
        )
    with _loading(folder):
        model = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return model.float().to(device).eval()


def _loading(folder: Path) -> AbstractContextManager[None]:
    return loading(f"the model at {folder} cannot be used to judge images", DataError)


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    with _loading(folder):
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)


def _labels(detector: nn.Module, folder: Path) -> list[str | None]:
    """GenEval's name of each of the detector's classes, in their order."""
    given = [detector.config.id2label[number].lower() for number in range(len(detector.config.id2label))]
    labels = [name if name in CLASSES else OTHER_NAMES.get(name) for name in given]
    missing = sorted(set(CLASSES).difference(filter(None, labels)))
    if missing:
        raise DataError(
            f"the detector at {folder} does not know {len(missing)} of GenEval's 80 classes ({', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}): take one trained on COCO's instances"
        )
    return labels


def _pooled(features: Any) -> Tensor:
    """transformers returns either the projected features or an output that holds them."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _normalised(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)
