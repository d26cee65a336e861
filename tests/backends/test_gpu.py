"""Which GPUs the Triton backend serves and trusts, with the facts of the machine replaced: no GPU is needed."""

import json
import warnings

import pytest
import torch

from vqkernels.backends import gpu, registry, triton, verified

HOPPER = gpu.Gpu(0, "NVIDIA H200", (9, 0))
TURING = gpu.Gpu(1, "Tesla T4", (7, 5))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the GPUs of a machine that has Triton 3.6 and an empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton, "problem", lambda: None)
    monkeypatch.setattr(gpu, "triton_version", lambda: "3.6")
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "_override", "auto")

    def having(*gpus):
        monkeypatch.setattr(gpu, "_state", None)
        monkeypatch.setattr(gpu, "visible", lambda: list(gpus))

    return having


def test_auto_takes_no_unverified_kernel_and_names_the_command_once(machine):
    machine(HOPPER)
    message = (
        r"not verified on GPU 0, NVIDIA H200, sm_90, with Triton 3.6; using the slower eager .*until `vqkernels verify`"
    )
    with pytest.warns(RuntimeWarning, match=message):
        assert registry.resolve("auto", "cuda") == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.resolve("auto", "cuda") == "eager"
        assert registry.resolve("triton", "cuda") == "triton", "an explicit request needs no verification"
    assert registry.available("cuda") == ["triton", "eager"]


def test_auto_takes_what_the_user_verified(machine):
    machine(HOPPER)
    path = verified.record(gpu.key(HOPPER), {"gpu": HOPPER.name})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.resolve("auto", "cuda") == "triton"
        with registry.use_backend("eager"):
            assert registry.resolve("auto", "cuda") == "eager"
    report = dict(registry.report())
    assert report["auto on a GPU"] == "triton"
    assert report["GPU 0"] == f"NVIDIA H200, sm_90, verified, says {path}"


def test_auto_takes_what_the_package_verified(machine, monkeypatch, tmp_path):
    table = tmp_path / "package.json"
    table.write_text(json.dumps({"format": 1, "verified": [gpu.key(HOPPER)._asdict()]}))
    monkeypatch.setattr(verified, "PACKAGE", table)
    machine(HOPPER)
    assert registry.resolve("auto", "cuda") == "triton"


@pytest.mark.parametrize("field", ["capability", "source", "triton"])
def test_a_verification_of_something_else_vouches_for_nothing(field, machine):
    machine(HOPPER)
    verified.record(gpu.key(HOPPER)._replace(**{field: "other"}), {})
    with pytest.warns(RuntimeWarning, match="vqkernels verify"):
        assert registry.resolve("auto", "cuda") == "eager"


def test_every_visible_gpu_must_be_served(machine):
    machine(HOPPER, TURING)
    problem = "the kernels need sm_80 or newer, got GPU 1, Tesla T4, sm_75"
    with pytest.raises(RuntimeError, match=f'backend "triton" is unavailable: {problem}'):
        registry.resolve("triton", "cuda")
    with pytest.warns(RuntimeWarning, match=problem):
        assert registry.resolve("auto", "cuda") == "eager"
    assert registry.available("cuda") == ["eager"]
    assert dict(registry.report())["backend triton"] == f"unavailable: {problem}"


def test_a_refusal_is_one_sentence(machine, monkeypatch):
    machine()
    with pytest.raises(RuntimeError, match='backend "triton" is unavailable: torch sees no CUDA GPU'):
        registry.resolve("triton", "cuda")
    with pytest.raises(RuntimeError, match='backend "triton" computes CUDA tensors, got a tensor on cpu'):
        registry.resolve("triton", "cpu")
    machine(HOPPER)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(RuntimeError, match="this torch is built for ROCm"):
        registry.resolve("triton", "cuda")
    machine(HOPPER)
    monkeypatch.setattr(triton, "problem", lambda: "triton is not installed: pip install triton")
    with pytest.raises(RuntimeError, match="triton is not installed: pip install triton"):
        registry.resolve("triton", "cuda")


def test_the_choice_is_a_constant_of_a_compiled_graph(machine):
    def chosen(x):
        return x + 1 if registry.resolve("auto", "cuda") == "triton" else x - 1

    torch._dynamo.reset()
    machine(HOPPER)
    verified.record(gpu.key(HOPPER), {})
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 1
    with registry.use_backend("eager"):
        assert compiled(torch.zeros(())) == -1


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "verified": []}', '{"format": 1, "verified": [3]}', "\0"])
def test_a_damaged_table_vouches_for_nothing_and_is_replaced(text, machine):
    machine(HOPPER)
    path = verified.user_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert verified.where(gpu.key(HOPPER)) is None
    verified.record(gpu.key(HOPPER), {"gpu": "a"})
    verified.record(gpu.key(HOPPER), {"gpu": "b"})
    verified.record(gpu.key(HOPPER)._replace(source="older"), {})
    assert [entry.get("gpu") for entry in json.loads(path.read_text())["verified"]] == ["b", None]
    assert verified.where(gpu.key(HOPPER)) == str(path)


def test_the_packages_table_is_well_formed():
    table = json.loads(verified.PACKAGE.read_text())
    assert table["format"] == verified.FORMAT
    for entry in table["verified"]:
        assert set(verified.Key._fields) <= set(entry)
