"""Test the operator's limits on exits and strategies, apart from the server."""

import json
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_llm.cli.serving.sign_limits import run_sign_limits
from ee_llm.errors import RequestError
from ee_llm.inference.choices import MEASURES
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.strategies import STRATEGIES, SelfSpeculation
from ee_llm.serving.operator import gatekeeper
from ee_llm.serving.operator.audit import AuditLog
from ee_llm.serving.operator.enforce import Effective
from ee_llm.serving.operator.gatekeeper import Gatekeeper
from ee_llm.serving.protocol.ee import EEClamp, EEOptions
from ee_llm.serving.protocol.errors import ApiError

OWN = ExitPolicy((2, 4), (0.9, 0.8))
KEY = "0123456789abcdef0123456789abcdef"
# printf '{"min_thresholds": 0.7}' | openssl dgst -sha256 -hmac KEY
SIGNATURE = "41a1f1d6e75f0f9e739dc81f08dcd99229f3800affec7a047061e6f5c2027179"


def write(folder: Path, limits: Any) -> Path:
    path = folder / "limits.json"
    path.write_text(limits if isinstance(limits, str) else json.dumps(limits))
    return path


def apply(folder: Path, limits: Any, ee: dict[str, Any], own: ExitPolicy = OWN) -> Effective:
    gate = Gatekeeper(own, write(folder, limits))
    return gate.apply(EEOptions.model_validate(ee), "id", None)


def clamp(field: str, asked: Any, effective: Any, exit: int | None = None) -> EEClamp:
    return EEClamp(param=f"ee.{field}", exit=exit, asked=asked, effective=effective)


CLAMPED: dict[str, tuple[dict[str, Any], dict[str, Any], Any, list[EEClamp]]] = {
    # name: limits, field `ee`, thresholds or drafts that are used, what is reported
    "raised": (
        {"min_thresholds": 0.7},
        {"thresholds": 0.2},
        (0.7, 0.7),
        [clamp("thresholds", 0.2, 0.7, 2), clamp("thresholds", 0.2, 0.7, 4)],
    ),
    "by exit": (
        {"min_thresholds": {"2": 0.95, "4": 0.1}},
        {"thresholds": {"2": 0.9, "4": 0.2}},
        (0.95, 0.2),
        [clamp("thresholds", 0.9, 0.95, 2)],
    ),
    "within": ({"min_thresholds": 0.7}, {"thresholds": {"4": 0.7}}, (None, 0.7), []),
    "default raised": ({"min_thresholds": 0.85}, {}, (0.9, 0.85), []),
    "exit": (
        {"allowed_exits": [4]},
        {"thresholds": 0.3},
        (None, 0.3),
        [clamp("thresholds", 0.3, None, 2)],
    ),
    "default exit": ({"allowed_exits": [4]}, {}, (None, 0.8), []),
    "measure": (
        {"allowed_measures": ["max_probability"]},
        {"thresholds": {"2": 0.9}, "measure": "entropy"},
        (None, None),
        [clamp("measure", "entropy", "max_probability"), clamp("thresholds", 0.9, None, 2)],
    ),
    "floors are for one measure": (
        {"min_thresholds": 0.1},
        {"thresholds": {"2": 0.9}, "measure": "agreement"},
        (None, None),
        [clamp("measure", "agreement", "max_probability"), clamp("thresholds", 0.9, None, 2)],
    ),
    "draft threshold": (
        {"min_thresholds": 0.7},
        {"strategy": "self-speculative", "draft_threshold": 0.1},
        SelfSpeculation(draft_exit=2, draft_threshold=0.7),
        [clamp("draft_threshold", 0.1, 0.7)],
    ),
    "no draft threshold": (
        {"min_thresholds": 0.7},
        {"strategy": "self-speculative"},
        SelfSpeculation(draft_exit=2, draft_threshold=0.7),
        [],
    ),
    "draft exit": (
        {"allowed_exits": [4]},
        {"strategy": "self-speculative", "draft_exit": 2, "draft_threshold": 0.1},
        SelfSpeculation(draft_exit=4, draft_threshold=0.1),
        [clamp("draft_exit", 2, 4)],
    ),
    "no draft exit": (
        {"allowed_exits": [4]},
        {"strategy": "self-speculative"},
        SelfSpeculation(draft_exit=4),
        [],
    ),
    "strategy": (
        {"allowed_strategies": ["exact"]},
        {"strategy": "propagate"},
        "exact",
        [clamp("strategy", "propagate", "exact")],
    ),
    "default strategy": ({"allowed_strategies": ["full", "propagate"]}, {}, "full", []),
}


