"""Configuration files and flags: the known keys, the right types, a round trip, every file that we ship."""

from pathlib import Path

import pytest

from adpretrain.config import LEAST, PretrainConfig, ProjectorConfig
from adpretrain.parsing import from_dict, parse_command_line, read_yaml, to_yaml

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").rglob("*.yaml"))


def written(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_there_are_configs_to_load() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_says_nothing_twice(path: Path) -> None:
    config = parse_command_line(PretrainConfig, ["--config", str(path)])
    assert config == from_dict(PretrainConfig, read_yaml(str(path)))
    assert config != PretrainConfig()


def test_without_arguments_the_defaults_are_the_papers() -> None:
    config = parse_command_line(PretrainConfig, [])
    assert config == PretrainConfig()
    assert (config.optim.lr, config.optim.batch_size, config.optim.epochs, config.seed) == (1e-4, 32, 10, 42)
    loss = config.loss
    assert (loss.temperature, loss.radius, loss.margin, loss.lambda_) == (0.15, 0.4, 0.75, 1)
    assert (config.projector.references, config.projector.layers, config.shots) == (2048, 1, [1, 4, 8])


def test_the_later_of_file_and_flag_wins(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 1\nloss: {radius: 0.5, margin: 0.6}\nshots: [2]\n")
    config = parse_command_line(PretrainConfig, ["--config", path, "--loss.radius", "0.7", "--data.held_out", "[a, b]"])
    assert (config.seed, config.loss.radius, config.loss.margin, config.shots) == (1, 0.7, 0.6, [2])
    assert config.data.held_out == ["a", "b"]
    assert config.loss.temperature == 0.15
    assert parse_command_line(PretrainConfig, [f"--config={path}", "--seed=3"]).seed == 3
    assert parse_command_line(PretrainConfig, ["--seed=3", f"--config={path}"]).seed == 1


def test_a_config_survives_yaml(tmp_path: Path) -> None:
    arguments = [
        "--shots",
        "[3]",
        "--projector.architecture",
        "mlp",
        "--data.root",
        "some where: else",
        "--optim.lr=3e-5",
    ]
    config = parse_command_line(PretrainConfig, arguments)
    assert config.optim.lr == 3e-5
    assert parse_command_line(PretrainConfig, ["--config", written(tmp_path, to_yaml(config))]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lost: {}", r"unknown key lost \(did you mean loss\?\); known keys: run, data, .*seed"),
        (
            "loss: {temprature: 1}",
            r"unknown key loss\.temprature \(did you mean loss\.temperature\?\).*known keys: lambda_",
        ),
        ("loss: {zzzzzz: 1}", r"unknown key loss\.zzzzzz; known keys"),
        ("loss: 3", "loss must be a mapping, got 3"),
        ("- 1", "must be a mapping of keys, got list"),
        ("", "must be a mapping of keys, got NoneType"),
        ("a: [", "cannot read configuration"),
    ],
)
def test_a_bad_file_is_named_with_the_way_out(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        parse_command_line(PretrainConfig, ["--config", path])
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--loss.radius=wide", "(?s)loss.radius.*a number"),
        ("--shots=[a]", "(?s)shots.*a whole number"),
        ("--projector.architecture=cnn", "(?s)architecture.*learnable_kv"),
        ("--shots=[]", r"shots \[\] must list"),
        ("--shots=[0]", r"shots \[0\] must list"),
        ("--cache.draws=2", "set augment to 'once' or 'none'"),
        ("--references.pool=8", r"references\.pool 8 is too small: K = 8 references of 1 images .* need 9 photographs"),
        *(
            (f"--{key}={least - 1}", f"{key} -?[0-9.]+ must be a number of at least {least}")
            for key, least in LEAST.items()
        ),
        ("--loss.temperature=0", "loss.temperature 0.0 must be positive"),
        ("--optim.milestones=[2.0]", r"optim.milestones \[2.0\] must be fractions"),
        ("--augment=none", r"set loss\.lambda_ to 0"),
        ("--tempo=3", "unknown flag --tempo"),
        ("--loss.temprature=0.2", r"unknown flag --loss\.temprature \(did you mean --loss\.temperature\?\)"),
        ("--data.rooot", r"did you mean --data\.root\?"),
    ],
)
def test_a_bad_value_is_named(flag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_command_line(PretrainConfig, [flag])


def test_kept_residuals_and_shared_references_exclude_each_other() -> None:
    flags = ["--cache.draws=1", "--augment=once", "--references.together=2"]
    with pytest.raises(ValueError, match=r"leave references\.together and \.pool out"):
        parse_command_line(PretrainConfig, flags)
    assert parse_command_line(PretrainConfig, flags[:2]).references.together == 1
    assert parse_command_line(PretrainConfig, flags[1:]).references.together == 2


def test_flags_reach_into_mappings_and_append_to_lists() -> None:
    config = parse_command_line(PretrainConfig, ["--data.columns.mask", "segmentation", "--shots=[1]", "--shots+=4"])
    assert config.data.columns == {"mask": "segmentation"}
    assert config.shots == [1, 4]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read configuration .*absent\.yaml"):
        parse_command_line(PretrainConfig, ["--config", str(tmp_path / "absent.yaml")])


def test_from_dict_checks_keys_and_types() -> None:
    assert from_dict(ProjectorConfig, {"heads": 4}).heads == 4
    with pytest.raises(ValueError, match=r"run\.json: unknown key head \(did you mean heads\?\)"):
        from_dict(ProjectorConfig, {"head": 4}, "run.json")
    with pytest.raises(ValueError, match=r"(?s)run\.json: .*heads"):
        from_dict(ProjectorConfig, {"heads": "four"}, "run.json")
