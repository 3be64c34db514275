"""The whole config: one dataclass a section, one field a key, each with its meaning, unit and range.

A section is read by one module. Cross-key rules live in parallel/legality/verdict.py.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional

from configs.fields import key
from configs.model_schema import Model


@dataclass
class Run:
    name: str = key("run", "the run's name: its folder, its W&B name, its job name")
    dir: Optional[str] = key(None, "the run folder itself; None: runs/NAME")
    seed: int = key(1234, "of weights, data order and dropout", low=0)
    steps: Optional[int] = key(None, "optimizer steps after which the run stops", low=1)
    tokens: Optional[int] = key(None, "tokens after which the run stops, rounded up to a step; instead of steps", low=1)
    eval_interval_steps: Optional[int] = key(None, "validation every so many steps; None: at the end only", low=1)
    eval_batches: int = key(8, "global batches of one validation; 0: no validation", low=0)


@dataclass
class Parallel:
    tensor: int = key(1, "tensor parallel degree", low=1)
    sequence: Optional[bool] = key(
        None, "split activations between the tensor-parallel products over the sequence; None: when tensor > 1"
    )
    pipeline: int = key(1, "pipeline stages", low=1)
    virtual_pipeline: Optional[int] = key(None, "chunks of layers a stage (interleaved schedule); None: 1", low=1)
    pipeline_split: Optional[List[int]] = key(
        None, "layers of each chunk in model order; None: balanced with embedding and head counted", low=0
    )
    context: int = key(1, "context parallel degree", low=1)
    context_comm: str = key("p2p", "how keys and values travel on a GPU", choices=("p2p", "a2a", "all_gather", "a2a+p2p"))
    expert: int = key(1, "expert parallel degree", low=1)
    expert_tensor: int = key(1, "tensor parallel degree inside an expert; unlike Megatron, unset means 1, not tensor", low=1)
    overlap_expert_comm: bool = key(False, "tokens travel to their experts while another micro-batch computes (bf16)")


@dataclass
class Zero:
    engine: str = key("megatron", "who owns gradients and optimizer state", choices=("megatron", "deepspeed"))
    stage: int = key(
        1, "0 nothing, 1 optimizer state, 2 also gradients, 3 also weights sharded over data parallel ranks", low=0, high=3
    )
    offload: str = key("none", "keep optimizer state, or parameters too, outside the GPU", choices=("none", "optimizer", "param"))
    offload_device: str = key("cpu", "where offloaded optimizer state lives; nvme: zero.stage=3", choices=("cpu", "nvme"))
    nvme_path: Optional[str] = key(
        None, "folder on each node's NVMe disk, for offload_device=nvme; emptied of this run's files at its start and end"
    )
    overlap_grad_reduce: bool = key(False, "reduce gradients while the backward pass runs (GPU)")
    overlap_param_gather: bool = key(False, "gather weights while the forward pass runs (GPU)")


@dataclass
class Precision:
    params: str = key("bf16", "weights and activations in the products", choices=("bf16", "fp32"))
    grads: str = key("fp32", "accumulation and reduction of gradients", choices=("fp32", "bf16"))
    fp8: str = key("none", "fp8 products through Transformer Engine (GPU)", choices=("none", "e4m3", "hybrid"))
    fp8_recipe: str = key("delayed", "how fp8 scales are found", choices=("delayed", "tensorwise", "blockwise", "mxfp8"))


@dataclass
class Recompute:
    mode: str = key("none", "activations computed again in the backward pass", choices=("none", "selective", "full"))
    modules: List[str] = key(
        factory=lambda: ["core_attn"],
        doc="selective: which parts",
        choices=("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"),
    )
    method: str = key("uniform", "full: groups of layers, or the first layers of each stage", choices=("uniform", "block"))
    num_layers: int = key(1, "full: layers a group (uniform), layers recomputed a chunk (block)", low=1)


@dataclass
class BatchRamp:
    """Batch size grows from start to batch.global_batch_seqs in equal increments. Off while start_seqs is None."""

    start_seqs: Optional[int] = key(None, "global batch at the start, in sequences", low=1)
    increment_seqs: int = key(1, "growth of one increment, in sequences", low=1)
    samples: int = key(0, "sequences over which the ramp runs", low=0)


@dataclass
class Batch:
    global_batch_seqs: int = key(8, "sequences of one optimizer step over all ranks", low=1)
    micro_batch_seqs: int = key(1, "sequences of one forward pass on one rank", low=1)
    seq_length_tokens: int = key(128, "tokens of one sequence", low=2)
    ramp: BatchRamp = key(factory=BatchRamp)


@dataclass
class Optimizer:
    kind: str = key("adamw", "optimizer", choices=("adamw",))
    lr: float = key(3e-4, "peak learning rate", above=0)
    beta1: float = key(0.9, "decay of the first moment", low=0, high=0.99999)
    beta2: float = key(0.95, "decay of the second moment", low=0, high=0.99999)
    eps: float = key(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = key(0.1, "decoupled; norms, biases and other vectors are excluded", low=0)
    clip_grad_norm: float = key(1.0, "global gradient norm is clipped to this; 0: not clipped", low=0)


@dataclass
class Schedule:
    kind: str = key("cosine", "after warm-up", choices=("cosine", "linear", "wsd", "constant"))
    warmup_steps: int = key(0, "linear rise from 0 to optimizer.lr", low=0)
    horizon_steps: Optional[int] = key(None, "step at which min_lr is reached; None: run.steps of the first attempt", low=1)
    min_lr: float = key(0.0, "learning rate at the horizon and after it", low=0)
    decay_steps: Optional[int] = key(None, "wsd: length of the final decay; None: a tenth of the horizon", low=1)
    decay_shape: str = key("linear", "wsd: shape of the final decay", choices=("linear", "cosine", "sqrt"))


@dataclass
class TokenizerConfig:
    kind: str = key("sentencepiece", "file format", choices=("sentencepiece", "huggingface"))
    path: Optional[str] = key(None, "tokenizer.model (sentencepiece) or tokenizer.json (huggingface)")
    eod: Optional[str] = key(None, "text of the end-of-document token; None: found by its usual names, <|endoftext|> first")


@dataclass
class BlendPart:
    path: str = key("", "prefix of PREFIX.bin and PREFIX.idx")
    weight: float = key(1.0, "share of the samples, relative to the other parts", above=0)


@dataclass
class Data:
    tokenizer: TokenizerConfig = key(factory=TokenizerConfig)
    train: List[BlendPart] = key(factory=list, doc="what is trained on: {path, weight} each")
    valid: List[BlendPart] = key(factory=list, doc="held-out text; empty: split off train by valid_fraction")
    valid_fraction: float = key(0.01, "documents at the end of each part that are held out, when valid is empty", low=0, high=0.5)
    document_mask: bool = key(False, "a token sees its own document only")
    mask_eod_loss: bool = key(False, "no loss where the input is the end-of-document token; router losses count all tokens")
    cache_dir: Optional[str] = key(None, "index cache; None: beside the data")


@dataclass
class Checkpoint:
    interval_steps: Optional[int] = key(None, "save every so many steps; None: at the end only", low=1)
    keep: int = key(2, "newest checkpoints kept; 0: all", low=0)
    milestone_interval_steps: Optional[int] = key(None, "checkpoints at multiples of this are kept for ever", low=1)
    asynchronous: bool = key(True, "train on while the files are written")
    save_at_end: bool = key(True, "save after the last step, and when stopped")
    load: Optional[str] = key(None, "start from the weights of this checkpoint (warm start): fresh optimizer, step 0")
    resume_step: Optional[int] = key(
        None, "go back to this step's checkpoint, once: later ones are set aside, and a restart goes on from the new line", low=1
    )
    allow_change: List[str] = key(
        factory=list, doc="keys or sections that may differ from the resumed attempt: [optimizer.lr, data]"
    )


@dataclass
class Divergence:
    """What follows a loss or gradient that is no number, and a loss that jumps. A refused step changes no weights."""

    nonfinite: str = key(
        "stop",
        "loss or gradients are not finite: stop the run, skip the step, or roll back and pass over the batches since",
        choices=("stop", "skip", "rollback"),
    )
    spike: str = key("off", "the loss jumps, by the rule below", choices=("off", "skip", "rollback", "stop"))
    spike_window_steps: int = key(64, "a loss is held against the median of the losses of so many applied steps before it", low=4)
    spike_min_steps: int = key(16, "no spike before so many losses are known", low=4)
    spike_deviations: float = key(8.0, "a spike is more above the median than so many times 1.4826 x MAD of the window", above=0)
    spike_floor_nats: float = key(0.2, "and more than this above it, in nats: a still window has a MAD near 0", above=0)
    max_skips: int = key(10, "skipped steps of the whole run, over all attempts; the next one is the end", low=1)
    max_rollbacks: int = key(3, "rollbacks of the whole run, over all attempts; the next one is the end", low=1)
    rollback_checkpoints: int = key(
        1, "how many complete checkpoints back a rollback goes; once more after a rollback without a save since", low=1
    )


@dataclass
class Wandb:
    project: str = key("phalanx", "W&B project")
    entity: Optional[str] = key(None, "W&B entity; None: the key's default")
    mode: str = key("auto", "auto: online when a key is found, else offline", choices=("auto", "online", "offline", "disabled"))
    group: Optional[str] = key(None, "W&B group")
    tags: List[str] = key(factory=list, doc="W&B tags")
    finish_timeout_s: float = key(30.0, "longest wait for the server at the end", above=0)


@dataclass
class Profile:
    start_step: Optional[int] = key(None, "first profiled step; None: no profile", low=1)
    num_steps: int = key(2, "profiled steps", low=1)
    ranks: List[int] = key(factory=lambda: [0], doc="profiled ranks", low=0)
    memory_snapshot: bool = key(False, "also a CUDA memory snapshot (GPU)")


@dataclass
class Metrics:
    sinks: List[str] = key(
        factory=lambda: ["console", "jsonl", "wandb"],
        doc="where metrics go; jsonl is the record and always on",
        choices=("console", "jsonl", "wandb"),
    )
    log_interval_steps: int = key(1, "console line every so many steps; the record has every step", low=1)
    expert_load_layers: int = key(8, "layers with their own expert-load keys, evenly spread; 0: only the summary", low=0)
    wandb: Wandb = key(factory=Wandb)
    profile: Profile = key(factory=Profile)


@dataclass
class Container:
    """What the ranks run inside of; the batch step stays on the host, where Slurm's commands are."""

    kind: str = key("none", "how Slurm's tasks enter the image", choices=("none", "pyxis", "apptainer"))
    image: Optional[str] = key(None, "image, as srun --container-image (pyxis) or apptainer exec takes it")
    mounts: List[str] = key(factory=list, doc="HOST:INSIDE folders; the run folder and the data must be seen under the same path")
    python: str = key("python3", "Python inside the image, with phalanx and torch installed")
    args: List[str] = key(factory=list, doc="further words for srun (pyxis) or apptainer exec")


