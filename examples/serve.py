"""Classifies image files, or exports the network to run without this package.

    python examples/serve.py --weights run/best.safetensors pictures/*.jpg
    python examples/serve.py --model edgenext_small pictures/*.jpg  # the official weights, downloaded
    python examples/serve.py --model moat_0 --weights moat_0.npz pictures/*.jpg
    python examples/serve.py --weights run/best.safetensors --export onnx --out model.onnx  # or pt2

pip install 'vision-ops[examples]' has what it needs. What is exported takes float32 images (N, 3, S, S), prepared as
the file beside it says (OUT.json), and gives logits.
"""

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from vision_ops import models

HIGHEST_DIFFERENCE = 1e-3  # of the exported network's logits from the original's, as a share of the largest


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="IMAGE")
    add("--weights", help="what examples/train.py wrote; or, with --model, any checkpoint of that network")
    add(
        "--model", help="one of vision_ops.models.list_models(); without --weights, its official weights are downloaded"
    )
    add("--top", type=int, default=3, help="classes to print")
    add("--batch-size", type=int, default=32)
    add("--export", choices=("onnx", "pt2"), help="write the network instead, and compare its logits")
    add("--out", type=Path, help="where to; exported.onnx or exported.pt2 by default")
    args = parser.parse_args(argv)
    if not args.weights and not args.model:
        parser.error("--weights or --model is needed")
    if not args.files and not args.export:
        parser.error("images to classify, or --export, are needed")
    return args


def build(args: argparse.Namespace, fused: bool = True) -> tuple[models.Backbone, models.Preprocess, list[str] | None]:
    """The network with its weights, how it wants its pictures, and the names of its classes, where they are known."""
    if not args.model:
        with safe_open(args.weights, "pt") as file:
            written = (file.metadata() or {}).get("vision_ops")
        if written is None:
            raise SystemExit(f"{args.weights} does not say of which network it is; --model must")
        facts = json.loads(written)
        options = facts["model_args"] | {"num_classes": len(facts["classes"]), "checkpoint_path": args.weights}
        network = models.create_model(facts["model"], fused=fused, **options)
        return network.eval(), models.Preprocess(**facts["prepare"]), facts["classes"]
    network = models.create_model(args.model, fused=fused, pretrained=not args.weights)
    if args.weights:
        models.load_checkpoint(network, args.weights, classifier="resize")
    return network.eval(), models.preprocess(network), None


@torch.inference_mode()
def classify(args: argparse.Namespace) -> None:
    network, prepare, classes = build(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    for start in range(0, len(args.files), args.batch_size):
        files = args.files[start : start + args.batch_size]
        images = torch.cat([prepare(Image.open(file)) for file in files])
        logits = network(images.to(device, memory_format=torch.channels_last))
        shares, numbers = logits.softmax(1).topk(min(args.top, logits.shape[1]))
        for file, found in zip(files, zip(shares.tolist(), numbers.tolist(), strict=True), strict=True):
            best = [f"{classes[k] if classes else f'class {k}'} {share:.1%}" for share, k in zip(*found, strict=True)]
            print(f"{file}: {', '.join(best)}")


@torch.no_grad()
def export(args: argparse.Namespace) -> None:
    network, prepare, classes = build(args)
    plain = build(args, fused=False)[0]  # of PyTorch's own ops, which others know, too
    out = args.out or Path(f"exported.{args.export}")
    images = torch.randn(2, 3, prepare.size, prepare.size)
    if args.files:
        images = torch.cat([prepare(Image.open(file)) for file in args.files[: args.batch_size]])
        images = images if len(images) > 1 else images.repeat(2, 1, 1, 1)  # one would be taken for always one
    batch = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    run = (export_onnx if args.export == "onnx" else export_pt2)(plain, images, batch, out)
    facts: dict[str, Any] = {"prepare": asdict(prepare), "classes": classes}
    out.with_suffix(f"{out.suffix}.json").write_text(json.dumps(facts, indent=2) + "\n")
    for taken in (images, images[:1]):
        expected, found = network(taken), run(taken)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= HIGHEST_DIFFERENCE:
            raise SystemExit(
                f"{out} gives other logits than the network: they differ by {difference:.2g} of the largest"
            )
    print(f"{out}: logits of {len(images)} images within {difference:.1g} of the largest of the original's")


def export_pt2(plain: models.Backbone, images: torch.Tensor, batch: Any, out: Path) -> Any:
    torch.export.save(torch.export.export(plain, (images,), dynamic_shapes=batch), out)
    return torch.export.load(out).module()


def export_onnx(plain: models.Backbone, images: torch.Tensor, batch: Any, out: Path) -> Any:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own insides
        program = torch.onnx.export(plain, (images,), dynamic_shapes=batch, dynamo=True, verbose=False)
        program.save(out, external_data=False)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda taken: torch.from_numpy(session.run(None, {name: taken.numpy()})[0])


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    (export if args.export else classify)(args)


if __name__ == "__main__":
    main()
