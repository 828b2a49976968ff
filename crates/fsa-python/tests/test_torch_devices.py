"""All functions on a second GPU, whichever is the current one. Needs two GPUs."""

import threading

import pytest

torch = pytest.importorskip("torch", reason="the tests of the PyTorch operators need torch")

import fsa_rs  # noqa: E402
import gpu  # noqa: E402
from fsa_rs.nn import FlashSparseAttention, RopeConfig  # noqa: E402
from gpu import FUNCTIONS, Setting, equal, everything, late  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

DEVICES = ("cuda:0", "cuda:1")


def on(device, name, monkeypatch, function=everything):
    """What the function gives there, on the CPU."""
    monkeypatch.setattr(gpu, "DEVICE", device)
    results = function(Setting(), name)
    assert all(x.device == torch.device(device) for x in results)
    return [x.cpu() for x in results]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("current", [0, 1])
def test_the_current_device_does_not_matter_and_stays(name, current, monkeypatch):
    expected = on("cuda:0", name, monkeypatch)
    with torch.cuda.device(current):
        equal(expected, on("cuda:1", name, monkeypatch))
        equal(expected, on("cuda:0", name, monkeypatch))
        assert torch.cuda.current_device() == current
        assert torch.empty(1, device="cuda").device.index == current


@pytest.mark.parametrize("name", FUNCTIONS)
def test_streams_of_both_devices_are_used(name, monkeypatch):
    expected = on("cuda:0", name, monkeypatch)

    for device in DEVICES:
        equal(expected, on(device, name, monkeypatch, late))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_graph_of_the_other_device(name, monkeypatch):
    expected = on("cuda:0", name, monkeypatch)

    def recorded(setting, name):
        with torch.cuda.device(gpu.DEVICE):
            for _ in range(2):
                everything(setting, name)
            leaves = setting.inputs(FUNCTIONS[name], gpu.DEVICE)
            with torch.no_grad():  # no nodes that belong to another stream than that of the recording
                outputs = getattr(setting, name)(*leaves)
            generator = torch.Generator().manual_seed(3)
            weights = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = getattr(setting, name)(*leaves)
                results = [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, weights))]
                del outputs
            graph.replay()
            torch.cuda.synchronize()
            return [x.clone() for x in results]

    equal(expected, on("cuda:1", name, monkeypatch, recorded))


def test_threads_with_a_device_each():
    modules = []
    for device in DEVICES:
        torch.manual_seed(0)
        sizes = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "topk": 16, "init_blocks": 1}
        options = {"local_blocks": 2, "window_size": 512, "rope_config": RopeConfig(head_dim=64)}
        module = FlashSparseAttention(128, 8, 2, 64, **sizes, **options)
        modules.append(module.to(device, torch.bfloat16))
    x = torch.randn(2500, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    results, failures = {}, []

    def work(module, device):
        try:
            cu = torch.tensor([0, 300, 310, 2500], dtype=torch.int32, device=device)
            outputs = [module(x.to(device), cu).detach().cpu() for _ in range(10)]
            equal(outputs[:1] * 9, outputs[1:])
            y = module(x.to(device), cu)
            y.float().square().sum().backward()
            results[device] = [outputs[0], *(p.grad.cpu().float() for p in module.parameters())]
        except BaseException as error:  # reported by the thread that waits
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(modules, DEVICES, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    equal(results["cuda:0"][:1], results["cuda:1"][:1])
    for a, b in zip(*(results[device][1:] for device in DEVICES), strict=True):  # sums in any order
        assert (a - b).norm() <= 0.02 * a.norm()


def test_tensors_of_two_devices_are_refused():
    q, k = (torch.randn(64, heads, 64, device="cuda:1", dtype=torch.bfloat16) for heads in (4, 2))
    cu = torch.tensor([0, 64], dtype=torch.int32, device="cuda:1")
    with pytest.raises(ValueError, match="v: expected a tensor on cuda:1, as q, got one on cuda:0"):
        fsa_rs.window_attn_varlen_func(q, k, k.to("cuda:0"), cu, cu, window_size=32)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: expected a tensor on cuda:1, .* cuda:0"):
        fsa_rs.window_attn_varlen_func(q, k, k, cu, cu.to("cuda:0"), window_size=32)
