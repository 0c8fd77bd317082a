"""Settings come from AFD_* variables once, complete and checked; whatever is wrong with one is a sentence."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from afd.config import (
    SETTINGS_OF,
    AttentionSettings,
    FFNSettings,
    GatewaySettings,
    ServiceSettings,
    load_settings,
    refuse_unknown_variables,
)
from afd.errors import ConfigError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Only the two settings that every service needs."""
    for name in list(os.environ):
        if name.upper().startswith("AFD_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AFD_MODEL", "/models/nano")
    monkeypatch.setenv("AFD_REDIS", "redis://localhost")
    return monkeypatch


def refusal(kind: type[ServiceSettings]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(kind)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("kind", SETTINGS_OF.values())
def test_a_model_and_a_redis_are_all_that_a_service_needs(kind: type[ServiceSettings]) -> None:
    settings = load_settings(kind)
    assert (settings.model, settings.redis) == (Path("/models/nano"), "redis://localhost")


def test_variables_are_read_in_their_own_units(environment: pytest.MonkeyPatch) -> None:
    for name, value in {"KV_CACHE_GIB": "0.5", "MAX_SEQUENCES": "7", "FFN_SHARDS": "0", "DEVICE": "cuda:1"}.items():
        environment.setenv(f"AFD_{name}", value)
    settings = load_settings(AttentionSettings)
    read = settings.kv_cache_gib, settings.max_sequences, settings.ffn_shards, settings.device
    assert read == (0.5, 7, 0, "cuda:1")


def test_every_replica_has_a_name_of_its_own() -> None:
    assert load_settings(FFNSettings).replica_id != load_settings(FFNSettings).replica_id


def test_others_reach_a_replica_where_it_listens_unless_told_otherwise(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AFD_HOST", "127.0.0.2")
    assert load_settings(GatewaySettings).advertised_host == "127.0.0.2"
    environment.setenv("AFD_HOST", "0.0.0.0")
    assert load_settings(GatewaySettings).advertised_host == socket.gethostname()
    environment.setenv("AFD_ADVERTISE_HOST", "gateway-1")
    assert load_settings(GatewaySettings).advertised_host == "gateway-1"


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_stands_in_brackets_where_a_port_follows(environment: pytest.MonkeyPatch, host: str) -> None:
    environment.setenv("AFD_HOST", host)
    settings = load_settings(GatewaySettings)
    assert (settings.host, settings.is_loopback) == ("::1", True)
    assert (settings.address(8000), settings.grpc_address(50051)) == ("[::1]:8000", "[::1]:50051")
    environment.setenv("AFD_ADVERTISE_HOST", "fd00::7")
    assert load_settings(GatewaySettings).grpc_address(50051) == "[fd00::7]:50051"
    environment.setenv("AFD_ADVERTISE_HOST", "10.1.2.3")
    assert load_settings(GatewaySettings).grpc_address(50051) == "10.1.2.3:50051"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings(FFNSettings).dtype = "float32"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("AFD_MAX_SEQUENCE", "AFD_MAX_SEQUENCES"),
        ("AFD_MAX_FRAME_TOKNES", "AFD_MAX_FRAME_TOKENS"),
        ("AFD_KV_CACHE_GB", "AFD_KV_CACHE_GIB"),
        ("AFD_SHARDS", "AFD_SHARD"),
    ],
)
def test_a_misspelt_setting_is_refused_with_the_closest_one(
    environment: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    environment.setenv(name, "8")
    for kind in SETTINGS_OF.values():
        assert refusal(kind) == f"no such setting: {name}, did you mean {meant}?"


def test_a_setting_like_no_other_is_refused_with_all_that_there_are(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AFD_QQQQQQQQQQ", "1")
    sentence = refusal(GatewaySettings)
    assert sentence.startswith("no such setting: AFD_QQQQQQQQQQ; the settings are ")
    assert all(f"AFD_{name.upper()}" in sentence for kind in SETTINGS_OF.values() for name in kind.model_fields)


def test_what_kubernetes_injects_for_a_service_named_like_ours_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AFD_FFN_PORT", "tcp://10.0.0.1:50051")
    assert refusal(AttentionSettings).startswith("no such setting: AFD_FFN_PORT")


def test_a_setting_of_another_service_is_not_refused(environment: pytest.MonkeyPatch) -> None:
    for name, value in {"SHARD": "1/3", "HTTP_PORT": "8000", "FFN_SHARDS": "3"}.items():
        environment.setenv(f"AFD_{name}", value)
    assert load_settings(FFNSettings).shard == (1, 3)
    assert load_settings(GatewaySettings).http_port == 8000
    assert load_settings(AttentionSettings).ffn_shards == 3


def test_variables_of_others_are_left_alone() -> None:
    refuse_unknown_variables(["PATH", "AFDX", "XAFD_MODEL", "OMP_NUM_THREADS"])


@pytest.mark.parametrize("name", ["AFD_MODEL", "AFD_REDIS"])
def test_a_setting_that_is_needed_is_asked_for(environment: pytest.MonkeyPatch, name: str) -> None:
    environment.delenv(name)
    assert refusal(GatewaySettings) == f"{name} is not set"


@pytest.mark.parametrize(("text", "shard"), [("0/1", (0, 1)), ("1/3", (1, 3)), ("2/3", (2, 3)), ("41/64", (41, 64))])
def test_a_shard_is_written_as_its_number_of_how_many(
    environment: pytest.MonkeyPatch, text: str, shard: tuple[int, int]
) -> None:
    environment.setenv("AFD_SHARD", text)
    assert load_settings(FFNSettings).shard == shard


@pytest.mark.parametrize("text", ["3/3", "4/3", "0/0", "1", "1/", "/3", "a/b", "-1/3", "1/2/3", "1.0/3", "", "1 / 3 x"])
def test_a_shard_that_does_not_exist_is_refused(environment: pytest.MonkeyPatch, text: str) -> None:
    environment.setenv("AFD_SHARD", text)
    assert refusal(FFNSettings).startswith(f"AFD_SHARD={text}: ")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (FFNSettings, "REDIS", "http://localhost"),
        (FFNSettings, "REDIS", "localhost:6379"),
        (FFNSettings, "GRPC_PORT", "65536"),
        (FFNSettings, "GRPC_PORT", "-1"),
        (FFNSettings, "GRPC_PORT", "tcp://10.0.0.1:50051"),
        (FFNSettings, "LEASE_S", "0"),
        (FFNSettings, "LEASE_S", "nan"),
        (FFNSettings, "LEASE_S", "inf"),
        (FFNSettings, "LEASE_S", "5s"),
        (FFNSettings, "TRACE_SAMPLE", "1.5"),
        (FFNSettings, "TRACE_SAMPLE", "nan"),
        (FFNSettings, "LOG_LEVEL", "loud"),
        (FFNSettings, "DTYPE", "float16"),
        (FFNSettings, "DEVICE", "tpu"),
        (FFNSettings, "DEVICE", "cuda:"),
        (FFNSettings, "NETWORK_NICE", "-1"),
        (FFNSettings, "NETWORK_NICE", "20"),
        (FFNSettings, "THREADS", "0"),
        (FFNSettings, "THREADS", "two"),
        (FFNSettings, "MAX_FRAME_TOKENS", "0"),
        (AttentionSettings, "FFN_SHARDS", "-1"),
        (AttentionSettings, "MICROBATCHES", "0"),
        (AttentionSettings, "MICROBATCHES", "65"),
        (AttentionSettings, "MICROBATCHES", "many"),
        (AttentionSettings, "MAX_SEQUENCES", "1.5"),
        (AttentionSettings, "PREFILL_CHUNK_TOKENS", ""),
        (AttentionSettings, "BLOCK_SIZE", "0"),
        (AttentionSettings, "KV_CACHE_GIB", "0"),
        (AttentionSettings, "KV_CACHE_GIB", "-1"),
        (AttentionSettings, "KV_CACHE_GIB", "inf"),
        (AttentionSettings, "KV_CACHE_GIB", "nan"),
        (AttentionSettings, "NUM_KV_BLOCKS", "0"),
        (AttentionSettings, "FFN_TIMEOUT_S", "-3"),
        (GatewaySettings, "HTTP_PORT", "http"),
        (GatewaySettings, "MAX_BODY_BYTES", "0"),
        (GatewaySettings, "REQUEST_TIMEOUT_S", "1e9"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(
    environment: pytest.MonkeyPatch, kind: type[ServiceSettings], name: str, value: str
) -> None:
    environment.setenv(f"AFD_{name}", value)
    sentence = refusal(kind)
    assert sentence.startswith(f"AFD_{name}={value}: ")
    assert len(sentence) > len(f"AFD_{name}={value}: ") + 5, "it says why"


@pytest.mark.parametrize(
    ("text", "ffn_shards", "counts"),
    [("3", 1, range(3, 4)), ("auto", 2, range(1, 5)), ("3", 0, range(1, 2)), ("auto", 0, range(1, 2))],
)
def test_microbatches_are_a_number_or_auto_and_one_if_collocated(
    environment: pytest.MonkeyPatch, text: str, ffn_shards: int, counts: range
) -> None:
    environment.setenv("AFD_MICROBATCHES", text)
    environment.setenv("AFD_FFN_SHARDS", str(ffn_shards))
    assert load_settings(AttentionSettings).microbatch_counts == counts


def test_everything_that_is_wrong_is_told_at_once(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AFD_GRPC_PORT", "x")
    environment.setenv("AFD_LEASE_S", "y")
    sentence = refusal(FFNSettings)
    assert "AFD_GRPC_PORT=x: " in sentence
    assert "AFD_LEASE_S=y: " in sentence


def test_a_redis_url_that_is_refused_does_not_show_its_password(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AFD_REDIS", "http://:secret@localhost")
    sentence = refusal(FFNSettings)
    assert "AFD_REDIS" in sentence
    assert "secret" not in sentence


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for kind in SETTINGS_OF.values() for field in kind.model_fields.values())


def test_a_variable_that_is_like_no_setting_is_not_taken_for_one() -> None:
    with pytest.raises(ConfigError, match="no such setting: AFD_FOO; the settings are AFD_"):
        refuse_unknown_variables(["AFD_FOO"])
