"""Other programs that run a network on a CPU, faster than torch does: optional, imported here alone and when they are asked for.

What is certified is the function that runs: a certificate by one engine is not one of another, whose logits differ in the last bits. The name of the engine is
part of the method.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import CertifyError
from lipnet.checkpoint import first_line

ENGINES = ("torch", "compile", "onnxruntime", "openvino")


def compiled(
    net: nn.Module,  # in eval mode, on the CPU
    shape: tuple[int, ...],
    batch: int,
    engine: str,
) -> Callable[[Tensor], Tensor]:
    """The network as the engine runs it, for batches of this size, with as many threads as torch has.

    Raises CertifyError for an engine that is not known or not installed, and for a network that it cannot run.
    """
    if engine not in ENGINES:
        raise CertifyError(f"an engine is one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "torch":
        return net
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"compile": _compile, "onnxruntime": _onnxruntime, "openvino": _openvino}[engine](net, torch.zeros(batch, *shape))
    except ImportError as error:
        raise CertifyError(f"{engine} is not installed ({error}); install it with: pip install 'lipnet[engines]', or use the engine torch") from error
    except Exception as error:  # exporters and compilers raise many kinds
        raise CertifyError(f"{engine} cannot run this network ({first_line(error)}); use the engine torch") from error


def _compile(net: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """By torch.compile, with the weights as constants; the first batch takes a minute."""
    compiled: Callable[[Tensor], Tensor] = torch.compile(net, dynamic=False, options={"freezing": True})
    with torch.no_grad():
        compiled(example.to(memory_format=torch.channels_last) if example.dim() == 4 else example)
    return compiled


def _onnxruntime(net: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/net.onnx"
        torch.onnx.export(net, (example,), path, dynamo=False, input_names=["x"], output_names=["logits"])
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"x": x.contiguous().numpy()})[0])


def onnx_session(model: bytes) -> Callable[[Tensor], Tensor]:
    """An ONNX model of one input and one output, as onnxruntime runs it node by node, nothing fused. Raises ImportError where it is not installed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.contiguous().numpy()})[0])


def _openvino(net: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    import openvino

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.convert_model(net, example_input=example)
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer({0: x.contiguous().numpy()}, share_inputs=True)[0].copy())
