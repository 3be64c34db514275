"""Every rule has a config that breaks it and nothing else; what is legal passes; nothing that a user writes makes a crash."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.data_schema import DataPhase, ValidSet
from configs.errors import Problem
from configs.keys import Key, all_keys, key_names
from configs.load import load_config
from configs.schema import BlendPart, Config
from configs.sources import shipped_names
from parallel.legality.rules import near_divisors, near_multiples
from parallel.legality.sparse_attention import why_only_planned
from parallel.legality.verdict import NOTICE_RULES, PROBLEM_RULES, check_config, derive_layout


@dataclass(frozen=True)
class Case:
    """Values laid over the quickstart, and what is expected of them: parts of the rule's text and of the fix."""

    rule: str
    values: str
    path: str
    says: str
    fix: str


def read_cases() -> tuple[dict[str, str], list[Case]]:
    """The named values and the cases of legality_cases.txt, whose head explains its form."""
    names: dict[str, str] = {}
    cases: list[Case] = []
    rule = values = ""
    for line in (Path(__file__).parent / "legality_cases.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            rule = line.strip("[]")
        elif " := " in line:
            name, names[name] = line.split(" := ")
        elif line.startswith("    "):
            path, says = line.strip().split(": ", 1)
            says, _, fix = says.partition(" -> ")
            cases.append(Case(rule, values, path, says, fix))
        elif line and not line.startswith("#"):
            values = re.sub(r"@([A-Z]+)", lambda found: names[found[1]], line)
    return names, cases


NAMES, CASES = read_cases()
GPU, MLA, DENSE, BIASES = (NAMES[name] for name in ("GPU", "MLA", "DENSE", "BIASES"))
QUICKSTART = load_config("quickstart").config


def words_of(values: str) -> list[str]:
    """A case's key=value words: split at the blanks in front of a section's name."""
    sections = "|".join(key_names(Config))
    return re.split(rf" (?=(?:{sections})[.=])", values)


def config_of(values: str) -> Config:
    return load_config("quickstart", words_of(values)).config


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{case.path}")
def test_each_rule_says_where_what_and_how_to_mend(case: Case) -> None:
    config = config_of(case.values)
    found = check_config(config).problems
    matching = [problem for problem in found if problem.path == case.path and case.says in problem.rule]
    assert matching, f"expected {case.path}: ...{case.says}..., got {found}"
    assert case.fix in matching[0].fix and matching[0].fix
    if case.rule != "key":
        rule = next(rule for rule in PROBLEM_RULES if rule.name == case.rule)
        assert matching[0] in list(rule.check(config))


def test_every_rule_has_a_case() -> None:
    assert {rule.name for rule in PROBLEM_RULES} == {case.rule for case in CASES} - {"key"}


@pytest.mark.parametrize(
    "values",
    [
        "run.steps=10 schedule.warmup_steps=0",
        "parallel.tensor=2",
        "parallel.tensor=4 launch.processes_per_node=8",  # two key/value heads on four ranks
        "parallel.expert=1 parallel.expert_tensor=2",
        "parallel.context=2",
        "parallel.virtual_pipeline=2",
        "parallel.pipeline_split=[4,0]",
        "model.num_layers=5",
        "parallel.pipeline=4 parallel.expert=1",
        MLA,
        MLA + " model.mla.q_lora_rank=16 model.position.scaling={kind: yarn, factor: 4}",
        "model.position.scaling={kind: llama3, factor: 8, original_max_position: 8192}",
        DENSE,
        DENSE + " model.attention.num_query_groups=1 model.tie_embeddings=true parallel.tensor=2",
        BIASES + " model.activation=gpt_oss_glu model.attention.sinks=true model.attention.window_size_tokens=16",
        "model.attention.qkv_bias=true",
        "model.attention={window_size_tokens: 8, window_pattern: [1, 0, 0, 1]}",
        "model.moe.router={score: sigmoid, expert_bias: true, balance: seq_aux_loss, num_groups: 4, group_top_k: 2}",
        "model.moe={top_k: 1, router: {normalize_top_k: false}}",
        "model.moe={shared_ffn_hidden_size: 64, shared_gate: true, shared_overlap: true, first_dense_layers: 1}",
        "model.moe={capacity_factor: 1.5, pad_to_capacity: true}",
        "model.moe.layer_pattern=[0,1,0,1] model.mtp.num_layers=2",
        "precision.params=bf16 precision.grads=bf16",
        "zero={stage: 0}",
        "zero={engine: deepspeed, stage: 0}",
        "zero={engine: deepspeed, stage: 2} parallel.virtual_pipeline=2 model.tie_embeddings=true",
        "zero={engine: deepspeed, stage: 3, offload: param} precision.params=bf16 model.mtp.num_layers=1",
        "zero={overlap_grad_reduce: true, overlap_param_gather: true}",
        GPU + " precision={fp8: hybrid, params: bf16} model.moe.dispatcher=flex",
        "recompute.mode=full",
        "recompute={mode: selective, modules: [core_attn, moe, layernorm]}",
        "batch.ramp={start_seqs: 8, increment_seqs: 8, samples: 100}",
        "run.steps=null run.tokens=1000000",
        "schedule={kind: wsd, decay_steps: 100} checkpoint={milestone_interval_steps: 100}",
        "schedule.kind=constant schedule.warmup_steps=500",
        "launch.target=slurm launch.nodes=2 launch.slurm.time=1-00:00:00 batch.global_batch_seqs=64",
        "checkpoint.allow_change=[optimizer.lr, data]",
    ],
)
def test_legal_configs_pass(values: str) -> None:
    assert check_config(config_of(values)).problems == ()


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_configs_are_legal(name: str) -> None:
    # Models and clusters (model/NAME) are no whole runs.
    words = ["run.steps=10", "batch.global_batch_seqs=16"] if "/" in name else []
    config = load_config(name, words).config
    # Models that can be counted and not built say so, and nothing else is wrong with them.
    allowed = {"can_be_built"} if why_only_planned(config.model) else set()
    found = {rule.name for rule in PROBLEM_RULES if list(rule.check(config))}
    assert found <= allowed and len(check_config(config).problems) == len(found)


NOTICES = {
    "groups_leave_domain": (
        "launch.nodes=2 parallel.expert=4 parallel.pipeline=1 launch.processes_per_node=2",
        "parallel.expert",
    ),
    "pipeline_bubble": ("batch.global_batch_seqs=8", "parallel.pipeline"),
    "numbers_depend_on_layout": ("model.moe.router.jitter_eps=0.1", "model.moe.router.jitter_eps"),
    "zero_costs": ("zero={engine: deepspeed, stage: 3}", "parallel.pipeline"),
    "nothing_balances": ("model.moe.router.balance=none", "model.moe.router.balance"),
    "groups_score_logits": ("model.moe.router={num_groups: 4, group_top_k: 2}", "model.moe.router.num_groups"),
    "steps_after_horizon": ("schedule.horizon_steps=200", "schedule.horizon_steps"),
    "without_effect": ("schedule.decay_steps=10", "schedule.decay_steps"),
}


def test_every_notice_has_a_case() -> None:
    assert {rule.name for rule in NOTICE_RULES} == set(NOTICES)


@pytest.mark.parametrize("name", NOTICES)
def test_notices(name: str) -> None:
    values, path = NOTICES[name]
    rule = next(rule for rule in NOTICE_RULES if rule.name == name)
    assert path in [notice.path for notice in rule.check(config_of(values))]
    verdict = check_config(config_of(values))
    assert verdict.ok and path in [notice.path for notice in verdict.notices]


@pytest.mark.parametrize("values", ["model.hidden_dropout=0.1", "model.attention.dropout=0.1", "model.moe.capacity_factor=1"])
def test_what_depends_on_the_layout_is_said(values: str) -> None:
    assert values.split("=")[0] in [notice.path for notice in check_config(config_of(values)).notices]


def test_expert_groups_within_a_node_are_no_notice() -> None:
    config = config_of("launch.nodes=2 batch.global_batch_seqs=64")
    assert not [notice for notice in check_config(config).notices if notice.path.startswith("parallel")]


def test_all_problems_at_once() -> None:
    values = "parallel.tensor=3 zero.stage=2 batch.global_batch_seqs=0 run.tokens=5 schedule.kind=x model.moe.top_k=99"
    paths = {problem.path for problem in check_config(config_of(values)).problems}
    assert {"parallel", "parallel.tensor", "zero.stage", "batch.global_batch_seqs", "run.tokens", "schedule.kind",
            "model.moe.top_k"} <= paths  # fmt: skip


def test_checking_changes_nothing() -> None:
    config = config_of("parallel.tensor=2")
    before = copy.deepcopy(config)
    check_config(config)
    assert config == before


LEAVES = [key for key in all_keys().values() if key.kind in ("scalar", "list")]
BAD_VALUES: dict[type, list[object]] = {
    int: [0, -1, 3, 10**9],
    float: [0.0, -1.0, 1e30, float("inf"), float("nan")],
    bool: [False, True],
    str: ["", "x", "\x00/.."],
    BlendPart: [BlendPart()],
    ValidSet: [ValidSet()],
    DataPhase: [DataPhase()],
}


def set_key(config: Config, path: str, value: object) -> None:
    *sections, name = path.split(".")
    setattr(functools.reduce(getattr, sections, config), name, value)


@pytest.mark.parametrize("key", LEAVES, ids=lambda key: key.path)
def test_no_value_of_a_single_key_makes_a_crash(key: Key) -> None:
    values = BAD_VALUES[key.type]
    tries = [[], *([value] for value in values), values] if key.kind == "list" else values
    for bad in [*tries, None] if key.optional else tries:
        config = copy.deepcopy(QUICKSTART)
        set_key(config, key.path, bad)
        verdict = check_config(config)
        assert all(isinstance(problem, Problem) for problem in verdict.problems)
        derive_layout(config)


SMALL = st.integers(-1, 9)
FUZZED = [
    "parallel.tensor", "parallel.pipeline", "parallel.context", "parallel.expert", "parallel.expert_tensor",
    "parallel.virtual_pipeline", "launch.processes_per_node", "model.num_layers", "model.moe.num_experts", "model.moe.top_k",
    "model.moe.first_dense_layers", "model.moe.layer_frequency", "model.moe.router.num_groups", "model.moe.router.group_top_k",
    "model.attention.num_heads", "model.attention.num_query_groups", "batch.global_batch_seqs", "batch.micro_batch_seqs",
    "batch.ramp.start_seqs", "batch.ramp.increment_seqs", "batch.ramp.samples", "run.tokens", "model.mtp.num_layers",
]  # fmt: skip


@given(values=st.lists(st.tuples(st.sampled_from(FUZZED), SMALL), max_size=8))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_combination_makes_a_crash_and_a_legal_one_lays_out(values: list[tuple[str, int]]) -> None:
    config = copy.deepcopy(QUICKSTART)
    for path, value in values:
        set_key(config, path, value)
    verdict = check_config(config)
    if verdict.ok:
        layout = derive_layout(config)
        assert layout is not None and config.batch.global_batch_seqs % (config.batch.micro_batch_seqs * layout.data) == 0


def test_numbers_of_a_fix() -> None:
    assert near_multiples(10, 4) == "8 or 12" and near_multiples(3, 4) == "4"
    assert near_divisors(12, 5) == "4 or 6" and near_divisors(7, 9) == "7" and near_divisors(8, 1) == "1"


def test_every_rule_states_itself_in_a_docstring() -> None:
    silent = [rule.name for rule in (*PROBLEM_RULES, *NOTICE_RULES) if not (rule.check.__doc__ or "").rstrip().endswith(".")]
    assert silent == []
