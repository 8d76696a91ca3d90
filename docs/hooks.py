"""What MkDocs calls: pages of ops and networks, from the package itself, so that none can be missing."""

import inspect
from pathlib import Path

import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from vision_ops import models, nn, ops
from vision_ops.ops._registration import fused_ops

ROOT = Path(__file__).parents[1]
NETWORKS = [getattr(models, name) for name in models.__all__ if name not in ("Backbone", "LoadedCheckpoint")]
NETWORKS = [cls for cls in NETWORKS if inspect.isclass(cls) and issubclass(cls, models.Backbone)]


def on_config(config: MkDocsConfig) -> None:
    """Fills the parts of the menu that mkdocs.yml leaves empty."""
    for entry in config.nav:
        if "Ops" in entry:
            entry["Ops"] = [{name: f"ops/{name}.md"} for name in ops.__all__]
        if "Networks" in entry:
            pages = [{network.__name__: f"networks/{network.__name__}.md"} for network in NETWORKS]
            entry["Networks"] = [{"Making and loading them": "networks/index.md"}, *pages]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in ops.__all__:
        files.append(File.generated(config, f"ops/{name}.md", content=op_page(name)))
    for network in NETWORKS:
        files.append(File.generated(config, f"networks/{network.__name__}.md", content=network_page(network)))
    entries = "\n\n".join(f"::: {getattr(nn, name).__module__}.{name}" for name in nn.__all__)
    files.append(File.generated(config, "modules.md", content=f"# Modules\n\n{inspect.getdoc(nn)}\n\n{entries}\n"))
    return files


def op_page(name: str) -> str:
    function, op = getattr(ops, name), fused_ops[name.removeprefix("fused_")]
    made_of = {"CPU": "CPUs: C++", "CUDA": f"NVIDIA GPUs: {'Triton' if op._triton else 'CUDA C++, Triton'}"}
    kernels = "; ".join(text for kind, text in made_of.items() if kind in op.kernels)
    lines = [*entry(f"{function.__module__}.{name}"), "## Where it runs", "", f"Kernels for {kernels}."]
    lines += [f"`vision_ops.reference.{op.name}` is the op in plain PyTorch.", ""]
    if row := readme_row(name):
        what, *support = row
        lines += [
            f"{what[0].upper()}{what[1:]}.",
            "",
            "| CPU | CUDA | dtypes |",
            "|---|---|---|",
            f"| {' | '.join(support)} |",
        ]
    return "\n".join(lines)


def entry(name: str) -> list[str]:
    """A function or class that is a page."""
    return [f"::: {name}", "    options:", "      heading_level: 1", ""]


def readme_row(name: str) -> list[str] | None:
    """What the table of ops in the README says."""
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 5 and f"`{name}`" in cells[0]:
            return cells[1:]
    return None


def network_page(network: type[models.Backbone]) -> str:
    lines = [*entry(f"{network.__module__}.{network.__name__}"), "## Variants", ""]
    lines += ["| name | parameters | images | official weights |", "|---|---|---|---|"]
    for name, variant in models._VARIANTS.items():
        if variant.network is network:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in models.create_model(name).parameters())
            size = " x ".join(map(str, variant.input_size[1:]))
            weights = f"[download]({variant.url})" if variant.url else "none published"
            lines.append(f"| `{name}` | {parameters / 1e6:.1f}M | {size} | {weights} |")
    return "\n".join(lines)
