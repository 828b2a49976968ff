"""NVRTC and ptxas resource reports through ctypes: compiles a kernel file to a cubin without a GPU or a toolkit."""
import ctypes, glob, hashlib, os, re, site, sys

KERNELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kernels")


def _find_nvrtc():
    roots = site.getsitepackages() + [p for p in sys.path if p.endswith("site-packages")]
    for root in roots:
        for pattern in ("nvidia/cu13/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*"):
            for path in sorted(glob.glob(os.path.join(root, pattern))):
                if ".alt." not in path:
                    return path
    return "libnvrtc.so.13"


_lib = None


def _nvrtc():
    global _lib
    if _lib is None:
        path = _find_nvrtc()
        for builtins in glob.glob(os.path.join(os.path.dirname(path), "libnvrtc-builtins.so.*")):
            if ".alt." not in builtins:     # found by name only if it is loaded already
                ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
        _lib = ctypes.CDLL(path)
    return _lib


def compile_cubin(stage, defines, arch="sm_90a", extra=()):
    """Returns (cubin bytes, log). `stage` is a file name in kernels/, `defines` a dict of -D constants."""
    lib = _nvrtc()
    source = open(os.path.join(KERNELS, stage)).read()
    program = ctypes.c_void_p()

    def check(code, what):
        if code:
            raise RuntimeError(f"{what}: nvrtc error {code}\n{_log(lib, program)}")

    check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), stage.encode(), 0, None, None), "create")
    options = [f"--gpu-architecture={arch}", "--std=c++17", f"-I{KERNELS}", "--ptxas-options=-v", "-lineinfo", "--device-as-default-execution-space", *extra]
    options += [f"-D{k}={v}" for k, v in sorted(defines.items())]
    array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    check(lib.nvrtcCompileProgram(program, len(options), array), f"compile {stage}")
    size = ctypes.c_size_t()
    check(lib.nvrtcGetCUBINSize(program, ctypes.byref(size)), "cubin size")
    cubin = ctypes.create_string_buffer(size.value)
    check(lib.nvrtcGetCUBIN(program, cubin), "cubin")
    log = _log(lib, program)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log


def _log(lib, program):
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, text)
    return text.value.decode()


def resources(log):
    """{kernel: (registers, spill bytes, static shared bytes)} from ptxas -v."""
    table, name = {}, None
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name, spills = m.group(1), 0
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(m.group(2)) + int(m.group(3)) + int(m.group(1))
        elif (m := re.search(r"Used (\d+) registers", line)) and name:
            shared = re.search(r"(\d+) bytes smem", line)
            table[name] = (int(m.group(1)), spills, int(shared.group(1)) if shared else 0)
    return table