@dataclass
class Slurm:
    partition: Optional[str] = key(None, "partition")
    account: Optional[str] = key(None, "account")
    qos: Optional[str] = key(None, "quality of service")
    time: Optional[str] = key(None, "time limit, as sbatch takes it: D-HH:MM:SS")
    constraint: Optional[str] = key(None, "node features")
    gres: Optional[str] = key(None, "gres of each node")
    gpus_per_node: Optional[str] = key(None, "GPUs of each node, as sbatch takes it")
    mem: Optional[str] = key(None, "memory of each node; 0: all")
    cpus_per_task: Optional[int] = key(None, "cores of each node's task", low=1)
    nodelist: Optional[str] = key(None, "nodes to use")
    exclude: Optional[str] = key(None, "nodes to keep off")
    reservation: Optional[str] = key(None, "reservation")
    dependency: Optional[str] = key(None, "start after other jobs, as sbatch takes it: afterok:123")
    chain: int = key(0, "further jobs submitted at once, each after the end of the one before: for sites without requeue", low=0)
    extra: List[str] = key(factory=list, doc="further #SBATCH lines, without the prefix: --mail-type=END")
    modules: List[str] = key(factory=list, doc="environment modules to load, in this order")
    prologue: List[str] = key(factory=list, doc="shell commands of the batch script before anything else, each whole in itself")
    srun_args: List[str] = key(factory=list, doc="further words for srun: --cpu-bind=none")
    python: Optional[str] = key(None, "Python with phalanx on the compute nodes; None: the one that submits")
    container: Container = key(factory=Container)
    min_nodes: Optional[int] = key(None, "go on with as few nodes when launch.nodes are not to be had; None: wait", low=1)
    stop_before_s: float = key(120.0, "save this long before the time limit, or more when saves take longer", low=0)
    requeue: bool = key(True, "start again by scontrol requeue after preemption, time limit, crash or node failure")
    max_attempts: int = key(50, "attempts of one submission, all causes counted", low=1)
    max_without_progress: int = key(
        2, "crashes or hangs in a row without a new checkpoint, after which the run is given up", low=1
    )
    exclude_after_failures: int = key(2, "failures of one node in one submission, after which it is excluded; 0: never", low=0)


