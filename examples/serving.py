"""A model for the Python backend of Triton Inference Server: one routed call per dynamic batch.

python examples/serving.py    without the server; what goes with it there: docs/faq.md
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from dynmm_kernels import Branch, Lazy, RoutedFusion
from dynmm_kernels.nn import ConfidenceGate, Usage

try:
    import triton_python_backend_utils as backend
except ImportError:  # there is no server: what its module offers, as far as it is used here
    backend = SimpleNamespace(
        Tensor=lambda name, values: SimpleNamespace(name=name, as_numpy=lambda: values),
        InferenceResponse=lambda output_tensors: SimpleNamespace(output_tensors=output_tensors),
        get_input_tensor_by_name=lambda request, name: request[name],
    )

CLASSES, WORDS = 4, 16


def build() -> nn.Module:
    """Text where that is sure, else the image. A service loads its weights here."""
    text = nn.Linear(WORDS, CLASSES)
    image = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Flatten(), nn.Linear(1800, CLASSES))
    branches = {"text": Branch(text, inputs=0), "image": Branch(image, inputs=1)}
    return RoutedFusion(Branch(ConfidenceGate(text, threshold=0.4), inputs=0), branches).eval()


class TritonPythonModel:
    def initialize(self, arguments: dict[str, str]) -> None:
        on_gpu = arguments["model_instance_kind"] == "GPU"
        self.device = f"cuda:{arguments['model_instance_device_id']}" if on_gpu else "cpu"
        self.fusion, self.usage = build().to(self.device), Usage()

    def execute(self, requests: list) -> list:
        """The rows of all requests as one batch; an image is uploaded only where it is needed."""
        texts, images = (
            [backend.get_input_tensor_by_name(r, name).as_numpy() for r in requests]
            for name in ("text", "image")
        )
        pixels = [image for request in images for image in request]

        def decode(rows: Tensor) -> Tensor:
            return torch.from_numpy(np.stack([pixels[i] for i in rows])).to(self.device) / 255

        text = torch.from_numpy(np.concatenate(texts)).to(self.device)
        with torch.inference_mode():
            logits, routing = self.fusion(text, Lazy(decode), return_routing=True)
        self.usage.add(routing)
        parts = logits.cpu().split([*map(len, texts)])
        answers = [[backend.Tensor("logits", part.numpy())] for part in parts]
        return [*map(backend.InferenceResponse, answers)]

    def finalize(self) -> None:
        print("{} rows, {[1]} images decoded".format(*self.usage.read()))


def main() -> None:
    torch.manual_seed(0)
    model, draw = TritonPythonModel(), np.random.default_rng(0)
    model.initialize({"model_instance_kind": "CPU"})
    for sizes in ([1, 3, 2], [4], [1] * 8):  # what a dynamic batcher might put together
        requests = []
        for n in sizes:
            text = draw.normal(size=(n, WORDS)).astype(np.float32)
            named = ("text", text), ("image", draw.integers(0, 256, (n, 3, 32, 32), np.uint8))
            requests.append({name: backend.Tensor(name, values) for name, values in named})
        print(*[r.output_tensors[0].as_numpy().shape for r in model.execute(requests)])
    model.finalize()


if __name__ == "__main__":
    main()
