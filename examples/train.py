"""Trains a classifier on folders of images, or on a generated set.

    python examples/train.py --model moganet_xtiny --data generated --size 64 --out run
    python examples/train.py --model hornet_tiny_7x7 --pretrained --data pictures --out run  # pictures/train/CLASS/...
    torchrun --nproc-per-node 8 examples/train.py --model ... --data ... --out ...  # DDP; with --fsdp, FSDP2

pip install 'vision-ops[examples]' has what it needs. What is random follows from the seed, the step and the number of
a picture, so that --resume goes on bit for bit, with the same arguments and as many processes; of three and more the
sums may differ in the last bit. All machines see the folder --out.
"""

import argparse
import copy
import json
import math
import os
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pictures import evaluation_batches, folders, generated, load, training_batches
from rich.progress import Progress
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vision_ops import models, nn

SHARDED = nn.MogaBlock, nn.HorBlock, nn.ConvEncoder, nn.ConvEncoderBNHS, nn.SDTAEncoder, nn.SDTAEncoderBNHS, nn.S2Block
SHARDED += nn.MBConv, nn.MOATBlock, nn.ArticleMBConv, nn.ArticleMOATBlock


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--model", required=True, help="one of vision_ops.models.list_models()")
    add("--model-args", type=json.loads, default={}, help='more arguments of the network, as {"depths": [1, 1, 2, 1]}')
    add("--data", required=True, help="a folder with images in train/CLASS and val/CLASS, or: generated")
    add("--out", type=Path, required=True, help="gets checkpoint.pt, last.safetensors, best.safetensors")
    add("--resume", action="store_true", help="go on from checkpoint.pt in --out, where it is")
    add("--pretrained", action="store_true", help="start from the official weights, with a new classifier")
    add("--size", type=int, help="of the images; the network's own by default")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=64, help="of all processes together")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=float, default=0.1, help="share of the steps in which the rate grows to --lr")
    add("--weight-decay", type=float, default=0.05)
    add("--drop-path", type=float, default=0.0, help="stochastic depth of the last block")
    add("--ema", type=float, default=0.999, help="decay of the average of the weights, which is evaluated and written")
    add("--amp", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    add("--checkpointing", action="store_true", help="compute blocks again in backward, for less memory")
    add("--compile", action="store_true", help="torch.compile")
    add("--fsdp", action="store_true", help="shard weights, gradients and optimizer; needs torchrun")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that load images, per process")
    add("--save-every", type=int, default=500, help="steps between checkpoints; there is one after every epoch, too")
    return parser.parse_args(argv)


def parallel(network, fsdp):
    """The network as one of several processes trains it."""
    if not fsdp:
        return DistributedDataParallel(network) if dist.is_initialized() else network
    for block in [module for module in network.modules() if isinstance(module, SHARDED)]:
        fully_shard(block)
    return fully_shard(network)


def groups(network, weight_decay):
    exempt, decayed = network.no_weight_decay(), {True: [], False: []}
    for name, parameter in network.named_parameters():
        decayed[parameter.ndim > 1 and name not in exempt].append(parameter)
    return [{"params": decayed[True], "weight_decay": weight_decay}, {"params": decayed[False], "weight_decay": 0.0}]


def rate(step, steps, args):
    """Linear warm-up, then half a cosine."""
    warmup = max(1, round(args.warmup * steps))
    falling = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return args.lr * ((step + 1) / warmup if step < warmup else falling)


@torch.no_grad()
def update_average(ema, network, decay, step):
    decay = min(decay, (step + 1) / (step + 10))  # forgets the first weights sooner
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(network.parameters()), step)
    for average, buffer in zip(ema.buffers(), network.buffers(), strict=True):
        average.copy_(buffer)


