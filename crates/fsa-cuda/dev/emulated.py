"""The driver and NVRTC libraries on host memory, for machines without a device of PyTorch's: whatever LD_LIBRARY_PATH and FSA_NVRTC_PATH name."""
import ctypes, glob, os
import nvrtc

_cuda = None


def cuda():
    global _cuda
    if _cuda is None:
        _cuda = ctypes.CDLL("libcuda.so.1")
        context, device = ctypes.c_void_p(), ctypes.c_int()
        assert _cuda.cuInit(0) == 0 and _cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
        assert _cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0 and _cuda.cuCtxSetCurrent(context) == 0
    return _cuda


def compile_image(stage, defines):
    lib = ctypes.CDLL(os.environ["FSA_NVRTC_PATH"])
    names = sorted(glob.glob(os.path.join(nvrtc.KERNELS, "**", "*.cuh"), recursive=True))
    sources = [open(n, "rb").read() for n in names]
    names = [os.path.relpath(n, nvrtc.KERNELS).encode() for n in names]
    array = lambda v: (ctypes.c_char_p * len(v))(*v)
    unit = "".join(f"#define {k} {v}\n" for k, v in defines.items()) + f'#include "{stage}"\n'
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), unit.encode(), b"unit.cu", len(names), array(sources), array(names)) == 0
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    code = lib.nvrtcCompileProgram(program, len(options), array(options))
    if code:
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode()[:4000])
    lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetCUBIN(program, image)
    return image


class Module:
    _cache = {}

    def __init__(self, stage, defines):
        cuda()
        self.module = ctypes.c_void_p()
        assert cuda().cuModuleLoadData(ctypes.byref(self.module), compile_image(stage, defines)) == 0

    @classmethod
    def get(cls, stage, defines):
        key = (stage, tuple(sorted(defines.items())))
        if key not in cls._cache:
            cls._cache[key] = cls(stage, defines)
        return cls._cache[key]

    def launch(self, name, grid, threads, shared_bytes, params, stream=None, pdl=False):
        function = ctypes.c_void_p()
        assert cuda().cuModuleGetFunction(ctypes.byref(function), self.module, name.encode()) == 0, name
        assert cuda().cuFuncSetAttribute(function, 8, 227 * 1024 - 6144) == 0
        argument = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.pointer(params), ctypes.c_void_p))
        code = cuda().cuLaunchKernel(function, *grid, threads, 1, 1, shared_bytes, None, argument, None)
        assert code == 0, f"{name}: {code}"
