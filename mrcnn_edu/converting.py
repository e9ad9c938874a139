"""What ``mrcnn-edu convert`` and ``mrcnn-edu export`` do: weights under other names, and the model as a program.

Chapter 18 (your own data).
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from mrcnn_edu.cli_tools import Convert, Export
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.program import save_program
from mrcnn_edu.published import is_published, open_published, open_weights
from mrcnn_edu.training.checkpoint import write_atomically
from mrcnn_edu.training.export import export_weights, load_model
from mrcnn_edu.weights import to_torchvision


def convert(options: Convert) -> None:
    """Published weights to a file of ours, or weights of ours to a file that torchvision's models load."""
    source, target = options.source, options.target
    if is_published(source):
        if target.suffix != ".safetensors":
            raise ValueError(f"published weights become a .safetensors file of ours, not {target}")
        model, categories = open_published(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        export_weights(model, target, categories)
        print(f"{target}: {model.config.classes} classes, for evaluate and predict --weights {target}")
        return
    if target.suffix not in (".pth", ".pt"):
        raise ValueError(f"weights of ours become a .pth file for torchvision, not {target}")
    model, _ = load_model(source / "weights.safetensors" if source.is_dir() else source)
    if model.config.backbone.features != "fpn":
        raise ValueError(f"torchvision has no Mask R-CNN on {model.config.backbone.features}, only on a pyramid")
    buffer = io.BytesIO()
    torch.save(to_torchvision(model), buffer)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, buffer.getvalue())
    print(f"{target}: for a model of torchvision with num_classes={model.config.classes + 1}")
    if model.config.conventions.aligned:
        print("The names fit, the numbers will differ: this model was trained by other conventions than torchvision's")


def export(options: Export) -> None:
    """Trained weights as a torch.export program for images of one size."""
    model, _, _ = open_weights(options.weights, None, None)
    if not isinstance(model, MaskRCNN):
        raise ValueError(f"{options.weights} holds two networks; export the folder of its last stage")
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    save_program(model, (options.height, options.width), out)
    names = "boxes, scores, labels" + ("" if model.mask_head is None else ", mask_probs")
    print(f"{out}: pixels [1, 3, {options.height}, {options.width}] in [0, 1] to {names}, "
          f"{model.config.box.detections_per_image} rows")  # fmt: skip