@pytest.mark.parametrize("case", CLAMPED)
def test_requests_are_served_within_the_limits(tmp_path: Path, case: str) -> None:
    limits, ee, expected, clamps = CLAMPED[case]
    found = apply(tmp_path, limits, ee)
    assert found.policy is not None
    assert expected in (found.policy.thresholds, found.strategy)
    assert list(found.clamps) == clamps
    if clamps:
        off = OWN.without_exits()  # The server's own policy would be refused as well.
        gate = Gatekeeper(off, write(tmp_path, limits | {"on_violation": "refuse"}))
        with pytest.raises(ApiError) as caught:
            gate.apply(EEOptions.model_validate(ee), "id", None)
        error = caught.value
        assert (error.status, error.code) == (400, "operator_limit")
        assert error.param == clamps[0].param
        assert str(clamps[0].asked) in error.message
        assert (gate.num_refusals, gate.num_clamps.total()) == (1, 0)


VALUE = st.one_of(st.floats(0.001, 1.0), st.just("off"))
EXITS = st.sampled_from(["2", "4"])


@settings(max_examples=300, deadline=None)
@given(
    floors=st.one_of(
        st.none(),
        st.floats(0.001, 1.0),
        st.fixed_dictionaries({"2": st.floats(0.001, 1.0), "4": st.floats(0.001, 1.0)}),
    ),
    exits=st.one_of(st.none(), st.lists(st.sampled_from([2, 4]), unique=True)),
    measures=st.one_of(st.none(), st.lists(st.sampled_from(MEASURES), min_size=1, unique=True)),
    strategies=st.lists(st.sampled_from(STRATEGIES), unique=True).map(lambda one: [*one, "full"]),
    own=st.tuples(VALUE, VALUE, st.sampled_from(MEASURES)),
    ee=st.fixed_dictionaries(
        {},
        optional={
            "strategy": st.sampled_from(STRATEGIES),
            "measure": st.sampled_from(MEASURES),
            "thresholds": st.one_of(VALUE, st.dictionaries(EXITS, VALUE)),
            "draft_exit": st.sampled_from([2, 4]),
            "draft_threshold": st.floats(0.001, 1.0),
        },
    ),
)
def test_no_request_gets_below_the_limits(
    tmp_path_factory: pytest.TempPathFactory,
    floors: Any,
    exits: Any,
    measures: Any,
    strategies: Any,
    own: Any,
    ee: dict[str, Any],
) -> None:
    limits = {
        "min_thresholds": floors,
        "allowed_exits": exits,
        "allowed_measures": measures,
        "allowed_strategies": strategies,
    }
    thresholds = tuple(None if one == "off" else one for one in own[:2])
    policy = ExitPolicy((2, 4), thresholds, own[2])
    folder = tmp_path_factory.getbasetemp()
    try:
        found = apply(folder, limits, ee, policy)
    except ApiError:  # A contradiction in `ee`, or drafts that no limit allows.
        return
    assert found.policy is not None
    floor = floors if isinstance(floors, dict) else {"2": floors, "4": floors}
    used = dict(zip(found.policy.boundaries, found.policy.thresholds, strict=True))
    strategy: Any = found.strategy
    if isinstance(strategy, SelfSpeculation):
        assert strategy.draft_exit is not None
        used[strategy.draft_exit] = strategy.draft_threshold or 0.0
        if floors is None:
            del used[strategy.draft_exit]
        assert exits is None or strategy.draft_exit in exits
        strategy = "self-speculative"
    assert strategy in strategies
    active = {boundary: one for boundary, one in used.items() if one is not None}
    for boundary, one in active.items():
        assert exits is None or boundary in exits
        assert one >= (floor[str(boundary)] or 0.0)
    if active:
        allowed = measures or ([own[2]] if floors is not None else MEASURES)
        assert found.policy.measure in allowed


