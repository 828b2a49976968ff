"""``python -m fsa_rs.check``: it passes here, it finds what is wrong, and it says what a machine lacks."""

import json
import os
import subprocess
import sys

import fsa_rs
import numpy as np
import pytest
from fsa_rs.check import __main__ as check
from fsa_rs.check import cases, machine
from reference import Case, attend, compress, rotate

FUNCTIONS = sorted(cases.CASES)


def command(*arguments, before="", **variables):
    """Runs it in a process of its own; ``before`` is executed first."""
    code = f"import sys\n{before}\nfrom fsa_rs.check.__main__ import main\nsys.exit(main({list(arguments)}))"
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600, check=False
    )


NO_TORCH = "sys.modules['torch'] = None"


def test_every_function_is_checked():
    assert set(FUNCTIONS) == {name for name in fsa_rs.__all__ if name.endswith("_func")} | {
        "compress_kv",
        "topk_blocks",
    }


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "fsa_rs.check", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--device {cpu,cuda}" in done.stdout and "--json" in done.stdout


def test_without_pytorch_numpy_is_checked():
    done = command("--device", "cpu", before=NO_TORCH)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "torch: none" in lines and f"numpy: {np.__version__}" in lines and "gpu: none" in lines
    for name in FUNCTIONS:
        assert any(line.startswith(f"ok      {name} ") for line in lines), name
    assert lines[-1].endswith("0 failed, 0 skipped: fsa_rs works on this machine")
    assert "torch," not in done.stdout and "gradient" not in done.stdout


def test_without_pytorch_a_gpu_cannot_be_used():
    done = command("--device", "cuda", before=NO_TORCH)
    assert done.returncode == 1
    reason = "PyTorch is not installed, and arrays on a GPU are its tensors"
    assert f"FAILED  device cuda: {reason}" in done.stdout and not done.stderr
    assert done.stdout.splitlines()[-1].startswith("0 ok, 1 failed, 0 skipped: fsa_rs does NOT work")


def test_json_without_pytorch():
    done = command("--json", before=NO_TORCH)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True and report["problems"] == [] and report["gpu"] is None
    assert report["versions"]["fsa_rs"] == fsa_rs.__version__ and report["versions"]["torch"] is None
    assert "not installed" in report["without_cuda"]
    assert report["counts"] == {"ok": len(report["checks"]), "failed": 0, "skipped": 0}
    assert {entry["function"] for entry in report["checks"]} == set(FUNCTIONS)
    keys = ["function", "what", "arrays", "device", "dtype", "heads", "status", "error", "allowed", "message"]
    assert all(list(entry) == keys for entry in report["checks"])


def test_without_a_gpu():
    pytest.importorskip("torch", reason="looks for a GPU through torch")
    done = command("--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "FAILED  device cuda: PyTorch finds no GPU" in done.stdout or "without CUDA" in done.stdout
    assert "(torch, cuda" not in done.stdout


class FakeCuda:
    """What `machine` asks PyTorch about a device."""

    def __init__(self, capability, available=True):
        self.capability, self.available = capability, available

    def is_available(self):
        return self.available

    def get_device_capability(self):
        return self.capability

    def get_device_name(self):
        return "Tesla T4"


class FakeTorch:
    def __init__(self, cuda, version="13.0"):
        self.cuda, self.version = cuda, type("Version", (), {"cuda": version})


def test_an_old_gpu_is_named():
    name, reason = machine._gpu(FakeTorch(FakeCuda((7, 5))))
    assert name == "Tesla T4, compute capability 7.5"
    assert reason == "Tesla T4, compute capability 7.5: needed is 8.0 or later"
    assert machine._gpu(FakeTorch(FakeCuda((8, 0)))) == ("Tesla T4, compute capability 8.0", None)
    assert machine._gpu(FakeTorch(None, None)) == (None, "this build of PyTorch is one without CUDA")
    assert "finds no GPU" in machine._gpu(FakeTorch(FakeCuda(None, False)))[1]


@pytest.fixture
def old_gpu(monkeypatch):
    found = machine.look()
    found.gpu, found.without_cuda = machine._gpu(FakeTorch(FakeCuda((7, 5))))
    monkeypatch.setattr(machine, "look", lambda: found)
    monkeypatch.setattr(check, "run", lambda setting: iter([finding(setting)]))


def finding(setting, status="ok"):
    about = (setting.arrays, setting.device, setting.dtype, "6:2x64")
    return cases.Finding("dense_attn_varlen_func", "out", *about, status, 1e-7, 2e-6)


def test_an_old_gpu_fails_if_it_is_asked_for_and_is_skipped_otherwise(old_gpu, capsys):
    reason = "Tesla T4, compute capability 7.5: needed is 8.0 or later"
    assert check.main(["--device", "cuda"]) == 1
    assert f"FAILED  device cuda: {reason}" in capsys.readouterr().out
    assert check.main(["--device", "cuda", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [reason]
    assert check.main([]) == 0
    out = capsys.readouterr().out
    assert f"skipped device cuda: {reason}" in out and "gpu: Tesla T4, compute capability 7.5" in out


def test_a_gpu_that_is_there_is_used_by_default(monkeypatch, capsys):
    found = machine.look()
    found.gpu, found.without_cuda = machine._gpu(FakeTorch(FakeCuda((9, 0))))
    monkeypatch.setattr(machine, "look", lambda: found)
    used = []
    monkeypatch.setattr(check, "run", lambda setting: used.append(setting.device) or iter([finding(setting)]))
    assert check.main([]) == 0 and set(used) == {"cpu", "cuda"}
    used.clear()
    assert check.main(["--device", "cuda"]) == 0 and set(used) == {"cuda"}
    assert "1.0e-07, allowed 2.0e-06" in capsys.readouterr().out


def small(arrays="numpy"):
    return cases.Setting(arrays, "cpu", "float32", (4, 2), 16, 16)


def failed(arrays="numpy"):
    return {(found.function, found.what) for found in cases.run(small(arrays)) if found.status == "failed"}


def test_nothing_fails():
    assert not failed()


def spoiled(monkeypatch, name, spoil):
    function = getattr(fsa_rs, name)

    def wrong(*arguments, **options):
        results = function(*arguments, **options)
        return spoil(results) if not isinstance(results, tuple) else (spoil(results[0]), *results[1:])

    monkeypatch.setattr(fsa_rs, name, wrong)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "topk_blocks"])
def test_a_wrong_result_is_found(name, monkeypatch):
    def spoil(x):
        x = x.copy()
        x[3::40] *= 1.001  # some see no compressed key
        return x

    spoiled(monkeypatch, name, spoil)
    found = failed()
    assert found and {function for function, _ in found} == {name}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 7.0])