@torch.no_grad()
def accuracy(network, batches, device):
    """The share of right answers, which all processes find together."""
    counts = torch.zeros(2, device=device)
    for buffer in network.buffers() if dist.is_initialized() else ():  # statistics of batch norms are each one's own
        dist.broadcast(buffer, 0)
    for images, labels in batches:
        right = network(images.to(device)).argmax(1) == labels.to(device)
        counts += torch.stack([right.sum(), (labels >= 0).sum().to(device)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return (counts[0] / counts[1]).item()


def memory():  # the most so far, in GiB
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else resident


def write(path, save, contents, **options):
    """Whole or not at all, whenever the process ends."""
    save(contents, part := path.with_suffix(".part"), **options)
    part.replace(path)


def main(argv=None):
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.deterministic = True
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    train, val = generated(args.out / "pictures") if args.data == "generated" else folders(Path(args.data))
    torch.manual_seed(args.seed)
    options = {"num_classes": len(train.classes), "drop_path_rate": args.drop_path, "pretrained": args.pretrained}
    network = models.create_model(args.model, **options, device=device, **args.model_args)
    prepare = models.preprocess(network)
    train.prepare = val.prepare = prepare = replace(prepare, size=args.size or prepare.size)
    train.seed = args.seed
    epoch_steps = len(train) // args.batch_size
    if args.batch_size % world or not epoch_steps:
        raise SystemExit(f"--batch-size must be a multiple of {world} and at most {len(train)}, the images in train")
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    ema = parallel(ema, fsdp=True) if args.fsdp else ema
    network.set_grad_checkpointing(args.checkpointing)
    if args.compile:
        network.compile()
    model = parallel(network, args.fsdp)
    optimizer = torch.optim.AdamW(groups(network, args.weight_decay))
    autocast = torch.autocast(device.type, getattr(torch, args.amp), enabled=args.amp != "float32")
    whole, checkpoint = states.StateDictOptions(full_state_dict=True, cpu_offload=True), args.out / "checkpoint.pt"
    step, best = 0, 0.0
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        step, best = saved["step"], saved["best"]
        weights = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
        states.set_state_dict(model, optimizer, **weights, options=whole)
        states.set_model_state_dict(ema, saved["ema"], options=whole)

    def save():
        weights, moments = states.get_state_dict(model, optimizer, options=whole)
        contents = {"model": weights, "optimizer": moments, "ema": states.get_model_state_dict(ema, options=whole)}
        if rank == 0:
            write(checkpoint, torch.save, {**contents, "step": step, "best": best})

    for epoch in range(step // epoch_steps, args.epochs):
        keys = training_batches(len(train), args.batch_size, args.seed, epoch, rank, world)[step % epoch_steps :]
        with Progress(disable=rank > 0) as progress:
            bar, begin = progress.add_task("", total=len(keys)), time.perf_counter()
            for done, (images, labels) in enumerate(load(train, keys, args.workers), 1):
                for group in optimizer.param_groups:
                    group["lr"] = rate(step, args.epochs * epoch_steps, args)
                torch.manual_seed((args.seed * 10**9 + step) * world + rank)  # for stochastic depth and dropout
                with autocast:
                    logits = model(images.to(device, memory_format=torch.channels_last))
                    loss = F.cross_entropy(logits, labels.to(device), label_smoothing=0.1)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
                update_average(ema, model, args.ema, step)
                step += 1
                if step % 10 == 0 or done == len(keys):  # reading the loss waits for the device
                    speed = done * args.batch_size / (time.perf_counter() - begin)
                    text = f"loss {loss.item():.3f}, {speed:.0f} images/s, {memory():.1f} GiB"
                    progress.update(bar, completed=done, description=text)
                if step % args.save_every == 0 and step % epoch_steps:
                    save()
        with autocast:
            keys = evaluation_batches(len(val), args.batch_size // world, rank, world)
            share = accuracy(ema, load(val, keys, args.workers), device)
        best, average = max(best, share), states.get_model_state_dict(ema, options=whole)
        if rank == 0:
            print(f"epoch {epoch + 1} of {args.epochs}: {text}, accuracy {share:.1%}, best {best:.1%}", flush=True)
            facts = dict(model=args.model, model_args=args.model_args, classes=train.classes, prepare=asdict(prepare))
            for name in ("last", "best") if share == best else ("last",):
                write(args.out / f"{name}.safetensors", save_file, average, metadata={"vision_ops": json.dumps(facts)})
        save()


if __name__ == "__main__":
    main()