def test_drafts_need_an_exit_that_is_allowed(tmp_path: Path) -> None:
    ee = {"strategy": "self-speculative"}
    with pytest.raises(ApiError, match="the operator of this server allows none"):
        apply(tmp_path, {"allowed_exits": []}, ee)
    limits = {"min_thresholds": 0.5, "allowed_measures": ["agreement", "max_probability"]}
    with pytest.raises(ApiError, match="this server needs a threshold for drafts"):
        apply(tmp_path, limits, ee | {"measure": "agreement", "thresholds": 0.9})


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "Give a JSON object"),
        ('{"min_thresholds": 0.1, "min_thresholds": 0.9}', "the key 'min_thresholds' twice"),
        ({"min_threshold": 0.9}, "min_threshold is unknown"),
        ({"min_thresholds": 0}, "min_thresholds = 0"),
        ('{"min_thresholds": NaN}', "min_thresholds = nan"),
        ({"min_thresholds": {"2": 1.5, "4": 1}}, "min_thresholds.2 = 1.5"),
        ({"min_thresholds": {"2": 0.9}}, "min_thresholds has no value for the exit at 4"),
        ({"min_thresholds": {"2": 0.9, "3": 0.9, "4": 0.9}}, "min_thresholds: 3 is not an exit"),
        ({"allowed_exits": [8]}, "allowed_exits: 8 is not an exit"),
        ({"allowed_measures": []}, "allowed_measures"),
        ({"allowed_strategies": ["sled"]}, "needs 'exact' or 'full'"),
        ({"on_violation": "ignore"}, "on_violation = 'ignore'"),
        (
            {"min_thresholds": 0.85, "on_violation": "refuse"},
            "refuses the server's own policy: threshold of exit 4 0.8 -> 0.85",
        ),
    ],
)
def test_wrong_limits_are_refused(tmp_path: Path, limits: Any, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        Gatekeeper(OWN, write(tmp_path, limits))


def test_the_change_of_the_own_policy_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Gatekeeper(OWN, write(tmp_path, {"min_thresholds": 0.85}))
    assert "threshold of exit 4 0.8 -> 0.85" in caplog.text
    assert ExitPolicy((2, 4), (0.9, 0.85)).digest in caplog.text


def sign(path: Path, key: Path) -> None:
    run_sign_limits([str(path), "--limits-key-file", str(key)])


def test_signed_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, key, other = write(tmp_path, {"min_thresholds": 0.7}), tmp_path / "key", tmp_path / "b"
    key.write_text(f"{KEY}\n")
    other.write_text(KEY[::-1])
    signature = tmp_path / "limits.json.sig"
    with pytest.raises(RequestError, match="is not signed"):
        Gatekeeper(OWN, path, key)
    sign(path, key)
    assert "limits.json.sig" in capsys.readouterr().out
    assert signature.read_text() == SIGNATURE + "\n"
    assert Gatekeeper(OWN, path, key).limits is not None
    with pytest.raises(RequestError, match="is not that of this content and key"):
        Gatekeeper(OWN, path, other)
    path.write_text('{"min_thresholds": 0.1}')
    with pytest.raises(RequestError, match="may have been altered"):
        Gatekeeper(OWN, path, key)
    signature.write_bytes(b"\xff" * 64)
    with pytest.raises(RequestError, match="may have been altered"):
        Gatekeeper(OWN, path, key)


def test_limits_are_signed_only_if_they_are_valid(tmp_path: Path) -> None:
    path, key = write(tmp_path, {"min_thresholds": 7}), tmp_path / "key"
    key.write_text(KEY)
    with pytest.raises(RequestError, match="min_thresholds = 7"):
        sign(path, key)
    write(tmp_path, {})
    key.write_text("short")
    with pytest.raises(RequestError, match="at least 16 bytes") as caught:
        sign(path, key)
    assert "short" not in str(caught.value)
    assert not (tmp_path / "limits.json.sig").exists()


def test_limits_change_while_the_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gatekeeper, "REFRESH_S", 0.0)
    path, key = write(tmp_path, {"min_thresholds": 0.7}), tmp_path / "key"
    key.write_text(KEY)
    sign(path, key)
    gate = Gatekeeper(OWN, path, key)

    def threshold() -> float | None:
        effective = gate.apply(EEOptions(thresholds=0.1), "id", None)
        assert effective.policy is not None
        return effective.policy.thresholds[0]

    assert threshold() == 0.7
    write(tmp_path, {"min_thresholds": 0.2})  # by someone without the key
    assert threshold() == 0.7
    assert "may have been altered" in caplog.text
    assert len(caplog.records) == 1
    assert threshold() == 0.7
    assert len(caplog.records) == 1
    sign(path, key)
    assert threshold() == 0.2
    path.unlink()
    assert threshold() == 0.2
    assert "cannot be read" in caplog.text
    write(tmp_path, {"allowed_exits": [8]})
    sign(path, key)
    assert threshold() == 0.2
    assert "8 is not an exit" in caplog.text
    write(tmp_path, {"min_thresholds": 0.95, "on_violation": "refuse"})
    sign(path, key)
    with pytest.raises(ApiError, match=r"0\.1 of the exit at 2 is below 0\.95"):
        threshold()
    own = gate.apply(EEOptions(), "id", None)  # raised instead of refused, since it runs already
    assert own.policy is not None
    assert own.policy.thresholds == (0.95, 0.95)