def test_a_row_that_should_be_empty_is_compared(wrong, monkeypatch):
    def spoil(x):
        x = x.copy()
        x[0] = wrong  # sees no compressed key
        return x

    spoiled(monkeypatch, "compressed_attn_varlen_func", spoil)
    assert ("compressed_attn_varlen_func", "out") in failed()


@pytest.mark.parametrize("name", ["topk_blocks", "compressed_attn_varlen_func"])
@pytest.mark.parametrize("kind", ["other block", "order", "padding", "twice"])
def test_a_wrong_choice_is_found(name, kind, monkeypatch):
    function = getattr(fsa_rs, name)

    def wrong(*arguments, **options):
        results = function(*arguments, **options)
        ids = results if name == "topk_blocks" else results[2]
        row = ids[0, 85]  # the last of the first sequence: four of its six blocks
        assert (row >= 0).all()
        if kind == "other block":
            ids[0, 80:86, 1] = np.where(ids[0, 80:86, 1] == 1, 2, 1)
            ids[0, 80:86].sort(axis=1)
        elif kind == "order":
            row[:2] = row[1::-1].copy()
        elif kind == "padding":
            ids[0, 0, 1] = 0
        else:
            row[1] = row[0]
        return results

    monkeypatch.setattr(fsa_rs, name, wrong)
    assert failed() == {(name, "choice of blocks")}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "topk_blocks"])
def test_a_wrong_gradient_is_found(name, monkeypatch):
    torch = pytest.importorskip("torch", reason="gradients need torch")

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[3::40] *= 1.01
            return grad

    spoiled(monkeypatch, name, Wrong.apply)
    found = failed("torch")
    assert found and {function for function, _ in found} == {name} and all("gradient" in what for _, what in found)


def test_exceptions_are_findings(monkeypatch):
    def refuse(kind):
        def function(*arguments, **options):
            raise kind("device of q is not supported: got cuda:0")

        return function

    monkeypatch.setattr(fsa_rs, "topk_blocks", refuse(NotImplementedError))
    monkeypatch.setattr(fsa_rs, "dense_attn_varlen_func", refuse(RuntimeError))
    found = {entry.function: entry for entry in cases.run(small()) if entry.what == "call"}
    assert (found["topk_blocks"].status, found["dense_attn_varlen_func"].status) == ("skipped", "failed")
    assert found["dense_attn_varlen_func"].message == "RuntimeError: device of q is not supported: got cuda:0"
    assert check.line(found["topk_blocks"]).startswith("skipped topk_blocks call (numpy, cpu, float32, 4:2x16): device")
    assert check.line(found["dense_attn_varlen_func"]).startswith("FAILED  dense_attn_varlen_func call")


def test_an_error_that_is_infinite_is_null_in_json():
    entry = cases.Finding("f", "out", "numpy", "cpu", "float32", "4:2x16", "failed", float("inf"), 1e-6)
    report = check.report(machine.look(), [entry], [], check.Counter(failed=1), False)
    assert json.loads(json.dumps(report, allow_nan=False))["checks"][0]["error"] is None


def test_the_definitions_agree_with_those_of_these_tests():
    case = Case(q_lens=(70, 0, 23), k_lens=(70, 0, 61))
    batch = cases.Batch(case.q_lens, case.k_lens)
    q, k, v = case.qkv()
    masks = [(case.dense(), batch.dense()), (case.window(9), batch.window(9))]
    ids = case.topk_indices(16, 3)
    masks += [(case.selected(ids, 16), batch.selected(ids, 16)), (case.compressed(16, 8), batch.compressed(16, 8))]
    for ours, theirs in masks:
        np.testing.assert_array_equal(ours, theirs)
        vectors = (q, k[: theirs.shape[2]], v[: theirs.shape[2]])
        for a, b in zip(attend(*vectors, ours, 0.3), cases.attend(*vectors, theirs, 0.3), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    weight, position = case.normal(2, 16 * 16, 16), case.normal(2, 16, 16)
    for parameters in ((), (case.normal(2, 16),), (weight,), (weight, position)):
        ours, theirs = compress(case, k, 16, 8, *parameters), cases.compress(batch, k, 16, 8, *parameters)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    ours, theirs = rotate(q, np.concatenate(case.positions()), 1e4), cases.rotate(q, batch.positions, 1e4)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
