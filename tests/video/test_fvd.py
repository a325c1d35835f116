"""The Frechet video distance: closed forms, TensorFlow's padding by a loop, and the files that users have."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny_video import noise, tiny_tokenizer
from torch import nn

from infotok_lit.checkpoints import CheckpointError
from infotok_lit.video.codec import CodecConfig, compress, read_stream
from infotok_lit.video.fvd import I3d, Unit, video_distance
from infotok_lit.video.quality import means_by_rate, measure_quality
from infotok_lit.video.video_file import OpenVideo


class Brightness(nn.Module):
    """One feature of a clip: its mean level."""

    num_features = 1

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) -> (B, 1)."""
        return clips.flatten(1).mean(1, keepdim=True)


def test_the_distance_is_that_of_gaussians_over_the_clips_of_all_videos_at_a_rate(tmp_path) -> None:
    tokenizer, config = tiny_tokenizer(), CodecConfig(rate=0.5)
    videos = [noise(36, 16, 16, seed) // (1 + seed) for seed in range(3)]
    distance = video_distance(Brightness())
    rows, levels = [], {"real": [], "decoded": []}
    for number, frames in enumerate(videos):
        opened = lambda frames=frames: OpenVideo(iter(frames), Fraction(25), 36)  # noqa: E731
        rows.append(measure_quality(tokenizer, f"{number}", opened, config, distance=distance))
        with (tmp_path / "x.itk").open("w+b") as file:
            compress(tokenizer, frames, Fraction(25), file, config)
            file.seek(0)
            decoded = np.stack(list(read_stream(tokenizer, file, "x").frames()))
        for name, clip in (("real", frames), ("decoded", decoded)):
            levels[name] += [clip[:16].mean(), clip[16:32].mean()]  # the last four frames are no clip
    real, decoded = (np.array(levels[name]) for name in ("real", "decoded"))
    expected = (real.mean() - decoded.mean()) ** 2 + (real.std(ddof=1) - decoded.std(ddof=1)) ** 2
    (mean,) = means_by_rate(rows, {0.5: distance})
    assert mean.fvd == pytest.approx(expected, rel=1e-3) and expected > 1
    assert all(row.fvd is None for row in rows)
    assert means_by_rate(rows[:1], {0.5: video_distance(Brightness())})[0].fvd is None


@pytest.mark.parametrize(("kernel", "stride", "size"), [(7, 2, 9), (7, 2, 8), (3, 1, 5), (1, 1, 4), (3, 2, 2)])
def test_convolutions_pad_as_tensorflow_does(kernel, stride, size) -> None:
    """SAME: ceil(n / s) windows that begin at i s - floor(total / 2), where total is what the last one sticks out."""
    torch.manual_seed(0)
    unit = Unit(2, 3, kernel, stride, last=True)
    x = torch.randn(1, 2, size, size, size)
    windows = -(-size // stride)
    front = max((windows - 1) * stride + kernel - size, 0) // 2
    found = unit(x)
    assert found.shape[2:] == (windows,) * 3
    for place in ((0, 0, 0), (windows - 1,) * 3, (0, windows - 1, windows // 2)):
        total = unit.conv3d.bias.clone()
        for offset in np.ndindex(kernel, kernel, kernel):
            at = [p * stride - front + o for p, o in zip(place, offset, strict=True)]
            if all(0 <= a < size for a in at):
                total = total + unit.conv3d.weight[:, :, *offset] @ x[0, :, *at]
        torch.testing.assert_close(found[0, :, *place], total, rtol=1e-4, atol=1e-5)


def official_names() -> set[str]:
    """What a file of pytorch-i3d holds; old ones without `num_batches_tracked`."""
    blocks = [f"Mixed_{name}" for name in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")]
    branches = [f"{block}.{branch}" for block in blocks for branch in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")]
    units = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3", *branches]
    parts = ("conv3d.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    return {f"{unit}.{part}" for unit in units for part in parts} | {"logits.conv3d.weight", "logits.conv3d.bias"}


def test_the_network_reads_official_files_and_no_others(tmp_path) -> None:
    torch.manual_seed(0)
    network = I3d().eval()
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    assert state.keys() == official_names()
    state["logits.conv3d.bias"] = torch.arange(400.0)
    torch.save(state, tmp_path / "i3d.pt")
    again = I3d.from_file(tmp_path / "i3d.pt")
    grey = torch.full((1, 9, 3, 8, 8), 127.5)
    with torch.no_grad():
        difference = again(grey) - network(grey)
    torch.testing.assert_close(difference[0], torch.arange(400.0) - network.logits.conv3d.bias, rtol=1e-4, atol=1e-3)
    state["logits.conv3d.bias"] = torch.zeros(600)
    torch.save(state, tmp_path / "i3d.pt")
    with pytest.raises(CheckpointError, match="not an I3D of Kinetics-400"):
        I3d.from_file(tmp_path / "i3d.pt")
