"""The cases: what is called, on which numbers, and how far the result may be from the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fsa_rs

from . import definition
from .definition import Array, Batch, attend, compress, rotate

#: What a result may be off, relative to its largest element; a gradient, relative to its norm. Weights of values are
#: rounded to the dtype, and so is the result; in float32 only sums are.
ALLOWED = {"float32": 2e-6, "bfloat16": 2 * 2.0**-7, "float16": 2 * 2.0**-10}
#: The whole operation rounds the result of every stage.
WHOLE = 2.0
#: `lse` is float32 for any dtype; a device's exponentials are good to some 1e-6.
ALLOWED_LSE = 1e-4

GEOMETRY = (32, 16)
WINDOW = 60
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
THETA = 1000.0


@dataclass
class Finding:
    """One comparison."""

    function: str
    what: str
    arrays: str
    device: str
    dtype: str
    heads: str
    status: str
    error: float | None = None
    allowed: float | None = None
    message: str | None = None


@dataclass
class Setting:
    """Which arrays a case uses. Of the sequences one is empty, one is shorter than a window, one has few rows."""

    arrays: str
    device: str
    dtype: str
    heads: tuple[int, int]
    dim: int
    block_size: int
    batch: Batch = field(init=False)
    sizes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.dim + self.heads[0])
        # Five blocks in the first sequence, of which a row takes four.
        longest = 4 * self.block_size + 22
        self.batch = Batch((longest, 0, 7, 33), (longest, 0, 7, 100))
        sizes = {"block_size": self.block_size, "topk": 4, "init_blocks": 1, "local_blocks": 2}
        self.sizes = {"kernel_size": GEOMETRY[0], "kernel_stride": GEOMETRY[1], **sizes}

    def array(self, values: Any) -> Any:
        """Numbers in the dtype, or int32, on the device."""
        values = np.asarray(values)
        integer = values.dtype.kind == "i"
        if self.arrays == "numpy":
            if self.dtype != "bfloat16" or integer:
                return values.astype(np.int32 if integer else self.dtype)
            import ml_dtypes

            return values.astype(ml_dtypes.bfloat16)
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.to(self.device, torch.int32 if integer else getattr(torch, self.dtype))

    def plain(self, array: Any) -> Array:
        """As float64 or int32 of NumPy."""
        if self.arrays == "numpy":
            return np.asarray(array, np.int32 if array.dtype.kind == "i" else np.float64)
        values = array.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()  # type: ignore[no-any-return]

    def numbers(self, *shape: int, size: float = 1.0) -> Array:
        """Random numbers that the dtype holds, as float64."""
        return self.plain(self.array(self.rng.standard_normal(shape) * size))

    def qkv(self) -> dict[str, Array]:
        rows, keys = sum(self.batch.q_lens), sum(self.batch.k_lens)
        q = self.numbers(rows, self.heads[0], self.dim)
        k, v = (self.numbers(keys, self.heads[1], self.dim) for _ in range(2))
        return {"q": q, "k": k, "v": v}

    def compressed(self) -> dict[str, Array]:
        """Vectors in the place of compressed ones."""
        rows = sum(self.batch.windows(*GEOMETRY))
        qkv = self.qkv()
        return {"q": qkv["q"], "k_cmp": qkv["k"][:rows], "v_cmp": qkv["v"][:rows]}

    def weights(self) -> dict[str, Array]:
        """Parameters of two compressions."""
        heads, size = self.heads[1], GEOMETRY[0]
        return {
            "k_weight": self.numbers(heads, size * self.dim, self.dim, size=(size * self.dim) ** -0.5),
            "k_position": self.numbers(heads, size, self.dim, size=0.5),
            "v_weight": self.numbers(heads, size, size=size**-0.5),
        }

    def ids(self) -> Array:
        """Random distinct ids in random order: some of them in the future, some none."""
        most = max(self.batch.k_lens) // self.block_size + 2
        ids = np.argsort(self.rng.random((self.heads[1], sum(self.batch.q_lens), most)), axis=2)[
            ..., : self.sizes["topk"]
        ]
        return np.where(self.rng.random(ids.shape) < 0.2, -1, ids).astype(np.int32)


Call = Callable[..., tuple[Any, ...]]


def run(setting: Setting) -> Iterator[Finding]:
    """All comparisons of a setting. What a device does not support is a finding with status ``skipped``."""
    for function, case in CASES.items():
        about = (setting.arrays, setting.device, setting.dtype, f"{setting.heads[0]}:{setting.heads[1]}x{setting.dim}")
        try:
            for what, error, allowed in case(setting):
                status = "ok" if error <= allowed else "failed"
                yield Finding(function, what, *about, status, error, allowed)
        except NotImplementedError as error:
            yield Finding(function, "call", *about, "skipped", message=str(error))
        except Exception as error:  # whatever it is, the user shall see it beside the other results
            yield Finding(function, "call", *about, "failed", message=f"{type(error).__name__}: {error}")


Comparison = tuple[str, float, float]


def compare(
    setting: Setting, call: Call, exact: Call, inputs: dict[str, Array], factor: float = 1.0
) -> Iterator[Comparison]:
    """Results ``out`` and ``lse`` of ``call``, and of tensors the gradients of all ``inputs``."""
    leaves = {name: setting.array(values) for name, values in inputs.items()}
    gradients = setting.arrays == "torch"
    for leaf in leaves.values() if gradients else ():
        leaf.requires_grad_()
    results, truth = call(**leaves), exact(**inputs)
    allowed = factor * ALLOWED[setting.dtype]
    for what, got, expected in zip(("out", "lse"), results, truth, strict=False):
        size = np.abs(expected[np.isfinite(expected)]).max(initial=1.0)
        yield what, distance(setting.plain(got), expected) / size, ALLOWED_LSE if what == "lse" else allowed
    if not gradients:
        return
    import torch

    weights = [setting.numbers(*x.shape) for x in truth]
    loss = sum(
        (torch.where(got.isfinite(), got, 0).double() * torch.from_numpy(weight).to(got.device)).sum()
        for got, weight in zip(results, weights, strict=True)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))  # type: ignore[arg-type]

    def value(changed: dict[str, Array]) -> float:
        outputs = zip(exact(**changed), weights, strict=True)
        return float(sum((np.where(np.isfinite(x), x, 0) * weight).sum() for x, weight in outputs))

    for name, grad in zip(leaves, map(setting.plain, grads), strict=True):
        yield f"gradient of {name}", slope_error(setting, value, inputs, name, grad), allowed


def slope_error(
    setting: Setting, value: Callable[..., float], inputs: dict[str, Array], name: str, grad: Array
) -> float:
    """How much slopes by ``grad`` differ from slopes of the definition, along random directions, relative to ``grad``.

    The difference along a random direction is as large as the norm of the error, whichever elements are wrong.
    """
    squares, directions = 0.0, 2
    step = 1e-5 * max(float(np.abs(inputs[name]).mean()), 1e-3)
    for _ in range(directions):
        direction = setting.rng.standard_normal(grad.shape)
        ends = (value({**inputs, name: inputs[name] + sign * step * direction}) for sign in (1, -1))
        slope = (next(ends) - next(ends)) / (2 * step)
        squares += (slope - (grad * direction).sum()) ** 2
    return float(np.sqrt(squares / directions) / max(np.linalg.norm(grad), 1e-30))


def distance(got: Array, expected: Array) -> float:
    """Largest difference; infinite where shapes, or elements that are not finite, differ."""
    if got.shape != expected.shape or not np.array_equal(got[~np.isfinite(expected)], expected[~np.isfinite(expected)]):
        return float("inf")
    finite = np.isfinite(expected)
    return float(np.nan_to_num(np.abs(got[finite] - expected[finite]), nan=np.inf).max(initial=0.0))


def _sums(setting: Setting) -> tuple[Any, Any]:
    return setting.array(setting.batch.cu_q), setting.array(setting.batch.cu_k)


def _attention(setting: Setting, call: Call, mask: Array) -> Iterator[Comparison]:
    scale = setting.dim**-0.5
    yield from compare(setting, call, lambda q, k, v: attend(q, k, v, mask, scale), setting.qkv())


def _dense(setting: Setting) -> Iterator[Comparison]:
    cu = _sums(setting)
    yield from _attention(
        setting,
        lambda q, k, v: fsa_rs.dense_attn_varlen_func(q, k, v, *cu, return_lse=True),
        setting.batch.dense(),
    )


def _window(setting: Setting) -> Iterator[Comparison]:
    cu = _sums(setting)
    yield from _attention(
        setting,
        lambda q, k, v: fsa_rs.window_attn_varlen_func(q, k, v, *cu, window_size=WINDOW, return_lse=True),
        setting.batch.window(WINDOW),
    )


def _selected(setting: Setting) -> Iterator[Comparison]:
    ids, block, cu = setting.ids(), setting.block_size, _sums(setting)
    given = setting.array(ids)
    yield from _attention(
        setting,
        lambda q, k, v: fsa_rs.selected_attn_varlen_func(q, k, v, given, block, *cu, return_lse=True),
        setting.batch.selected(ids, block),
    )


def _compress(setting: Setting) -> Iterator[Comparison]:
    batch, values = setting.batch, setting.weights()
    rows, cu = sum(batch.windows(*GEOMETRY)), setting.array(batch.cu_k)
    kinds: dict[str, dict[str, Array]] = {
        "mean": {},
        "weighted": {"k_weight": values["v_weight"]},
        "linear": {"k_weight": values["k_weight"], "k_position": values["k_position"]},
    }
    for kind, parameters in kinds.items():
        fixed = setting.array(setting.qkv()["v"])
        found = compare(
            setting,
            lambda k, fixed=fixed, **given: (fsa_rs.compress_kv(k, fixed, cu, *GEOMETRY, **given)[0][:rows],),
            lambda k, k_weight=None, k_position=None: (compress(batch, k, *GEOMETRY, k_weight, k_position),),
            {"k": setting.qkv()["k"], **parameters},
        )
        yield from ((f"{kind}: {what}", *numbers) for what, *numbers in found)  # type: ignore[misc]


def _padded(setting: Setting, compressed: Any) -> Any:
    """With the rows that `compress_kv` returns: a number that depends on shapes alone."""
    rows = sum(setting.batch.k_lens) // GEOMETRY[1] - len(compressed)
    if setting.arrays == "numpy":
        return np.concatenate((compressed, np.zeros((rows, *compressed.shape[1:]), compressed.dtype)))
    return __import__("torch").nn.functional.pad(compressed, (0, 0, 0, 0, 0, rows))


def _compressed(setting: Setting) -> Iterator[Comparison]:
    batch, scale, inputs = setting.batch, setting.dim**-0.5, setting.compressed()
    cu, chosen = _sums(setting), []

    def call(q: Any, k_cmp: Any, v_cmp: Any) -> tuple[Any, ...]:
        k_cmp, v_cmp = _padded(setting, k_cmp), _padded(setting, v_cmp)
        out, lse, ids = fsa_rs.compressed_attn_varlen_func(q, k_cmp, v_cmp, *cu, **setting.sizes)
        chosen.append(setting.plain(ids))
        return out, lse

    mask = batch.compressed(*GEOMETRY)
    yield from compare(setting, call, lambda q, k_cmp, v_cmp: attend(q, k_cmp, v_cmp, mask, scale), inputs)
    yield _choice(setting, inputs, chosen[0])


def _topk(setting: Setting) -> Iterator[Comparison]:
    inputs = setting.compressed()
    q, k_cmp = (setting.array(inputs[name]) for name in ("q", "k_cmp"))
    cu = _sums(setting)
    ids = fsa_rs.topk_blocks(q, _padded(setting, k_cmp), *cu, **setting.sizes)
    yield _choice(setting, inputs, setting.plain(ids))


def _choice(setting: Setting, inputs: dict[str, Array], ids: Array) -> Comparison:
    scores = definition.block_scores(setting.batch, inputs["q"], inputs["k_cmp"], setting.sizes, setting.dim**-0.5)
    return "choice of blocks", definition.misplaced(setting.batch, ids, scores, setting.sizes), 1e-4


def _nsa(setting: Setting) -> Iterator[Comparison]:
    batch, scale, chosen, cu = setting.batch, setting.dim**-0.5, [], _sums(setting)

    def call(q: Any, k: Any, v: Any, gates: Any, **parameters: Any) -> tuple[Any, ...]:
        rope = {"rope_theta": THETA, "rope_scaling": LLAMA3}
        options = {**setting.sizes, **rope, **parameters, "window_size": WINDOW, "return_topk_indices": True}
        out, ids = fsa_rs.nsa_attn_varlen_func(q, k, v, gates, *cu, **options)
        chosen.append(setting.plain(ids))
        return (out,)

    def exact(q: Array, k: Array, v: Array, gates: Array, **parameters: Array) -> tuple[Array]:
        k_cmp = compress(batch, k, *GEOMETRY, parameters["k_weight"], parameters["k_position"])
        v_cmp = compress(batch, v, *GEOMETRY, parameters["v_weight"])
        starts = [np.arange(count) * GEOMETRY[1] for count in batch.windows(*GEOMETRY)]
        q, k, k_cmp = (
            rotate(x, positions, THETA, LLAMA3)
            for x, positions in ((q, batch.positions), (k, batch.key_positions), (k_cmp, starts))
        )
        # The choice has no derivative: it stays as it was made for the unchanged numbers.
        branches = (
            attend(q, k_cmp, v_cmp, batch.compressed(*GEOMETRY), scale)[0],
            attend(q, k, v, batch.selected(chosen[0], setting.block_size), scale)[0],
            attend(q, k, v, batch.window(WINDOW), scale)[0],
        )
        return (sum(branch * gates[:, :, i, None] for i, branch in enumerate(branches)),)  # type: ignore[return-value]

    qkv = setting.qkv()
    gates = setting.plain(setting.array(setting.rng.random((*qkv["q"].shape[:2], 3))))
    yield from compare(setting, call, exact, {**qkv, "gates": gates, **setting.weights()}, WHOLE)


CASES: dict[str, Callable[[Setting], Iterator[Comparison]]] = {
    "dense_attn_varlen_func": _dense,
    "window_attn_varlen_func": _window,
    "selected_attn_varlen_func": _selected,
    "compress_kv": _compress,
    "compressed_attn_varlen_func": _compressed,
    "topk_blocks": _topk,
    "nsa_attn_varlen_func": _nsa,
}
