"""One function a contender: each wraps the same model and returns what trains it for one step.

A step takes this rank's tokens of all its micro-batches and returns the mean
loss. All update with torch's AdamW in its fused form, every micro-batch.

Number formats where bf16 computes: DDP and zero1-torch keep an fp32 model and
run it under torch.autocast, which is how torch documents it for them; the
others convert the model to bf16 and keep fp32 masters. Gradients travel in
fp32, except DeepSpeed's, which are accumulated and sent in bf16, its default.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zero_bench.model import LEARNING_RATE, MICRO_BATCH

Step = Callable[[torch.Tensor], float]


@dataclass
class Job:
    """What is the same for all contenders, and what one of them notes beside its loss.

    Attributes:
        precision: fp32 or bf16.
        accumulation: micro-batches in a step.
        stage: of Powertrain and DeepSpeed.
        away: what rests elsewhere, and where: "host", "nvme" (optimizer state), "nvme-all" (parameters as well).
        path: a directory on the disk that "nvme" means.
        moved: returns the bytes that a contender has read and written there, if it counts them.
        update_seconds: what the last update alone took, where a contender measures it.
    """

    precision: str
    accumulation: int
    stage: int = 0
    away: str = ""
    path: str = ""
    moved: Callable[[], int] = lambda: 0
    update_seconds: list[float] = field(default_factory=list)

    @property
    def bf16(self) -> bool:
        """Whether bf16 computes."""
        return self.precision == "bf16"

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass of a model that stays in fp32."""
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of every contender."""
    return torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True)


def ddp(model: nn.Module, job: Job, shard: bool = False) -> Step:
    """DistributedDataParallel; with ``shard``, optimizer state split by ZeroRedundancyOptimizer."""
    dist.init_process_group("gloo")
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if shard:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(
            parallel.parameters(), torch.optim.AdamW, lr=LEARNING_RATE, fused=True
        )
    else:
        optimizer = adamw(parallel.parameters())

    def step(tokens: torch.Tensor) -> float:
        # Here and not after the update: DDP keeps the buckets, and only the gradients make them visible.
        optimizer.zero_grad()
        total = 0.0
        for index, micro in enumerate(tokens.split(MICRO_BATCH)):
            with nullcontext() if index + 1 == job.accumulation else parallel.no_sync():
                with job.autocast():
                    loss = parallel(micro)
                (loss / job.accumulation).backward()
            total += loss.item() / job.accumulation
        optimizer.step()
        return total

    return step


def zero1_torch(model: nn.Module, job: Job) -> Step:
    """DDP and torch's ZeroRedundancyOptimizer."""
    return ddp(model, job, shard=True)


def fsdp2(model: nn.Module, job: Job, every: bool = True) -> Step:
    """fully_shard on each block and on the root.

    With ``every``, gradients are reduced and sharded after each micro-batch, as
    stage 3 of the others does; without, once a step, and whole until then.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if job.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert isinstance(model, FSDPModule)
    optimizer = adamw(model.parameters())

    def step(tokens: torch.Tensor) -> float:
        total = 0.0
        for index, micro in enumerate(tokens.split(MICRO_BATCH)):
            model.set_requires_gradient_sync(every or index + 1 == job.accumulation)
            loss = model(micro)
            (loss / job.accumulation).backward()
            total += loss.item() / job.accumulation
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def fsdp2_once(model: nn.Module, job: Job) -> Step:
    """fully_shard that reduces gradients once a step: faster with accumulation, and more memory."""
    return fsdp2(model, job, every=False)


def deepspeed(model: nn.Module, job: Job) -> Step:
    """DeepSpeed's stages 0 to 3, over gloo, with torch's fused AdamW as the client's optimizer.

    Its own CPU Adam takes as long (both are limited by memory) and minutes to compile.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    # With it, every run leaves a file of 66 MiB a rank in /dev/shm, for a transport that training does not use.
    os.environ.pop("LOCAL_SIZE", None)
    import deepspeed as ds

    # The C++ operator of that transport, which would be compiled on first use.
    ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ds.init_distributed(dist_backend="gloo", verbose=False)
    zero: dict[str, Any] = {"stage": job.stage}
    if job.stage:
        # As Powertrain's: the default of 500M claims 2 GB here, and a bucket as large as the model was no faster.
        zero["reduce_bucket_size"] = 4_000_000
    optimizer: Any = None
    if job.away:
        optimizer = ds_offload(zero, job)
    if job.stage in (1, 2) and not job.away:
        zero["compute_grad_norm"] = False  # nobody clips, and nobody else computes it
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": job.accumulation,
        "zero_optimization": zero,
        "bf16": {"enabled": job.bf16},
        "gradient_clipping": 0.0,  # the default clips at 1, which changes the losses
        "steps_per_print": 10**9,
    }
    if job.away.startswith("nvme"):
        # What its own tuner (ds_nvme_tune) recommends on this kind of disk.
        config["aio"] = {"block_size": 2**20, "queue_depth": 32, "overlap_events": True, "intra_op_parallelism": 1}
    optimizer = optimizer(model.parameters()) if optimizer else adamw(model.parameters())
    engine, *_ = ds.initialize(model=model, optimizer=optimizer, config=config)

    def step(tokens: torch.Tensor) -> float:
        total = 0.0
        for micro in tokens.split(MICRO_BATCH):
            loss = engine(micro)
            engine.backward(loss)  # divides by the accumulation
            engine.step()
            total += loss.item() / job.accumulation
        return total

    return step