@dataclass
class Watch:
    """When ranks count as hung, and nodes as slow; the launcher's watchdog looks from outside of the ranks."""

    step_timeout_s: Optional[float] = key(
        None, "longest time without a sign of progress inside a step; None: 20 median steps, at least 300 s; 0: never hung", low=0
    )
    start_timeout_s: float = key(
        1800.0, "the same outside of steps and in the first one: imports, data, restore, save, validation; 0: never hung", low=0
    )
    stacks: bool = key(True, "ask hung ranks for their stacks before the attempt is ended")
    straggler_ratio: Optional[float] = key(
        1.5, "a rank is slow from so many times the median of all; None: not looked at", above=1
    )
    probe_interval_steps: Optional[int] = key(
        20, "time a small fixed matrix product every so many steps, to tell a slow rank; None: never", low=1
    )
    per_rank_files_max: int = key(256, "with more ranks, logs are gathered into one file a node", low=0)


@dataclass
class Launch:
    target: str = key("local", "where the run starts", choices=("local", "slurm"))
    nodes: int = key(1, "machines", low=1)
    processes_per_node: int = key(1, "ranks a machine: one a GPU", low=1)
    env: Dict[str, str] = key(factory=dict, doc="environment of every rank")
    master_port: Optional[int] = key(
        None, "rendezvous port; None: a free one (local), from the job id (Slurm)", low=1024, high=65535
    )
    slurm: Slurm = key(factory=Slurm)
    watch: Watch = key(factory=Watch)


@dataclass
class Cluster:
    name: str = key("laptop", "a label, for people")
    device: str = key("auto", "where ranks compute; auto: cuda when present", choices=("auto", "cpu", "cuda"))
    gpu: Optional[str] = key(None, "GPU type, as named in the planner's table; None: CPU")
    gpus_per_node: int = key(8, "GPUs a machine", low=1)
    scaleup_gpus: Optional[int] = key(None, "GPUs in one scale-up (NVLink) domain; None: gpus_per_node", low=1)
    interface: Optional[str] = key(None, "network interface for gloo and NCCL's first contact: eth0; None: theirs to choose")
    network_gbit_s: Optional[float] = key(None, "NIC bandwidth a GPU, one direction; None: typical for the GPU", above=0)
    price_per_gpu_hour_usd: Optional[float] = key(None, "price of a GPU for an hour", low=0)


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
