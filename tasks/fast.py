"""Training and scoring on a CPU with less work, for the same losses and gradients.

`install(model)` changes how a Llama-like decoder with LoRA adapters runs, wherever trl's trainers score tokens
(`model(**batch, fused_lm_head=True)`); they need no other collator and no subclass, and all their losses stay theirs:

- Rows are laid end to end without padding, and what several rows begin with (a system message, the prompt of a chosen
  and a rejected answer) is computed once: a causal decoder gives equal beginnings equal states. The results are put
  back into the padded shape that the trainer expects.
- Attention runs row by row as plain batched products, because the backward pass of torch's SDPA is slow on CPUs.
- Each LoRA layer is one autograd function with its frozen weight; layers that share their input (q, k, v; gate, up)
  share one product with the stacked A matrices.
- Norms are one function each, with a backward pass of a few operations.
- The head scores supervised positions only (trl scores all of them on a CPU) and forms d(log p)/d(hidden) in the
  forward pass, so no (tokens, vocabulary) tensor is kept and none is computed twice.

What a model or layer has that is not covered keeps its own path, and `install` says so. Other devices keep theirs too.
"""

import ctypes
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from bitsandbytes.cextension import lib
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import FusedCausalLMOutput

ATTENTION = "reforge_rows"
NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}  # all of one formula
PACKABLE = {"llama", "mistral", "qwen2", "qwen3"}  # model types proven by the tests; SOLAR and SmolLM are llama
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
HEAD_CHUNK = 1 << 24  # logits held at once, in elements
HEAD_PIECE = 1 << 20  # of these, in float32 and as probabilities: few enough to stay in the cache
KEPT_SCORES = 1 << 21  # attention weights of a layer kept for its backward pass, in elements
SCORE_CHUNK = 1 << 25  # attention scores held at once, in elements
COPIES_MOST = 1 << 30  # bytes of packed copies of a model's frozen weights, up to which they are made unasked
KEPT_BIAS = 1 << 23  # elements of a bucket's mask that is kept from layer to layer
native = getattr(lib, "_lib", None)  # bitsandbytes' own library
KERNELS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # as it names them
# what a trainer may pass beside the rows; anything else goes the trainer's own way
KNOWN = {"use_cache", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


# --- rows without padding -------------------------------------------------------------------------------------------


@dataclass
class Bucket:
    """Rows of like length whose attention runs as one batched product.

    Attributes:
        queries: packed index `(rows, longest)` of the tokens that are new in each row; 0 beyond its end.
        keys: packed index `(rows, longest)` of all tokens of each row, shared ones included.
        pads: places beyond the end in `queries`, flattened.
        offsets: `(rows,)`, how many tokens of each row are shared, that is, stand before its first query.
        lengths: `(rows,)`, tokens of each row, shared ones included.
    """

    queries: Tensor
    keys: Tensor
    pads: Tensor
    offsets: Tensor
    lengths: Tensor
    cache: dict[Any, Tensor] = field(default_factory=dict)

    def gather(self, name: str, heads: int) -> Tensor:
        """Index of `(rows, heads, longest, :)` into `(tokens * heads, :)`, flat."""
        if (name, heads) not in self.cache:
            tokens: Tensor = getattr(self, name)
            self.cache[name, heads] = (tokens[:, None] * heads + torch.arange(heads)[:, None]).reshape(-1)
        return self.cache[name, heads]

    def bias(self, window: int | None, rows: slice, queries: slice, seen: int) -> Tensor:
        """`(rows, 1, queries, seen)`: 0 where a query may look, else -inf. `window` tokens back, itself included.

        Of the whole bucket it is kept for the other layers, unless it is large.
        """
        key = window, rows.start, rows.stop, queries.start, queries.stop
        if key in self.cache:
            return self.cache[key]
        here = torch.arange(queries.start, queries.stop) + self.offsets[rows, None]
        # beyond a row's end as at its last token: a query that sees no key has weights that are no number, in a gradient times 0
        here = torch.minimum(here, self.lengths[rows, None] - 1).int()
        back = here[:, None, :, None] - torch.arange(seen, dtype=torch.int32)
        hidden = (back < 0) | (back >= window) if window else back < 0
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        if self.queries.numel() * self.keys.shape[1] <= KEPT_BIAS:
            self.cache[key] = bias
        return bias

    def row_slices(self, heads: int) -> Iterator[slice]:
        """Rows whose scores are held at once: as many as fit, at least one."""
        step = max(1, SCORE_CHUNK // (heads * self.queries.shape[1] * self.keys.shape[1]))
        for start in range(0, len(self.queries), step):
            yield slice(start, min(start + step, len(self.queries)))

    def pieces(self, rows: slice, heads: int, window: int | None) -> Iterator[tuple[slice, int, Tensor]]:
        """All queries of `rows`; where the scores of a single row are too many, some at a time, the last ones first.

        With them, how many keys of the row they may see (the last ones all), and `bias`.
        """
        longest, widest = self.queries.shape[1], self.keys.shape[1]
        fits = heads * longest * widest <= SCORE_CHUNK
        step = longest if fits else max(1, SCORE_CHUNK // (heads * widest))
        for stop in range(longest, 0, -step):
            seen = widest if stop == longest else min(widest, int(self.offsets[rows.start]) + stop)
            queries = slice(max(0, stop - step), stop)
            yield queries, seen, self.bias(window, rows, queries, seen)


@dataclass
class Layout:
    """A batch of rows end to end, `tokens` long, in which every distinct beginning stands once.

    Attributes:
        ids, positions: `(1, tokens)`.
        places: for each row, the packed index of each of its tokens.
    """

    ids: Tensor
    positions: Tensor
    places: list[list[int]]
    buckets: list[Bucket]
    cache: dict[Any, Any] = field(default_factory=dict)

    def scatter(self, heads: int) -> Tensor:
        """Index of `(tokens, heads, :)` into the buckets' queries, `(rows, heads, longest, :)` one after another, flat."""
        if heads not in self.cache:
            index = torch.empty(self.ids.shape[1] * heads, dtype=torch.long)
            start = 0
            for bucket in self.buckets:
                target = bucket.gather("queries", heads)
                real = torch.ones(len(target), dtype=torch.bool)
                real[_spread(bucket, heads)] = False
                index[target[real]] = torch.arange(start, start + len(target))[real]
                start += len(target)
            self.cache[heads] = index
        found: Tensor = self.cache[heads]
        return found

    def homes(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where `(tokens, heads, :)` stand in the buckets' keys, `(rows, heads, longest, :)` one after another, flat.

        The first place of each; then of what rows share the token, and its further places.
        """
        if ("keys", heads) not in self.cache:
            tokens, places, strides, start = [], [], [], 0
            for bucket in self.buckets:
                rows, longest = bucket.keys.shape
                real = torch.arange(longest) < bucket.lengths[:, None]
                tokens.append(bucket.keys[real])
                places.append((torch.arange(rows)[:, None] * heads * longest + torch.arange(longest) + start)[real])
                strides.append(torch.full_like(tokens[-1], longest))
                start += rows * heads * longest
            token, order = torch.cat(tokens).sort(stable=True)
            place = torch.cat(places)[order, None] + torch.cat(strides)[order, None] * torch.arange(heads)
            further = torch.zeros_like(token, dtype=torch.bool)
            further[1:] = token[1:] == token[:-1]
            shared = (token[further, None] * heads + torch.arange(heads)).reshape(-1)
            self.cache["keys", heads] = place[~further].reshape(-1), shared, place[further].reshape(-1)
        found: tuple[Tensor, Tensor, Tensor] = self.cache["keys", heads]
        return found


def _spread(bucket: Bucket, heads: int) -> Tensor:
    """`bucket.pads` for `(rows, heads, longest)`, flat."""
    if ("pads", heads) not in bucket.cache:
        longest = bucket.queries.shape[1]
        row, place = bucket.pads // longest, bucket.pads % longest
        bucket.cache["pads", heads] = ((row[:, None] * heads + torch.arange(heads)) * longest + place[:, None]).reshape(
            -1
        )
    return bucket.cache["pads", heads]


def lay_out(rows: Sequence[Sequence[int]], *, share: bool = True) -> Layout:
    """Lay `rows` of token ids end to end; with `share`, equal beginnings once."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[list[int]] = [[] for _ in rows]
    segments: list[tuple[int, list[int]]] = []  # tokens shared, place of every token of the row
    before: int | None = None
    # in sorted order, no earlier row shares more with a row than the one just before it
    for r in sorted(range(len(rows)), key=lambda r: list(rows[r])) if share else range(len(rows)):
        shared = 0
        if share and before is not None:
            pairs = zip(rows[before], rows[r], strict=False)
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(rows[before]), len(rows[r])))
        places[r] = places[before][:shared] if before is not None and shared else []
        places[r] += range(len(ids), len(ids) + len(rows[r]) - shared)
        ids += rows[r][shared:]
        positions += range(shared, len(rows[r]))
        if shared < len(rows[r]):
            segments.append((shared, places[r]))
        before = r
    segments.sort(key=lambda s: s[0] - len(s[1]))
    buckets: list[list[tuple[int, list[int]]]] = []
    for shared, where in segments:  # longest first; a bucket ends where less than half of a row's place would be used
        if not buckets or 2 * (len(where) - shared) < len(buckets[-1][0][1]) - buckets[-1][0][0]:
            buckets.append([])
        buckets[-1].append((shared, where))
    return Layout(torch.tensor([ids]), torch.tensor([positions]), places, [_bucket(b) for b in buckets])


def _bucket(segments: list[tuple[int, list[int]]]) -> Bucket:
    longest = max(len(where) - shared for shared, where in segments)
    widest = max(len(where) for _, where in segments)
    pads = [r * longest + i for r, (shared, where) in enumerate(segments) for i in range(len(where) - shared, longest)]
    return Bucket(
        torch.tensor([where[shared:] + [0] * (longest - len(where) + shared) for shared, where in segments]),
        torch.tensor([where + [0] * (widest - len(where)) for _, where in segments]),
        torch.tensor(pads, dtype=torch.long),
        torch.tensor([shared for shared, _ in segments]),
        torch.tensor([len(where) for _, where in segments]),
    )


def _apply(function: Any, *args: Any) -> Any:
    """`function.apply(*args)`: torch gives it no types."""
    return function.apply(*args)


# --- attention ------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Causal attention within rows. query `(tokens, heads, d)`, key and value `(tokens, key heads, d)`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None
    ) -> Tensor:
        ctx.settings = layout, scale, window
        heads = query.shape[1]
        out: list[Tensor] = []
        kept: list[Tensor] = []
        # few scores are kept for the backward pass, many are computed again
        keep = (
            any(ctx.needs_input_grad[:3])
            and heads * sum(b.queries.numel() * b.keys.shape[1] for b in layout.buckets) <= KEPT_SCORES
        )
        for bucket in layout.buckets:
            q, k, v = _rows(bucket, "queries", query), _rows(bucket, "keys", key), _rows(bucket, "keys", value)
            for rows in bucket.row_slices(heads):
                found: list[Tensor] = []
                for queries, seen, bias in bucket.pieces(rows, heads, window):
                    weights = _weights(q[rows, :, queries], k[rows, :, :seen], bias, scale)
                    product = weights @ _fold(v[rows, :, :seen], 1)
                    found.append(product.view(bias.shape[0], heads, bias.shape[2], -1))
                    if keep:
                        kept.append(weights)
                out.append(_joined(found))
        ctx.save_for_backward(query, key, value, *kept)
        return _unrow(layout, out, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        layout, scale, window = ctx.settings
        dq: list[Tensor] = []
        dk: list[Tensor] = []
        dv: list[Tensor] = []
        for bucket in layout.buckets:
            q, k, v = _rows(bucket, "queries", query), _rows(bucket, "keys", key), _rows(bucket, "keys", value)
            g = _rows(bucket, "queries", grad)
            g.view(-1, g.shape[-1]).index_fill_(0, _spread(bucket, g.shape[1]), 0)
            group = q.shape[1] // k.shape[1]
            for rows in bucket.row_slices(q.shape[1]):
                found: list[Tensor] = []
                dkey = dvalue = None
                for queries, seen, bias in bucket.pieces(rows, q.shape[1], window):
                    qp, kp, vp, gp = q[rows, :, queries], k[rows, :, :seen], v[rows, :, :seen], g[rows, :, queries]
                    weights = kept.pop(0) if kept else _weights(qp, kp, bias, scale)
                    gf, qf, kf, vf = _fold(gp, group), _fold(qp, group), _fold(kp, 1), _fold(vp, 1)
                    dvalue = _added(dvalue, weights.transpose(1, 2) @ gf)
                    inner = torch._softmax_backward_data(gf @ vf.transpose(1, 2), weights, -1, q.dtype)
                    found.append((inner @ kf).mul_(scale).view(qp.shape))
                    dkey = _added(dkey, (inner.transpose(1, 2) @ qf).mul_(scale))
                assert dkey is not None
                assert dvalue is not None
                dq.append(_joined(found))
                dk.append(dkey.to(k.dtype).view(-1, k.shape[-1]))
                dv.append(dvalue.to(v.dtype).view(-1, v.shape[-1]))
        back = _gathered(layout, dk, key.shape[1]), _gathered(layout, dv, key.shape[1])
        return _unrow(layout, dq, query.shape[1]), *back, None, None, None


def _gathered(layout: Layout, parts: list[Tensor], heads: int) -> Tensor:
    """The buckets' gradients by key, `(rows * heads * longest, d)` → `(tokens, heads, d)`: a shared token gets a sum."""
    stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
    first, shared, further = layout.homes(heads)
    out = stacked.index_select(0, first)
    if len(further):
        total = out.float()  # of many rows: in float32
        out = total.index_add_(0, shared, stacked.index_select(0, further).float()).to(out.dtype)
    return out.view(-1, heads, stacked.shape[1])


def _rows(bucket: Bucket, name: str, x: Tensor) -> Tensor:
    """`(tokens, heads, d)` → `(rows, heads, longest, d)`."""
    heads = x.shape[1]
    picked = x.reshape(-1, x.shape[2]).index_select(0, bucket.gather(name, heads))
    return picked.view(len(bucket.offsets), heads, -1, x.shape[2])


def _unrow(layout: Layout, parts: list[Tensor], heads: int) -> Tensor:
    """The buckets' `(rows * heads * longest, d)` → `(tokens, heads, d)`."""
    stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
    return stacked.index_select(0, layout.scatter(heads)).view(-1, heads, stacked.shape[1])


def _joined(pieces: list[Tensor]) -> Tensor:
    """Pieces of queries, the last ones first, `(rows, heads, queries, d)` → `(rows * heads * all queries, d)`."""
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces[::-1], 2)
    return whole.view(-1, whole.shape[-1])


def _added(total: Tensor | None, piece: Tensor) -> Tensor:
    """The sum over pieces of queries, of which each sees the first `(…, keys, d)`, the first piece all; in float32 if several."""
    if total is None:
        return piece
    total = total.float()
    total[:, : piece.shape[1]] += piece
    return total


def _fold(x: Tensor, group: int) -> Tensor:
    """`(rows, heads, n, d)` → `(rows * heads / group, group * n, d)`: query heads of one key head below one another."""
    return x.reshape(-1, group * x.shape[2], x.shape[3])


def _weights(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    scores = _fold(q, group) @ _fold(k, 1).transpose(1, 2)
    shape = scores.shape
    scores = torch.add(bias, scores.view(q.shape[0], q.shape[1], q.shape[2], k.shape[2]), alpha=scale)  # float32
    return torch.softmax(scores, -1).to(q.dtype).view(shape)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, layout: Layout | None = None, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """An attention function of transformers: `(1, heads, tokens, d)` by `layout`, without one as SDPA does.

    Raises:
        NotImplementedError: the model asks for something that changes the result and is not covered, by name.
    """
    if layout is None:
        out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
        return out
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{ATTENTION} attention does not cover `{name}` of {type(module).__name__}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _apply(_Attention, q, k, v, layout, scale, sliding_window)[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# --- frozen weights -------------------------------------------------------------------------------------------------


@cache
def packs(dtype: torch.dtype) -> bool:
    """oneDNN multiplies by packed weights in `dtype` here."""
    if not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def worth_packing(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether packed copies for `install` are made unasked: in bf16, where not a bit is another by them, up to `COPIES_MOST`."""
    base = _base(model)
    layers = [m.get_base_layer() for m in base.modules() if isinstance(m, LoraLayer) and not _not_fusable(m)]
    layers += [] if _not_packable(base) else [base.get_output_embeddings()]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return dtype == torch.bfloat16 and packs(dtype) and 2 * dtype.itemsize * weights <= COPIES_MOST


class _Frozen:
    """x Wᵀ + b and dy W of a frozen weight W `(out, in)`.

    With `pack`, both come of copies of W, each in the order in which oneDNN reads it, so that no product reorders it first;
    of a 4-bit weight they save its dequantising as well. torch's compiler calls the same functions for frozen weights.

    Args:
        source: W in a dtype; it may last until the next one is asked for.
    """

    def __init__(self, source: Callable[[torch.dtype], Tensor], pack: bool) -> None:
        self.source, self.pack = source, pack
        self.packed: tuple[torch.dtype, Tensor, Tensor] | None = None

    def _packed(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """For x Wᵀ and for dy W; None where W is to be taken as it is."""
        if not self.pack or not packs(x.dtype):
            return None
        if self.packed is None or self.packed[0] != x.dtype:
            weight = self.source(x.dtype)
            both = (torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), len(x)) for w in (weight, weight.t()))
            self.packed = x.dtype, *both
        return self.packed[1:]

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`(tokens, in)` → `(tokens, out)`."""
        if packed := self._packed(x):
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed[0], bias, "none", [], "")
            return out
        weight = self.source(x.dtype)
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())

    def back(self, grad: Tensor, dx: Tensor | None = None) -> Tensor:
        """`(tokens, out)` → `(tokens, in)`, added to `dx`, which is then gone, if there is one."""
        if packed := self._packed(grad):
            grad = grad.contiguous()
            out: Tensor
            if dx is None:
                out = torch.ops.mkldnn._linear_pointwise(grad, packed[1], None, "none", [], "")
            else:
                out = torch.ops.mkldnn._linear_pointwise.binary(grad, dx, packed[1], None, "add")
            return out
        weight = self.source(grad.dtype)
        return grad @ weight if dx is None else dx.addmm_(grad, weight)


# --- LoRA layers ----------------------------------------------------------------------------------------------------


def few_times(rows: Tensor, x: Tensor) -> Tensor:
    """`rows` `(few, n)` times x `(n, many)`, whose columns lie together: the way round that is faster."""
    return rows @ x if x.dtype == torch.float32 else (x.t() @ rows.t()).t()


class _Lora(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ for layers that share their input x `(tokens, in)`; W and b frozen, A and B in any dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence["_Fused"], *adapters: Tensor) -> tuple[Tensor, ...]:
        a = torch.cat([m.to(x.dtype) for m in adapters[::2]])
        scaled = [(b * layer.scale()).to(x.dtype) for layer, b in zip(layers, adapters[1::2], strict=True)]
        thin = few_times(a, x.t())  # (ranks, tokens)
        out, start = [], 0
        for layer, b in zip(layers, scaled, strict=True):
            bias = layer.base.bias
            y = layer.frozen.times(x, None if bias is None else bias.to(x.dtype))
            out.append(y.addmm_(thin[start : start + b.shape[1]].t(), b.t()))
            start += b.shape[1]
        ctx.layers = layers
        ctx.save_for_backward(x, thin, a, *scaled)
        ctx.dtypes = [m.dtype for m in adapters]
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, thin, a, *scaled = ctx.saved_tensors
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        dthin = torch.empty_like(thin)
        dx: Tensor | None = None
        out: list[Tensor | None] = [None] * len(need)
        start = 0
        for i, (layer, b, grad) in enumerate(zip(ctx.layers, scaled, grads, strict=True)):
            part = slice(start, start + b.shape[1])
            dthin[part] = few_times(b.t(), grad.t())
            if need[2 * i + 1]:
                out[2 * i + 1] = (thin[part] @ grad).t().to(ctx.dtypes[2 * i + 1]).mul_(layer.scale())
            if need_x:
                dx = layer.frozen.back(grad, dx)
            start = part.stop
        if dx is not None:
            dx.addmm_(dthin.t(), a)
        if any(need[::2]):
            da = dthin @ x
            for i, rows in enumerate(da.split([b.shape[1] for b in scaled])):
                out[2 * i] = rows.to(ctx.dtypes[2 * i])
        return dx, None, *out


class _Space:
    """Where 4-bit weights are dequantised, each over the one before.

    A tensor of its own for each leaves a hole in the heap, in which what lives longer settles, so that the next finds no
    place: up to half of what a model of 0.9 billion parameters takes in 16 bits was lost so, in some runs and not in others.
    bitsandbytes 0.50.2 has `out=` for CUDA only, but its kernel for the CPU writes where it is told to.
    """

    def __init__(self) -> None:
        self.held = torch.empty(0)

    def dequantize(self, packed: Tensor, state: Any) -> Tensor:
        """What bitsandbytes' `dequantize_4bit` gives, until the next call."""
        kernel = f"cdequantize_blockwise_cpu_{state.quant_type}_{KERNELS.get(state.dtype)}"
        *_, width = state.shape
        if not hasattr(native, kernel) or width % 2 or state.blocksize > 1024:  # it has other ways for these
            own: Tensor = dequantize_4bit(packed, state)
            return own
        count = math.prod(state.shape)
        if self.held.numel() < count or self.held.dtype != state.dtype:
            self.held = torch.empty(count, dtype=state.dtype)
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        absmax, packed = absmax.float().contiguous(), packed.contiguous()
        getattr(native, kernel)(
            *(ctypes.c_void_p(t.data_ptr()) for t in (packed, absmax, self.held)),
            *map(ctypes.c_longlong, (state.blocksize, count // width, width)),
        )
        return self.held[:count].view(state.shape)


def _weight(base: Any, space: _Space, dtype: torch.dtype) -> Tensor:
    """The frozen weight `(out, in)` of a layer, dequantised if need be; then it may last until the next one is asked for."""
    weight: Any = base.weight
    if isinstance(base, Linear4bit):
        weight = space.dequantize(weight.data, weight.quant_state)
    out: Tensor = weight.detach().to(dtype)
    return out


class _Fused:
    """The forward pass of one LoRA layer, with those that share its input."""

    def __init__(self, layer: Any, pack: bool, space: "_Space") -> None:
        self.layer, self.base = layer, layer.get_base_layer()
        self.own: Callable[..., Tensor] = layer.forward
        self.frozen = _Frozen(partial(_weight, self.base, space), pack)
        self.group: list[_Fused] = [self]
        self.ready: tuple[Tensor, int, Tensor] | None = None  # input, its version, output

    def scale(self) -> float:
        return float(self.layer.scaling[self.layer.active_adapters[0]])

    def adapter(self) -> tuple[Tensor, Tensor]:
        name = self.layer.active_adapters[0]
        return self.layer.lora_A[name].weight, self.layer.lora_B[name].weight

    def usable(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Nothing at hand that only peft's own forward covers."""
        layer, active = self.layer, self.layer.active_adapters
        if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
            return False
        name = active[0]
        if (
            name in layer.lora_variant
            or layer.lora_bias[name]
            or (layer.training and getattr(layer.lora_dropout[name], "p", 0))
        ):
            return False
        if self.base.weight.requires_grad or (self.base.bias is not None and self.base.bias.requires_grad):
            return False
        if isinstance(self.base, Linear4bit):
            state = self.base.weight.quant_state
            if getattr(state, "packing_format_for_cpu", False) or self.base.compute_dtype not in (None, dtype):
                return False
        # without autocast, peft computes the adapter in the adapter's own dtype
        return torch.is_autocast_enabled("cpu") or (
            self.base.weight.dtype in (dtype, torch.uint8) and layer.lora_A[name].weight.dtype == dtype
        )

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.ready is not None:
            known, version, out = self.ready
            self.ready = None
            if known is x and version == x._version and not args and not kwargs:
                return out
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if args or kwargs or x.device.type != "cpu" or not self.usable(x, dtype):
            own: Tensor = self.own(x, *args, **kwargs)
            return own
        group = self.group if self.group[0] is self and all(m.usable(x, dtype) for m in self.group) else [self]
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        outs = _apply(_Lora, flat, group, *[matrix for m in group for matrix in m.adapter()])
        shaped: list[Tensor] = [out.view(*x.shape[:-1], -1) for out in outs]
        for member, out in zip(group[1:], shaped[1:], strict=True):
            member.ready = x, x._version, out
        return shaped[0]


# --- norms ----------------------------------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    """w · x / √(mean x² + ε) over the last dimension, in float32 up to the product with w, which is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = weight * (wide * scale).to(x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        normed = x.float().mul(scale)
        given = (grad * weight).float()
        along = torch.linalg.vecdot(given, normed).unsqueeze(-1).div_(-x.shape[-1])
        return torch.addcmul(given, normed, along).mul_(scale).to(x.dtype), None, None


class _FusedNorm:
    """The forward pass of a norm whose weight is frozen."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self.own: Callable[[Tensor], Tensor] = norm.forward

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = self.norm.weight
        if hidden_states.device.type != "cpu" or weight.requires_grad:
            return self.own(hidden_states)
        out: Tensor = _apply(_Norm, hidden_states, weight, self.norm.variance_epsilon)
        return out


# --- head -----------------------------------------------------------------------------------------------------------


class _LogProbs(torch.autograd.Function):
    """log p of `targets` `(n,)` given `hidden` `(n, width)`, with d(log p)/d(hidden) made on the way.

    Returns log p, entropy, log Σ p², mean logit, and whether the target is the most likely, `(n,)` each; all but the
    first without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: _Frozen, words: int, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, ...]:
        step, few = max(1, HEAD_CHUNK // words), max(1, HEAD_PIECE // words)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        held = torch.empty(2, min(few, len(hidden)), words)
        stats: list[list[Tensor]] = [[], [], [], [], []]
        for start in range(0, len(hidden), step):
            low = head.times(hidden[start : start + step], None)
            if bias is not None:
                low += bias
            for target, logits in zip(
                torch.split(targets[start : start + step, None], few), torch.split(low, few), strict=True
            ):
                z, p = held[:, : len(logits)]
                z.copy_(logits)
                top, at, mean = z.amax(-1, keepdim=True), z.gather(1, target), z.mean(-1)
                torch.softmax(z, -1, out=p)
                first = (at == top)[:, 0]
                # the first of several that are equal is the most likely; finding the first is slow, and seldom needed
                others = z.scatter_(1, target, -math.inf).amax(-1, keepdim=True)
                z.scatter_(1, target, at)
                tied = first & (others == top)[:, 0]
                first[tied] = z[tied].argmax(-1) == target[tied, 0]
                log_z = top - p.amax(-1, keepdim=True).log()
                squares = torch.linalg.vector_norm(p, dim=-1).log() * 2
                entropy = log_z[:, 0] - z.mul_(p).sum(-1)
                for out, value in zip(stats, ((at - log_z)[:, 0], entropy, squares, mean, first), strict=True):
                    out.append(value)
                if gradient is not None:
                    logits.copy_(p.neg_().scatter_add_(1, target, torch.ones_like(at)))
            if gradient is not None:
                gradient[start : start + step] = head.back(low)
        out = [torch.cat(s) if s else hidden.new_zeros(0, dtype=torch.float32) for s in stats]
        ctx.mark_non_differentiable(*out[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return None if grad is None else (gradient * grad[:, None]).to(gradient.dtype), None, None, None, None


def _scored(base: Any, layout: Layout, before: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """`_LogProbs` of `targets`, each given the packed token `before` it, under the decoder and head of `base`."""
    # transformers 5.23 takes positions that restart for packed rows, and would build a mask of all tokens by all tokens,
    # which `attend` does without; one of four dimensions it passes on as it is
    out = base.get_decoder()(
        input_ids=layout.ids,
        attention_mask=torch.empty(1, 1, 1, 1),
        position_ids=layout.positions,
        use_cache=False,
        layout=layout,
    )
    hidden = out.last_hidden_state[0].index_select(0, before)
    head = base.get_output_embeddings()
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast("cpu", enabled=False):
        frozen = vars(base)["_reforge_head"]
        scores: tuple[Tensor, ...] = _apply(_LogProbs, hidden.to(dtype), frozen, head.out_features, bias, targets)
    return scores


def packed_logps(model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """log p, in nats and float32, of every answer token given all before it, for each (prompt, answer) of token ids.

    Beginnings that rows share are computed once. Differentiable; sum each tensor for the log p of an answer.
    `model` has been through `install`.
    """
    base = _base(model)
    if base.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"attention is {base.config._attn_implementation!r}, expected {ATTENTION!r}: call install(model) first"
        )
    layout = lay_out([[*prompt, *answer] for prompt, answer in rows])
    before: list[int] = []
    targets: list[int] = []
    for (prompt, answer), places in zip(rows, layout.places, strict=True):
        if not prompt:
            raise ValueError("a row without a prompt: its first token is predicted by nothing")
        before += places[len(prompt) - 1 : -1] if answer else []
        targets += answer
    scores = _scored(base, layout, torch.tensor(before, dtype=torch.long), torch.tensor(targets, dtype=torch.long))
    return list(torch.split(scores[0], [len(answer) for _, answer in rows]))


def _forward(own: Callable[..., Any], share: bool) -> Callable[..., Any]:
    """A forward for the causal LM: fused scoring of packed rows where it can, else `own`, which is trl's."""

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        given = {k: v for k, v in kwargs.items() if v is not None and k not in KNOWN}
        labels = given.pop("labels", None)
        items = given.pop("num_items_in_batch", None)
        ids, mask, positions = (
            given.pop("input_ids", None),
            given.pop("attention_mask", None),
            given.pop("position_ids", None),
        )
        flags = {k: v for k, v in given.items() if not (k.startswith("output_") and v is False)}
        # the noise of NEFTune is scaled by the length of a row
        noisy = hasattr(self.get_input_embeddings(), "neftune_noise_alpha")
        if not fused_lm_head or args or flags or labels is None or ids is None or noisy:
            return own(*args, **({"fused_lm_head": True} if fused_lm_head else {}), **kwargs)
        columns = _columns(ids, mask, positions)
        known = ids.tolist()
        layout = lay_out([[known[b][c] for c in row] for b, row in columns], share=share)
        wanted = labels.tolist()
        before, targets, slots = [], [], []
        width = ids.shape[1] - 1
        for (b, row), places in zip(columns, layout.places, strict=True):
            for i in range(1, len(row)):
                if (label := wanted[b][row[i]]) != -100:
                    before.append(places[i - 1])
                    targets.append(label)
                    slots.append(b * width + row[i] - 1)
        scores = _scored(self, layout, torch.tensor(before, dtype=torch.long), torch.tensor(targets, dtype=torch.long))
        slot = torch.tensor(slots, dtype=torch.long)

        def padded(x: Tensor) -> Tensor:
            return x.new_zeros(len(ids) * width).index_put((slot,), x).view(len(ids), width)

        logps, entropy, squares, mean, top1 = (padded(s) for s in scores)
        return FusedCausalLMOutput(
            loss=-logps.sum() / (max(1, len(targets)) if items is None else items),
            log_probs=logps,
            entropy=entropy,
            log_sum_sq_probs=squares,
            mean_logits=mean,
            is_top1=top1,
            label_mask=padded(torch.ones(len(slots), dtype=torch.bool)),
        )

    return forward


def _columns(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[tuple[int, list[int]]]:
    """The rows of a batch as (batch index, columns): by the mask, else where positions restart, else all."""
    out = []
    for b in range(len(ids)):
        if mask is not None:
            out.append((b, mask[b].nonzero()[:, 0].tolist()))
        elif positions is not None:
            starts = (positions[b % len(positions)] == 0).nonzero()[:, 0].tolist() or [0]
            out += [(b, list(range(s, e))) for s, e in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
        else:
            out.append((b, list(range(ids.shape[1]))))
    return out


# --- putting it in --------------------------------------------------------------------------------------------------


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def install(model: nn.Module, *, pack: bool = False) -> list[str]:
    """Make `model` train and score by the faster paths of this module; returns what keeps its own path, and why.

    Comes after a trl trainer is made, which sets the forward that is replaced here. `uninstall` undoes it.

    Args:
        pack: multiply by packed copies of the frozen weights, two of each, made at its first product; see `_Frozen`.
    """
    uninstall(model)
    base = _base(model)
    if any(p.device.type != "cpu" for p in base.parameters()):
        return ["the model is not on a CPU: nothing changed"]
    undo: list[Callable[[], None]] = []
    base.__dict__["_reforge_undo"] = undo
    notes = _install_lora(base, pack, undo)
    for module in base.modules():
        if type(module).__name__ in NORMS and not module.weight.requires_grad:
            module.__dict__["forward"] = _FusedNorm(module)
            undo.append(partial(module.__dict__.pop, "forward"))
    reasons = _not_packable(base)
    if reasons:
        return [*notes, f"rows stay padded, attention and head their own: {', '.join(reasons)}"]
    before = base.config._attn_implementation
    base.set_attn_implementation(ATTENTION)
    undo.append(lambda: base.set_attn_implementation(before))
    head = base.get_output_embeddings()
    vars(base)["_reforge_head"] = _Frozen(lambda dtype: head.weight.detach().to(dtype), pack)
    undo.append(lambda: vars(base).pop("_reforge_head"))
    share = not any(isinstance(m, nn.Dropout) and m.p for m in base.modules())
    if not share:
        notes.append("equal beginnings of rows are not shared: the model has dropout, which differs from row to row")
    own = base.forward
    set_by_trl = "forward" in base.__dict__
    base.forward = types.MethodType(_forward(own, share), base)
    undo.append(lambda: setattr(base, "forward", own) if set_by_trl else base.__dict__.pop("forward"))
    return notes


def keep_pages() -> bool:
    """Keep freed memory in this process instead of giving it back and faulting it in again at every product.

    Every step allocates and frees the same large blocks. For the whole process, at the cost of a peak that is not
    given back; what a preloaded tcmalloc does. False where the C library is not glibc.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, (1 << 31) - 1))


def uninstall(model: nn.Module) -> None:
    """Give `model` back its own forward passes."""
    for step in reversed(_base(model).__dict__.pop("_reforge_undo", [])):
        step()


def unpackable(model: nn.Module) -> list[str]:
    """Why rows of `model` can't be packed; empty if they can."""
    return _not_packable(_base(model))


def _install_lora(base: nn.Module, pack: bool, undo: list[Callable[[], None]]) -> list[str]:
    others: dict[str, list[str]] = {}
    space = _Space()
    for name, parent in base.named_modules():
        fused: dict[str, _Fused] = {}
        for child, layer in parent.named_children():
            if not isinstance(layer, LoraLayer):
                continue
            if reason := _not_fusable(layer):
                others.setdefault(reason, []).append(f"{name}.{child}")
                continue
            fused[child] = _Fused(layer, pack, space)
            layer.__dict__["forward"] = fused[child]
            undo.append(partial(layer.__dict__.pop, "forward"))
            undo.append(partial(vars(fused[child]).update, group=[]))  # it names itself, and would hold its layer
        for names in SHARED_INPUT:
            group = [fused[n] for n in names if n in fused]
            for member in group:
                member.group = group
    return [
        f"{len(names)} LoRA layers keep peft's forward ({reason}): {names[0]} …" for reason, names in others.items()
    ]


def _not_fusable(layer: Any) -> str:
    base = layer.get_base_layer()
    if type(base) is not nn.Linear and not isinstance(base, Linear4bit):
        return f"base layer is {type(base).__name__}"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out"
    if layer.lora_variant:
        return f"variant {type(next(iter(layer.lora_variant.values()))).__name__}"
    if any(layer.lora_bias.values()):
        return "lora_bias"
    if any(getattr(d, "p", 0) for d in layer.lora_dropout.values()):
        return "lora_dropout"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "base weight or bias is trained"
    return ""


def _not_packable(base: Any) -> list[str]:
    config, head = base.config, base.get_output_embeddings()
    reasons = [] if config.model_type in PACKABLE else [f"model type {config.model_type}"]
    if type(head) is not nn.Linear:
        reasons.append(f"head is {type(head).__name__}")
    elif head.weight.requires_grad:
        reasons.append("head is trained")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "attention_dropout", "output_router_logits"):
        if getattr(config, name, None):
            reasons.append(f"{name}={getattr(config, name)}")
    return reasons
