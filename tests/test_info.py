"""The environment report and its self-check."""

from __future__ import annotations

import platform

import pytest
import torch

from attbalance_ext import AttentionTerms, available_backends, info


def test_environment_names_what_matters() -> None:
    found = info.environment()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert {"attbalance_ext", "triton", "platform", "cpu threads", "gpu"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_missing_package_is_said() -> None:
    assert info._version("no-such-package-anywhere") == "not installed"


def test_self_check_passes_on_every_backend_that_can_run() -> None:
    checks = {check.backend: check for check in info.self_check()}
    assert set(checks) == {name for name, reasons in available_backends().items() if not reasons}
    assert {"reference", "cpu"} <= set(checks)
    for check in checks.values():
        assert check.passed
        assert 0 < check.error <= 2e-5  # 0 would mean that float32 was compared with itself


def test_self_check_sees_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    right = info.attention_terms

    def slightly_wrong(*args: object, backend: str, **kwargs: object) -> AttentionTerms:
        terms = right(*args, backend=backend, **kwargs)
        return terms._replace(rac=terms.rac * 1.001) if backend == "cpu" else terms

    monkeypatch.setattr(info, "attention_terms", slightly_wrong)
    checks = {check.backend: check.passed for check in info.self_check()}
    assert checks["reference"]
    assert not checks["cpu"]
