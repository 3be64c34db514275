"""The whole config: one dataclass a section, one field a key, each with its meaning, unit and range.

A section is read by one module. Cross-key rules live in parallel/legality/verdict.py.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

from configs.data_schema import BlendPart as BlendPart
from configs.data_schema import Data
from configs.data_schema import DataPhase as DataPhase
from configs.data_schema import TokenizerConfig as TokenizerConfig
from configs.data_schema import ValidSet as ValidSet
from configs.fields import key
from configs.launch_schema import Launch
from configs.metrics_schema import Metrics
from configs.model_schema import Model
from configs.optimizer_schema import Optimizer


@dataclass
class Run:
    name: str = key("run", "Name of the run. It names the run folder (runs/NAME), the W&B run and the Slurm job.")
    dir: Optional[str] = key(None, "The run folder itself. null: runs/NAME.")
    seed: int = key(1234, "Seed of initial weights, data order and dropout.", low=0)
    steps: Optional[int] = key(None, "Optimizer steps after which the run stops. Set either this or run.tokens.", low=1)
    tokens: Optional[int] = key(
        None, "Training tokens after which the run stops, rounded up to a whole step. Set either this or run.steps.", low=1
    )
    eval_interval_steps: Optional[int] = key(None, "Steps between two validations. null: one validation at the end.", low=1)
    eval_batches: int = key(
        8, "Global batches of one validation. 0: only the sets of data.valid_sets that state their own.", low=0
    )


@dataclass
class Parallel:
    tensor: int = key(1, "Tensor parallel degree: ranks that share the matrix products of a layer.", low=1)
    sequence: Optional[bool] = key(
        None,
        "Sequence parallelism: tensor parallel ranks also split the sequence between their products. null: on when tensor > 1.",
    )
    pipeline: int = key(1, "Pipeline parallel degree: number of stages that the layers are divided into.", low=1)
    virtual_pipeline: Optional[int] = key(None, "Chunks of layers on each stage (interleaved schedule). null: 1.", low=1)
    pipeline_split: Optional[List[int]] = key(
        None, "Layers of each chunk in model order. null: balanced by cost, with embedding and output layer counted.", low=0
    )
    context: int = key(1, "Context parallel degree: ranks that share one sequence.", low=1)
    context_comm: str = key(
        "p2p", "How context parallel ranks exchange keys and values on GPUs.", choices=("p2p", "a2a", "all_gather", "a2a+p2p")
    )
    expert: int = key(1, "Expert parallel degree: ranks over which the routed experts of a layer are divided.", low=1)
    expert_tensor: int = key(
        1, "Tensor parallel degree inside each routed expert. Its default is 1; Megatron-Core's is the tensor degree.", low=1
    )
    overlap_expert_comm: bool = key(
        False, "Send tokens to experts while another micro-batch computes. Needs bf16 weights on GPUs."
    )


@dataclass
class Zero:
    engine: str = key("megatron", "Library that owns gradients and optimizer state.", choices=("megatron", "deepspeed"))
    stage: int = key(
        1,
        "What data parallel ranks divide among them. 0: nothing, 1: optimizer state, 2: also gradients, 3: also weights.",
        low=0,
        high=3,
    )
    offload: str = key(
        "none", "What is kept outside GPU memory. param: optimizer state and weights.", choices=("none", "optimizer", "param")
    )
    offload_device: str = key(
        "cpu", "Where offloaded optimizer state is kept. nvme needs zero.stage = 3.", choices=("cpu", "nvme")
    )
    nvme_path: Optional[str] = key(
        None,
        "Folder on the NVMe disk of each node, for offload_device = nvme. The run's files in it are deleted when the run starts and ends.",
    )
    overlap_grad_reduce: bool = key(False, "Reduce gradients while the backward pass runs. For GPUs.")
    overlap_param_gather: bool = key(False, "Gather weights while the forward pass runs. For GPUs; needs overlap_grad_reduce.")


@dataclass
class Precision:
    params: str = key("bf16", "Number format of weights and activations in matrix products.", choices=("bf16", "fp32"))
    grads: str = key("fp32", "Number format in which gradients are accumulated and reduced.", choices=("fp32", "bf16"))
    fp8: str = key(
        "none",
        "fp8 format of matrix products through Transformer Engine, on GPUs. none: products have the format of params.",
        choices=("none", "e4m3", "hybrid"),
    )
    fp8_recipe: str = key(
        "delayed",
        "How Transformer Engine computes the scales of fp8 values.",
        choices=("delayed", "tensorwise", "blockwise", "mxfp8"),
    )


@dataclass
class Recompute:
    mode: str = key(
        "none",
        "Activations that are computed again in the backward pass instead of kept. selective: those of modules; full: whole layers.",
        choices=("none", "selective", "full"),
    )
    modules: List[str] = key(
        factory=lambda: ["core_attn"],
        doc="With mode = selective: parts of a layer whose activations are computed again.",
        choices=("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"),
    )
    method: str = key(
        "uniform",
        "With mode = full. uniform: every layer, in groups of num_layers; block: the first num_layers layers of each chunk.",
        choices=("uniform", "block"),
    )
    num_layers: int = key(1, "With mode = full: layers in a group (uniform), or recomputed layers in each chunk (block).", low=1)


@dataclass
class BatchRamp:
    """Batch size grows from start to batch.global_batch_seqs in equal increments. Off while start_seqs is None."""

    start_seqs: Optional[int] = key(None, "Global batch of the first step, in sequences. null: no ramp.", low=1)
    increment_seqs: int = key(1, "Size of one increment of the global batch, in sequences.", low=1)
    samples: int = key(0, "Number of sequences over which the ramp extends.", low=0)


@dataclass
class Batch:
    global_batch_seqs: int = key(8, "Sequences of one optimizer step, over all ranks.", low=1)
    micro_batch_seqs: int = key(1, "Sequences of one forward pass on one data parallel rank.", low=1)
    seq_length_tokens: int = key(128, "Length of a training sequence in tokens.", low=2)
    ramp: BatchRamp = key(factory=BatchRamp)


@dataclass
class Schedule:
    kind: str = key(
        "cosine",
        "Shape of the learning rate after warm-up. wsd: constant, then a final decay.",
        choices=("cosine", "linear", "wsd", "constant"),
    )
    warmup_steps: int = key(0, "Steps in which the learning rate rises linearly from 0 to optimizer.lr.", low=0)
    horizon_steps: Optional[int] = key(
        None, "Step at which the learning rate reaches min_lr. null: the steps of the run, as its first attempt had them.", low=1
    )
    min_lr: float = key(0.0, "Learning rate at the horizon and after it.", low=0)
    decay_steps: Optional[int] = key(None, "With kind = wsd: steps of the final decay. null: a tenth of the horizon.", low=1)
    decay_shape: str = key("linear", "With kind = wsd: shape of the final decay.", choices=("linear", "cosine", "sqrt"))


@dataclass
class Checkpoint:
    interval_steps: Optional[int] = key(None, "Steps between two saves. null: one save at the end.", low=1)
    keep: int = key(2, "Number of newest checkpoints to keep. 0: all.", low=0)
    milestone_interval_steps: Optional[int] = key(
        None, "Checkpoints at multiples of this step are never deleted. null: none are milestones.", low=1
    )
    asynchronous: bool = key(True, "Continue training while the files of a checkpoint are written.")
    save_at_end: bool = key(True, "Save after the last step, and when the run is stopped.")
    load: Optional[str] = key(
        None, "Checkpoint whose weights a new run starts from. Its optimizer state is not loaded; the run starts at step 0."
    )
    resume_step: Optional[int] = key(
        None,
        "Go back to the checkpoint of this step, once. Later checkpoints are set aside; restarts continue from the new ones.",
        low=1,
    )
    after_save: List[str] = key(
        factory=list,
        doc="Shell commands that run on rank 0's node beside the training after each complete save. They get PHALANX_RUN_DIR, "
        "PHALANX_CHECKPOINT and PHALANX_STEP. One set runs at a time; of the saves meanwhile the newest is next.",
    )
    after_save_timeout_s: float = key(
        600.0,
        "Longest time for one of these commands, and for the end of a finished run to wait for them, in seconds.",
        above=0,
    )
    allow_change: List[str] = key(
        factory=list, doc="Keys or sections that may differ from the resumed attempt, such as [optimizer.lr, data]."
    )


@dataclass
class Divergence:
    """What follows a loss or gradient that is no number, and a loss that jumps. A refused step changes no weights."""

    nonfinite: str = key(
        "stop",
        "Reaction to a loss or gradient that is not finite. rollback: go back to a checkpoint and skip the batches since then.",
        choices=("stop", "skip", "rollback"),
    )
    spike: str = key(
        "off", "Reaction to a spike of the loss, as defined by the spike_ keys.", choices=("off", "skip", "rollback", "stop")
    )
    spike_window_steps: int = key(
        64, "A loss is compared with the median loss of this many steps before it; refused steps are not counted.", low=4
    )
    spike_min_steps: int = key(16, "Number of losses in the window below which no spike is detected.", low=4)
    spike_deviations: float = key(
        8.0,
        "A spike exceeds the median by more than this many times 1.4826 x MAD (median absolute deviation) of the window.",
        above=0,
    )
    spike_floor_nats: float = key(
        0.2, "A spike also exceeds the median by more than this, in nats: the MAD of a flat loss is near 0.", above=0
    )
    max_skips: int = key(10, "Skipped steps over all attempts of the run. One more stops the run.", low=1)
    max_rollbacks: int = key(3, "Rollbacks over all attempts of the run. One more stops the run.", low=1)
    rollback_checkpoints: int = key(
        1,
        "Number of complete checkpoints that a rollback goes back, and one more when no save followed the last rollback.",
        low=1,
    )


@dataclass
class Cluster:
    name: str = key("laptop", "Name of the cluster, for people only.")
    device: str = key(
        "auto", "Device of the ranks. auto: CUDA when there is a GPU, else the CPU.", choices=("auto", "cpu", "cuda")
    )
    gpu: Optional[str] = key(None, "GPU type, by its name in the planner's table (configs/gpus.json). null: no GPU.")
    gpus_per_node: int = key(8, "GPUs of one machine.", low=1)
    scaleup_gpus: Optional[int] = key(None, "GPUs of one scale-up (NVLink) domain. null: gpus_per_node.", low=1)
    interface: Optional[str] = key(
        None, "Network interface of gloo and of NCCL's bootstrap, such as eth0. null: the libraries choose."
    )
    network_gbit_s: Optional[float] = key(
        None, "Network bandwidth of one GPU in one direction, in Gbit/s. null: the usual one of the GPU type.", above=0
    )
    price_per_gpu_hour_usd: Optional[float] = key(
        None, "Price of one GPU for one hour, in US dollars. null: no cost is computed.", low=0
    )


@dataclass
class Config:
    run: Run = key(factory=Run)
    model: Model = key(factory=Model)
    parallel: Parallel = key(factory=Parallel)
    zero: Zero = key(factory=Zero)
    precision: Precision = key(factory=Precision)
    recompute: Recompute = key(factory=Recompute)
    batch: Batch = key(factory=Batch)
    optimizer: Optimizer = key(factory=Optimizer)
    schedule: Schedule = key(factory=Schedule)
    data: Data = key(factory=Data)
    checkpoint: Checkpoint = key(factory=Checkpoint)
    divergence: Divergence = key(factory=Divergence)
    metrics: Metrics = key(factory=Metrics)
    launch: Launch = key(factory=Launch)
    cluster: Cluster = key(factory=Cluster)


def run_dir(config: Config) -> str:
    """The run folder of this config."""
    return config.run.dir or f"runs/{config.run.name}"