def test_the_file_is_not_read_for_every_request(tmp_path: Path) -> None:
    gate = Gatekeeper(OWN, write(tmp_path, {"min_thresholds": 0.7}))
    write(tmp_path, {"min_thresholds": 0.2})
    effective = gate.apply(EEOptions(thresholds=0.1), "id", None)
    assert effective.policy is not None
    assert effective.policy.thresholds == (0.7, 0.7)


def test_the_audit_log_survives_errors_of_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    log.write({"a": 1})
    (line,) = path.read_text().splitlines()  # before the file is closed
    assert json.loads(line)["a"] == 1
    log.close()
    for _ in range(3):
        log.write({"a": 2})
    assert log.num_errors == 3
    assert caplog.text.count("cannot be written") == 1
    with pytest.raises(RequestError, match="Is a directory"):
        AuditLog(tmp_path)


def test_a_full_disk_spoils_one_line_of_the_audit_log(tmp_path: Path) -> None:
    """In a process of its own, in which no file may have more than 100 bytes."""
    path = tmp_path / "audit.jsonl"
    code = f"""
import json, os, pathlib, resource, signal
from ee_llm.serving.operator.audit import AuditLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = pathlib.Path({str(path)!r})
log = AuditLog(path)
log.write({{"a": 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
log.write({{"a": "x" * 200}})
log.write({{"a": 2}})
assert log.num_errors == 2, log.num_errors
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write({{"a": 3}})
log.write({{"a": 4}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    first, torn, *rest = path.read_text().splitlines()
    assert [json.loads(line)["a"] for line in (first, *rest)] == [1, 3, 4]
    assert len(first) + 1 + len(torn) == 100
