"""Loading: the order of layers, what is refused and how, the round trip of the resolved text."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.fields import KeyRule, check_keys, walk
from configs.keys import all_keys
from configs.load import from_yaml_text, load_config, to_yaml
from configs.schema import BlendPart, Config
from configs.sources import shipped_names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return name


def problems_of(name: str, *overrides: str) -> dict[str, tuple[object, str, str]]:
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    return {p.path: (p.got, p.rule, p.fix) for p in caught.value.problems}


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_config_loads(name: str) -> None:
    assert load_config(name).config


def test_layers_in_order(folder: Path) -> None:
    write(folder, "one.yaml", "optimizer: {lr: 1.0, beta1: 0.1}\nrun: {steps: 1}\n")
    write(folder, "two.yaml", "optimizer: {lr: 2.0}\nlaunch: {env: {A: x, B: y}}\n")
    name = write(folder, "top.yaml", "base: [one.yaml, two]\nrun: {steps: 3}\nlaunch: {env: {B: z}}\n")
    loaded = load_config(name, ["optimizer.eps=1e-5"])
    assert loaded.config.optimizer.lr == 2.0 and loaded.config.optimizer.beta1 == 0.1
    assert loaded.config.run.steps == 3 and loaded.config.optimizer.eps == 1e-5
    assert loaded.config.launch.env == {"A": "x", "B": "z"}
    keys = ("optimizer.lr", "run.steps", "optimizer.eps", "optimizer.beta2", "launch.env.B")
    assert [loaded.origin[key] for key in keys] == ["two.yaml", "top.yaml", "command line", "default", "top.yaml"]


def test_base_may_be_a_shipped_name_or_beside_the_file(folder: Path) -> None:
    (folder / "sub").mkdir()
    write(folder, "sub/near.yaml", "run: {seed: 7}\n")
    name = write(folder, "sub/top.yaml", "base: [model/tiny_moe, near.yaml]\n")
    config = load_config(name).config
    assert config.model.name == "tiny_moe" and config.run.seed == 7


def test_origin_covers_every_leaf() -> None:
    loaded = load_config("quickstart", ["data.train=[{path: a}, {path: b, weight: 2}]"])
    leaves = {path.split("[")[0] for path, _, _ in walk(loaded.config)}
    assert leaves <= set(loaded.origin)
    assert loaded.origin["data.train"] == "command line"
    assert loaded.origin["model.hidden_size"] == "configs/model/tiny_moe.yaml"


def test_all_problems_at_once(folder: Path) -> None:
    write(folder, "base.yaml", "metrics: {sinks: console}\nmodel: {hiden_size: 8}\n")
    name = write(
        folder, "top.yaml", "base: base.yaml\nparallel: {tensor: two, pipelne: 2}\nmodle: {x: 1}\nrun: {name: '${no.key}'}\n"
    )
    got = problems_of(name, "optimizer.lrr=1", "batch.seq_length_tokens=1.5", "nonsense")
    assert set(got) == {
        "metrics.sinks", "model.hiden_size", "parallel.tensor", "parallel.pipelne", "modle", "run.name",
        "optimizer.lrr", "batch.seq_length_tokens", "command line",
    }  # fmt: skip
    assert got["model.hiden_size"][2] == "did you mean model.hidden_size?"
    assert got["parallel.pipelne"][2] == "did you mean parallel.pipeline?"
    assert got["modle"][2] == "did you mean model?"
    assert got["optimizer.lrr"][2] == "did you mean optimizer.lr?"
    assert got["parallel.tensor"][1] == "must be a whole number (from: top.yaml)"
    assert got["metrics.sinks"][1] == "must be a list of text (from: base.yaml)"
    assert "no.key" in got["run.name"][1]


def test_a_whole_number_may_have_an_exponent(folder: Path) -> None:
    config = load_config(write(folder, "long.yaml", "run: {tokens: 13e12}\n"), ["data.cache_dir=1e3", "run.seed=1e3"]).config
    assert (config.run.tokens, config.run.seed, config.data.cache_dir) == (13_000_000_000_000, 1000, "1e3")
    assert set(problems_of("quickstart", "run.tokens=1.5e0", "run.seed=.inf")) == {"run.tokens", "run.seed"}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "optimizer.lr"),
        ("model.num_experts", "model.moe.num_experts"),
        ("parallel.tensor_parallel", "parallel.tensor"),
        ("model.attention.heads", "model.attention.num_heads"),
        ("precision.param", "precision.params"),
        ("batch.micro_batch_size", "batch.micro_batch_seqs"),
    ],
)
def test_nearest_name(folder: Path, wrong: str, right: str) -> None:
    assert problems_of("quickstart", f"{wrong}=1")[wrong][2] == f"did you mean {right}?"


@pytest.mark.parametrize(
    ("text", "where", "rule"),
    [
        ("a: [1\n", "line 2, column 1", "must be YAML"),
        ("run:\n\tname: x\n", "line 2, column 1", "must be YAML"),
        ("run: {}\nrun: {}\n", "line 2", "found duplicate key"),
        ("- 1\n", "list", "must be a mapping"),
        ("hello\n", "str", "must be a mapping"),
        ("run: {name: '${open'}\n", "run", "must be readable by OmegaConf"),
        ("x: !!python/object:os.system {}\n", "line 1", "could not determine a constructor"),
        ("[" * 5000, "", "must be YAML"),
    ],
)
def test_files_that_are_no_config(folder: Path, text: str, where: str, rule: str) -> None:
    name = write(folder, "bad.yaml", text)
    (got, found, fix), *others = problems_of(name).values()
    assert where in str(got) and rule in found and fix and not others


def test_not_utf8_names_the_byte(folder: Path) -> None:
    (folder / "bad.yaml").write_bytes(b"run:\n  name: caf\xe9\n")
    assert problems_of("bad.yaml")["bad.yaml"][:2] == ("byte 16", "must be UTF-8 text")


def test_missing_file_lists_the_shipped_ones(folder: Path) -> None:
    _, rule, fix = problems_of("nowhere")["CONFIG"]
    assert "shipped" in rule and "quickstart" in fix and "model/tiny_moe" in fix
    name = write(folder, "top.yaml", "base: [nowhere]\n")
    assert problems_of(name)["top.yaml: base"][0] == "nowhere"
    longer_than_names_of_files = "x" * 300
    assert "CONFIG" in problems_of(longer_than_names_of_files)


def test_bases_in_a_circle(folder: Path) -> None:
    write(folder, "a.yaml", "base: b.yaml\n")
    write(folder, "b.yaml", "base: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in problems_of("a.yaml")["b.yaml: base"][1]
    write(folder, "c.yaml", "base: {x: 1}\n")
    assert "c.yaml: base" in problems_of("c.yaml")


def test_an_empty_file_is_all_defaults(folder: Path) -> None:
    assert load_config(write(folder, "empty.yaml", "# nothing\n")).config == Config()


def test_lists_and_mappings_on_the_command_line() -> None:
    words = ["data.train=[{path: x, weight: 1}, {path: 010}]", "launch.env={A: b}", "launch.env.B=on", "metrics.sinks=[]"]
    config = load_config("quickstart", [*words, "data.train.0.path=y", "data.train[1].weight=3"]).config
    assert config.data.train == [BlendPart("y", 1.0), BlendPart("010", 3.0)]
    assert config.launch.env == {"A": "b", "B": "on"} and config.metrics.sinks == []


def test_item_overrides_that_miss(folder: Path) -> None:
    got = problems_of(
        "quickstart", "data.train.1.path=x", "data.train.0.wieght=2", "parallel.pipeline_split.0=1", "launch.env.A-B=1"
    )
    assert got["data.train[1].path"][1] == "data.train has 1 item, counted from 0"
    assert got["data.train[0].wieght"][2] == "an item is {path, weight}"
    assert "0 items" in got["parallel.pipeline_split[0]"][1]
    assert "launch.env.A-B" in got


def test_text_keys_keep_what_was_written(folder: Path) -> None:
    name = write(folder, "t.yaml", "launch: {slurm: {time: 12:00:00, mem: 0}, env: {A: 010, B: 1e3, C: off}}\nrun: {name: on}\n")
    launch = load_config(name, ["run.dir=1:30"]).config.launch
    assert launch.slurm.time == "12:00:00" and launch.slurm.mem == "0"
    assert launch.env == {"A": "010", "B": "1e3", "C": "off"}
    config = load_config(name, ["run.dir=1:30", "launch.slurm.extra=[--a, 1:30]"]).config
    assert (config.run.name, config.run.dir, config.launch.slurm.extra) == ("on", "1:30", ["--a", "1:30"])


def test_interpolation(folder: Path) -> None:
    name = write(folder, "t.yaml", "run: {dir: 'out/${run.name}', steps: '${batch.global_batch_seqs}'}\n")
    config = load_config(name, ["run.name=x", r"model.source=\${kept}"]).config
    assert (config.run.dir, config.run.steps, config.model.source) == ("out/x", 8, "${kept}")
    got = problems_of(name, "run.name=${run.dir}", "run.seed=${model.name}")
    assert {"run.name", "run.dir", "run.seed"} == set(got)


def test_wrong_types() -> None:
    words = {
        "parallel.tensor": "true", "optimizer.lr": "fast", "model.moe": "8", "run.name": "null",
        "data.train": "x", "parallel.pipeline_split": "[1, 2.5]", "launch.env.A": "[1]", "run.seed": "???",
        "optimizer.eps": "1" + "0" * 400, "run.dir": "not utf-8: \udcff",
    }  # fmt: skip
    got = problems_of("quickstart", *(f"{key}={value}" for key, value in words.items()))
    assert set(got) == set(words)
    assert set(problems_of("quickstart", "launch.env=[1, 0]")) == {"launch.env"}
    assert got["parallel.pipeline_split"][1].startswith("must be a list of a whole number or null")
    assert got["model.moe"][1].startswith("must be a mapping of its keys")


@pytest.mark.parametrize(
    "word",
    [
        "launch.env.WANDB_API_KEY=x",
        "launch.env={HF_TOKEN: x}",
        "launch.env.DB_PASSWORD=x",
        "launch.env.X=0123456789abcdef0123456789abcdef01234567",
        "metrics.wandb.group=0123456789abcdef0123456789abcdef01234567",
        "metrics.wandb.tags=[hf_abcdefghijklmnopqrstuvwxyz]",
        "metrics.wandb.api_key=something",
        "metrics.wandb={api_key: something}",
    ],
)
def test_credentials_are_refused_and_never_shown(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [word])
    assert "(hidden)" in str(caught.value)
    assert (
        "something" not in str(caught.value) and "0123456789abcdef" not in str(caught.value) and "hf_abc" not in str(caught.value)
    )


def test_ordinary_environment_is_no_credential() -> None:
    words = ["launch.env={OMP_NUM_THREADS: 1, NCCL_SOCKET_IFNAME: eth0, TOKENIZERS_PARALLELISM: 'false', MONKEY: x}"]
    assert len(load_config("quickstart", words).config.launch.env) == 4


@pytest.mark.parametrize("name", shipped_names())
def test_resolved_text_reads_back_equal(name: str) -> None:
    loaded = load_config(name)
    assert from_yaml_text(loaded.text) == loaded.config
    assert to_yaml(from_yaml_text(loaded.text)) == loaded.text


# What YAML or OmegaConf might take for something else.
AWKWARD = st.sampled_from(
    ["1e-3", "yes", "null", "12:00:00", "${x}", r"\${x}", r"a\\${run.name}", "010", " x\n\ty", "", "é: #", "@"]
)


@given(text=AWKWARD | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])), number=st.floats(1e-9, 1e9))
@settings(max_examples=20, deadline=None)
def test_round_trip_of_any_text_and_number(text: str, number: float) -> None:
    config = Config()
    config.model.source, config.optimizer.lr, config.data.train = text, number, [BlendPart(text, number)]
    config.launch.env = {"A": text}
    assert from_yaml_text(to_yaml(config)) == config


def test_text_states_every_key_in_the_schemas_order() -> None:
    text = to_yaml(Config())
    positions = [text.index(f"\n{item.name}:") if item.name != "run" else 0 for item in dataclasses.fields(Config)]
    assert positions == sorted(positions)


FLOATS = [key.path for key in all_keys().values() if key.type is float and key.kind == "scalar"]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400"])
def test_no_float_is_infinite(value: str) -> None:
    """Each float key on the command line, and each weight of a blend."""
    assert len(FLOATS) > 30
    problems = check_keys(load_config("quickstart", [f"{path}={value}" for path in FLOATS]).config)
    found = {problem.path for problem in problems if re.search(r"finite number|number, not NaN", problem.rule)}
    assert found.issuperset(FLOATS)
    blend = load_config("quickstart", [f"data.train=[{{path: a, weight: {value}}}]"]).config
    assert [problem.path for problem in check_keys(blend)] == ["data.train[0].weight"]


def test_a_key_may_say_that_it_takes_infinity() -> None:
    assert KeyRule(low=0, infinite=True).broken_by(float("inf")) is None
    assert KeyRule(low=0, infinite=True).broken_by(float("-inf")) == "at least 0"
    assert KeyRule(low=0, infinite=True).broken_by(float("nan")) == "a number, not NaN"
    assert KeyRule(low=0).broken_by(10**400) is None, "a large integer is finite"


def test_a_misspelled_name_of_a_shipped_config_is_recognised() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("quickstrat")
    assert refused.value.problems[0].fix.startswith("did you mean quickstart? Otherwise give the path of a YAML file")
