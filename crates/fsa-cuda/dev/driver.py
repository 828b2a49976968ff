"""The CUDA driver through ctypes, on PyTorch's context: load a cubin, launch with one parameter struct."""
import ctypes, os
import torch
import nvrtc

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


class Module:
    """All kernels of one stage file for one set of constants."""
    _cache = {}

    def __init__(self, stage, defines):
        cubin, self.log = nvrtc.compile_cubin(stage, defines)
        self.module = ctypes.c_void_p()
        _check(cuda().cuModuleLoadData(ctypes.byref(self.module), cubin), f"load {stage}")
        self.functions = {}

    @classmethod
    def get(cls, stage, defines):
        key = (stage, tuple(sorted(defines.items())))
        if key not in cls._cache:
            cls._cache[key] = cls(stage, defines)
        return cls._cache[key]

    def launch(self, name, grid, threads, shared_bytes, params, stream=None):
        if name not in self.functions:
            function = ctypes.c_void_p()
            _check(cuda().cuModuleGetFunction(ctypes.byref(function), self.module, name.encode()), f"function {name}")
            _check(cuda().cuFuncSetAttribute(function, 8, 227 * 1024 - 4096), f"shared memory of {name}")
            self.functions[name] = function
        argument = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.pointer(params), ctypes.c_void_p))
        handle = (stream or torch.cuda.current_stream()).cuda_stream
        _check(cuda().cuLaunchKernel(self.functions[name], *grid, threads, 1, 1, shared_bytes, ctypes.c_void_p(handle), argument, None), f"launch {name}")
        if os.environ.get("FSA_SYNC"):      # to find the kernel that faults or hangs
            print(f"  {name} grid {grid}", end="", flush=True)
            _check(cuda().cuStreamSynchronize(ctypes.c_void_p(handle)), name)
            print(" done", flush=True)
