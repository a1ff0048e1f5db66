"""One YAML file, one clear line when it is wrong."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from cluster.config import ClusterConfig, load_config, parse_config
from protos.errors import InvalidRequest


def test_a_model_alone_is_a_whole_config(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("model: /models/mixtral\n")
    config = load_config(path)
    assert config == ClusterConfig(model="/models/mixtral")
    assert config.experts.min_servers <= config.experts.max_servers


def test_a_config_survives_yaml(tmp_path: Path) -> None:
    config = parse_config({"model": "m", "experts": {"max_servers": 7}, "router": {"settings": {"hop_timeout_s": 1.5}}})
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experts: {}", ["model", "required"]),
        ("model: m\nexperts: {max_server: 3}", ["experts.max_server", "not permitted"]),
        ("model: m\nexperts: {min_servers: 5, max_servers: 2}", ["experts", "max_servers (2)", "min_servers (5)"]),
        (
            "model: m\nexperts: {settings: {budget_bytes: -1}}",
            ["experts.settings.budget_bytes", "greater than 0", "-1"],
        ),
        ("model: m\nplacement: {goal: 0.8}", ["rebalance_below (0.9)", "goal (0.8)"]),
        ("model: m\nplacement: {dead_after_s: 0.3}", ["dead_after_s (0.3)", "heartbeat_s is 0.25"]),
        ("model: m\nplacement: {min_copies: 3, max_copies: 2}", ["max_copies (2)", "min_copies (3)"]),
        ("model: m\nscaling: {target_busy: 0.9}", ["upscale_busy (0.8)", "target_busy (0.9)"]),
        ("model: m\nrouter: {num_replicas: 2}", ["num_replicas (2)", "port is 0"]),
        ("model: m\nrouter: {port: 70000}", ["router.port", "65535", "70000"]),
        ("model: m\nname: two words", ["name", "two words"]),
        ("- a list", ["mapping", "list"]),
        ("model: [unclosed", ["not YAML"]),
    ],
)
def test_a_wrong_config_gives_one_line_that_names_the_field(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        load_config(path)
    message = caught.value.message
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"absent\.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "absent.yaml")


def test_every_field_says_why_it_is_there() -> None:
    def silent(model: type[BaseModel]) -> list[str]:
        found = []
        for name, info in model.model_fields.items():
            if not info.description:
                found.append(f"{model.__name__}.{name}")
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                found += silent(info.annotation)
        return found

    assert not silent(ClusterConfig)


def test_weight_dtype_may_stand_beside_the_servers_settings() -> None:
    config = parse_config({"model": "m", "experts": {"weight_dtype": "int8", "settings": {"compute_threads": 1}}})
    assert config.experts.settings.weight_dtype == "int8"
    assert config.experts.settings.compute_threads == 1
    with pytest.raises(InvalidRequest, match="weight_dtype is given here and"):
        parse_config({"model": "m", "experts": {"weight_dtype": "int8", "settings": {"weight_dtype": "fp8"}}})
    with pytest.raises(InvalidRequest, match=r"experts\.settings\.weight_dtype.*'int2'"):
        parse_config({"model": "m", "experts": {"weight_dtype": "int2"}})
