"""How much each of the base model's own losses counts."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TaskWeights:
    """Weights of the base model's own losses in the total. What has weight 0 and serves no term is not computed.

    Args:
        understanding: Weight of the image-to-text loss.
        generation: Weight of the text-to-image loss.
        reconstruction: Weight of drawing the generation batch's images from what the model understands of them.
    """

    understanding: float = 1.0
    generation: float = 1.0
    reconstruction: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if weight < 0:
                raise ValueError(f"task_weights.{name} is {weight}; set it to 0 (off) or above")