def ds_offload(zero: dict[str, Any], job: Job) -> Callable[..., torch.optim.Optimizer]:
    """Fill in DeepSpeed's offload tables; return its own CPU Adam, which it asks for then."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    where = "nvme" if job.away.startswith("nvme") else "cpu"
    place: dict[str, Any] = {"device": where, "pin_memory": False}
    if where == "nvme":
        place |= {"nvme_path": job.path, "pipeline_read": True, "pipeline_write": True}
    zero["offload_optimizer"] = place
    if job.away == "nvme-all":
        zero["offload_param"] = {
            "device": "nvme",
            "nvme_path": job.path,
            "pin_memory": False,
            "buffer_size": 40_000_000,
        }
    return lambda params: DeepSpeedCPUAdam(params, lr=LEARNING_RATE, adamw_mode=True)


def powertrain(model: nn.Module, job: Job) -> Step:
    """Powertrain: stage 0 is the core alone, without the table ``[zero]``."""
    import powertrain as pt

    config: dict[str, Any] = {
        "batch": {"micro": MICRO_BATCH, "accumulation": job.accumulation},
        "optimizer": {"name": "adamw", "lr": LEARNING_RATE, "fused": True},
        "precision": {"compute": job.precision},
    }
    if job.stage:
        config["zero"] = {"stage": job.stage}
    if job.away:
        config["optimizer"] = {"name": "adamw", "lr": LEARNING_RATE}
        config["optimizers"] = {}
        where = job.away.partition("-")[0]
        config["offload"] = {"optimizer": where, "path": job.path}
        if job.away == "nvme-all":
            config["offload"] |= {"parameters": where, "gradients": where}
    engine = pt.initialize(model, config)
    if job.away:
        tier = engine.context.tier("optimizer")
        job.moved = lambda: tier.moved().fetched + tier.moved().stored
    return lambda tokens: float(engine.train_step(tokens))


def bound(model: nn.Module, job: Job) -> Step:
    """Both ranks at once, each alone: what a step would take if communication cost nothing.

    In bf16, a bf16 model and fp32 masters, as the stages have.
    """
    dist.init_process_group("gloo")
    masters = list(model.parameters())
    if job.bf16:
        masters = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
        model.to(torch.bfloat16)
    working = list(model.parameters())
    optimizer = adamw(masters)

    def update() -> None:
        if job.bf16:
            for master, param in zip(masters, working, strict=True):
                master.grad = None if param.grad is None else param.grad.float()
        optimizer.step()
        if job.bf16:
            for master, param in zip(masters, working, strict=True):
                param.data.copy_(master.data)
        optimizer.zero_grad()
        model.zero_grad()

    def step(tokens: torch.Tensor) -> float:
        total = 0.0
        for micro in tokens.split(MICRO_BATCH):
            loss = model(micro)
            (loss / job.accumulation).backward()
            total += loss.item() / job.accumulation
        began = time.perf_counter()
        update()
        job.update_seconds.append(time.perf_counter() - began)
        return total

    return step


@dataclass(frozen=True)
class Contender:
    """A name on the command line.

    Attributes:
        start: wraps the model and returns its step.
        stage: the ZeRO stage where one function serves several.
        sharded_update: each rank updates its share of the parameters only.
        synchronous: the ranks average gradients; False for the bound.
        away: see ``Job``.
    """

    start: Callable[[nn.Module, Job], Step]
    stage: int = 0
    sharded_update: bool = True
    synchronous: bool = True
    away: str = ""

    @property
    def ours(self) -> bool:
        """Whether it runs in Powertrain's environment; the others run in that of the peers."""
        return self.start is powertrain


CONTENDERS: dict[str, Contender] = {
    "bound": Contender(bound, sharded_update=False, synchronous=False),
    "ddp": Contender(ddp, sharded_update=False),
    "zero1-torch": Contender(zero1_torch),
    "fsdp2": Contender(fsdp2),
    "fsdp2-once": Contender(fsdp2_once),
    **{f"deepspeed-{stage}": Contender(deepspeed, stage, stage > 0) for stage in range(4)},
    **{f"powertrain-{stage}": Contender(powertrain, stage, stage > 0) for stage in range(4)},
}

OFFLOADED: dict[str, Contender] = {
    f"{name}-{stage}-{away}": Contender(start, stage, away=away)
    for name, start in (("deepspeed", deepspeed), ("powertrain", powertrain))
    for stage, away in ((2, "host"), (3, "host"), (3, "nvme"), (3, "nvme-all"))
}
"""Contenders whose state rests elsewhere, for benchmarks/offload.py."""

CONTENDERS |= OFFLOADED
