"""The CUDA driver through ctypes, on PyTorch's context: load a cubin, launch with one parameter struct."""
import ctypes, os
import torch
import nvrtc, sets
from params import TensorMap, aligned

_cuda = None


def _check(code, what):
    if code:
        name = ctypes.c_char_p()
        _cuda.cuGetErrorName(code, ctypes.byref(name))
        raise RuntimeError(f"{what}: {name.value.decode() if name.value else code}")


def cuda():
    global _cuda
    if _cuda is None:
        torch.zeros(1, device="cuda")
        _cuda = ctypes.CDLL("libcuda.so.1")
    return _cuda


def tensor_map(x, tokens, heads, step=1):
    """Boxes of `tokens` (of which every `step`-th counts) x `heads` x 64 columns of a [tokens, heads, columns] tensor."""
    m = TensorMap()
    if sets.SET != "sm90" or x.numel() == 0:
        return m
    array = aligned(TensorMap)
    u64s, u32s = lambda *v: (ctypes.c_uint64 * len(v))(*v), lambda *v: (ctypes.c_uint32 * len(v))(*v)
    code = cuda().cuTensorMapEncodeTiled(ctypes.byref(array), 9 if x.dtype == torch.bfloat16 else 6, 3, ctypes.c_void_p(x.data_ptr()), u64s(x.shape[2], x.shape[1], x.shape[0]),
                                         u64s(x.stride(1) * 2, x.stride(0) * 2), u32s(64, heads, tokens), u32s(1, 1, step), 0, 3, 3, 0)
    assert code == 0, f"cuTensorMapEncodeTiled: {code}"
    ctypes.memmove(ctypes.byref(m), ctypes.byref(array), 128)
    return m


PDL = sets.SET == "sm90"     # the portable kernels do not know of it


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint) for n in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")] + [
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(LaunchAttribute)), ("count", ctypes.c_uint)]


class Module:
    """All kernels of one stage file for one set of constants."""
    _cache = {}

    def __init__(self, stage, defines):
        major, minor = torch.cuda.get_device_capability()
        cubin, self.log = nvrtc.compile_cubin(stage, defines, f"sm_{major}{minor}{'a' if major == 9 else ''}")
        self.module = ctypes.c_void_p()
        _check(cuda().cuModuleLoadData(ctypes.byref(self.module), cubin), f"load {stage}")
        self.functions = {}

    @classmethod
    def get(cls, stage, defines):
        key = (stage, tuple(sorted(defines.items())))
        if key not in cls._cache:
            cls._cache[key] = cls(stage, defines)
        return cls._cache[key]

    def launch(self, name, grid, threads, shared_bytes, params, stream=None, pdl=False, priority=0):
        if name not in self.functions:
            function = ctypes.c_void_p()
            _check(cuda().cuModuleGetFunction(ctypes.byref(function), self.module, name.encode()), f"function {name}")
            self.functions[name] = function
        _check(cuda().cuFuncSetAttribute(self.functions[name], 8, shared_bytes), f"shared memory of {name}")
        argument = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.pointer(params), ctypes.c_void_p))
        handle = (stream or torch.cuda.current_stream()).cuda_stream
        if pdl and PDL or priority:
            number, value = (8, priority) if priority else (6, 1)
            attribute = LaunchAttribute(number, 0, (ctypes.c_int * 16)(value))
            config = LaunchConfig(*grid, threads, 1, 1, shared_bytes, handle, ctypes.pointer(attribute), 1)
            _check(cuda().cuLaunchKernelEx(ctypes.byref(config), self.functions[name], argument, None), f"launch {name}")
            return
        _check(cuda().cuLaunchKernel(self.functions[name], *grid, threads, 1, 1, shared_bytes, ctypes.c_void_p(handle), argument, None), f"launch {name}")
        if os.environ.get("FSA_SYNC"):      # to find the kernel that faults or hangs
            print(f"  {name} grid {grid}", end="", flush=True)
            _check(cuda().cuStreamSynchronize(ctypes.c_void_p(handle)), name)
            print(" done", flush=True)
