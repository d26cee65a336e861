"""Which GPUs the Triton backend serves and trusts, with the facts of the machine replaced: no GPU is needed."""

import json
import warnings

import pytest
import torch

import vqkernels as vq
from vqkernels.backends import proof, registry, triton, verified
from vqkernels.cli import verify

HOPPER = proof.Gpu(0, "NVIDIA H200", (9, 0))
TURING = proof.Gpu(1, "Tesla T4", (7, 5))
AMPERE = proof.Gpu(2, "NVIDIA A100", (8, 0))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the GPUs of a machine that has Triton 3.6 and an empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton, "problem", lambda: None)
    monkeypatch.setattr(triton, "compiler", lambda: "3.6")
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "_override", "auto")

    def having(*gpus):
        monkeypatch.setattr(proof, "_states", {})
        monkeypatch.setattr(registry, "_choices", {})
        monkeypatch.setattr(proof, "visible", lambda: list(gpus))

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
    path = verified.record(proof.key("triton", HOPPER), {"gpu": HOPPER.name})
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
    table.write_text(json.dumps({"format": 1, "verified": [proof.key("triton", HOPPER)._asdict()]}))
    monkeypatch.setattr(verified, "PACKAGE", table)
    machine(HOPPER)
    assert registry.resolve("auto", "cuda") == "triton"


@pytest.mark.parametrize("field", ["capability", "source", "compiler"])
def test_a_verification_of_something_else_vouches_for_nothing(field, machine):
    machine(HOPPER)
    verified.record(proof.key("triton", HOPPER)._replace(**{field: "other"}), {})
    with pytest.warns(RuntimeWarning, match="vqkernels verify"):
        assert registry.resolve("auto", "cuda") == "eager"


def test_each_gpu_is_judged_alone(machine):
    """Of three GPUs one is verified, one is not, one is too old: a tensor's own GPU decides."""
    machine(HOPPER, TURING, AMPERE)
    path = verified.record(proof.key("triton", HOPPER), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.resolve("auto", torch.device("cuda", 0)) == "triton"
        assert registry.resolve("triton", torch.device("cuda", 2)) == "triton"
    old = "the kernels need sm_80 or newer, got GPU 1, Tesla T4, sm_75"
    with pytest.raises(RuntimeError, match=f'backend "triton" is unavailable: {old}'):
        registry.resolve("triton", torch.device("cuda", 1))
    with pytest.warns(RuntimeWarning, match=old):
        assert registry.resolve("auto", torch.device("cuda", 1)) == "eager"
    with pytest.warns(RuntimeWarning, match="not verified on GPU 2, NVIDIA A100, sm_80"):
        assert registry.resolve("auto", torch.device("cuda", 2)) == "eager"
    assert [registry.available(f"cuda:{n}") for n in range(3)] == [["triton", "eager"], ["eager"], ["triton", "eager"]]
    report = dict(registry.report())
    assert report["backend triton"].startswith("Triton 3.6, kernels ")
    assert report["GPU 0"] == f"NVIDIA H200, sm_90, verified, says {path}"
    assert report["GPU 1"] == "Tesla T4, sm_75, not served: the kernels need sm_80 or newer"
    assert report["GPU 2"] == "NVIDIA A100, sm_80, not verified: run `vqkernels verify`"
    assert report["auto on a GPU"].startswith(f"GPU 0: triton; GPU 1: eager: {old}; GPU 2: eager: the Triton kernels")


def test_a_gpu_is_looked_up_once_and_no_other_with_it(machine, monkeypatch):
    """Nothing is asked of CUDA before the first tensor on a GPU, and nothing about a GPU again after it."""
    machine(HOPPER, AMPERE)
    verified.record(proof.key("triton", HOPPER), {})
    asked = []
    monkeypatch.setattr(proof, "_judge", lambda *which, judge=proof._judge: asked.append(which) or judge(*which))
    assert registry.resolve("auto", torch.device("cpu")) in ("cpu", "eager")
    assert asked == []
    for _ in range(3):
        registry.resolve("auto", torch.device("cuda", 0))
    assert asked == [("triton", 0)] and proof._states == {("triton", 0): ("", "")}


def test_the_operations_pass_the_device_of_their_tensor(monkeypatch):
    """Not its type alone: GPUs of one process may differ."""
    asked = []
    monkeypatch.setattr(registry, "resolve", lambda backend, device, operator: asked.append(device) or "eager")
    z, codebook = torch.zeros(3, 2), torch.zeros(4, 2)
    vq.nearest_code(z, codebook)
    vq.vector_quantize(z, codebook)
    vq.codebook_statistics(z, torch.zeros(3, dtype=torch.int64), 4)
    assert asked == [torch.device("cpu")] * 3


def test_verify_takes_one_gpu_of_each_kind_that_is_served(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    machine(TURING._replace(number=0), HOPPER._replace(number=1), HOPPER._replace(number=2), AMPERE._replace(number=3))
    assert verify._devices("triton", None) == [torch.device("cuda", 1), torch.device("cuda", 3)]
    assert verify._devices("triton", "cuda:2") == [torch.device("cuda", 2)]
    machine(TURING._replace(number=0))
    for wanted in (None, "cuda:0"):
        with pytest.raises(RuntimeError, match="sm_80 or newer, got GPU 0, Tesla T4"):
            verify._devices("triton", wanted)
    with pytest.raises(RuntimeError, match="there is no GPU 4: torch sees 1"):
        verify._devices("triton", "cuda:4")


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
    """One constant per GPU, in one graph too; the override is still a guard."""

    def chosen(x):
        taken = [registry.resolve("auto", torch.device("cuda", number)) == "triton" for number in (0, 2)]
        return x + (1 if taken[0] else -1) + (10 if taken[1] else -10)

    torch._dynamo.reset()
    machine(HOPPER, TURING, AMPERE)
    verified.record(proof.key("triton", HOPPER), {})
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == -9
    with registry.use_backend("eager"):
        assert compiled(torch.zeros(())) == -11
    assert compiled(torch.zeros(())) == -9


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "verified": []}', '{"format": 1, "verified": [3]}', "\0"])
def test_a_damaged_table_vouches_for_nothing_and_is_replaced(text, machine):
    machine(HOPPER)
    path = verified.user_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert verified.where(proof.key("triton", HOPPER)) is None
    verified.record(proof.key("triton", HOPPER), {"gpu": "a"})
    verified.record(proof.key("triton", HOPPER), {"gpu": "b"})
    verified.record(proof.key("triton", HOPPER)._replace(source="older"), {})
    assert [entry.get("gpu") for entry in json.loads(path.read_text())["verified"]] == ["b", None]
    assert verified.where(proof.key("triton", HOPPER)) == str(path)


def test_an_entry_of_an_older_version_still_vouches(machine):
    """It has the compiler under "triton"."""
    machine(HOPPER)
    path, old = verified.user_path(), proof.key("triton", HOPPER)._asdict()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": 1, "verified": [old | {"triton": old.pop("compiler")}]}))
    assert registry.resolve("auto", "cuda", "nearest") == "triton"


def test_the_packages_table_is_well_formed():
    table = json.loads(verified.PACKAGE.read_text())
    assert table["format"] == verified.FORMAT
    for entry in table["verified"]:
        assert set(verified.Key._fields) <= set(entry)
