"""The Llama, with a hook for every gate that structured pruning needs, and its Hugging Face checkpoint format.

    x      = embed(tokens) · z_hidden
    x      = x + z_layer · z_hidden · attention(norm(x, z_hidden), z_head)
    x      = x + z_layer · z_hidden · ffn(norm(x, z_hidden), z_ffn)
    logits = lm_head(norm(x, z_hidden))

A gate z in [0, 1] multiplies what one component gives to the rest: 0 is "pruned", 1 is "as before". A gate on the
output of a linear map is a gate on the rows of its weight, z·(W x) = (z·W) x, and weights are far smaller than
activations: that is how the hooks below are written (`scale_rows`), it makes a gated step cost about as much as a dense
one, and it is the reason why the small model that `masks.extract` cuts out computes exactly the same function.

Shapes: B batch, T time, D d_model, H query heads, G key/value heads (groups), K head_dim, I d_ffn, V vocabulary.

    python eval.py out/toy_pretrain --data data/demo --sample "def main("
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

ONEDNN_FOR_MKL = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # see `linear`
LOGITS_AT_ONCE = 2**27  # the loss is computed in pieces of at most this many logits (512 MiB in float32)


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama. ValueError if it cannot be."""

    vocab_size: int
    n_layer: int
    d_model: int
    n_head: int
    n_kv_head: int
    head_dim: int  # stays what it was when heads or hidden dimensions are pruned, hence not d_model / n_head
    d_ffn: int
    max_seq_len: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    rope_scaling: dict | None = None  # Llama 3's, with the keys that Hugging Face gives it: see `rope`
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "d_model", "n_head", "n_kv_head", "head_dim", "d_ffn", "max_seq_len"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} = {value!r} must be a whole number of at least 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head = {self.n_head} must be a multiple of n_kv_head = {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: rotary embeddings turn pairs")

    @property
    def shape(self) -> dict[str, int]:
        """The shape of a layer and their number, as a small dict for logs and files."""
        return {k: getattr(self, k) for k in ("n_layer", "d_model", "n_head", "n_kv_head", "head_dim", "d_ffn")}

    def n_params(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        attention = 2 * self.d_model * (self.n_head + self.n_kv_head) * self.head_dim
        layer = attention + 3 * self.d_model * self.d_ffn + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.n_layer * layer + embeddings + self.d_model

    def flops_per_token(self, seq_len: int, backward: bool = True) -> float:
        """Floating-point operations per token in sequences of `seq_len`: 2 per weight of each matrix product; causal
        attention's; three times as many with the backward pass. Nothing is counted for recomputation."""
        matrices = self.n_params() - (2 * self.n_layer + 1) * self.d_model
        if not self.tie_embeddings:
            matrices -= self.vocab_size * self.d_model  # looking a row up is no product
        attention = 2 * self.n_layer * seq_len * self.n_head * self.head_dim  # q·k and p·v, half of them masked
        return (3 if backward else 1) * (2 * matrices + attention)


class Gates(NamedTuple):
    """One value z per component; None where nothing is pruned. `masks.py` makes them, the model only multiplies."""

    layer: Tensor | None = None  # (L,)
    hidden: Tensor | None = None  # (D,)
    head: Tensor | None = None  # (L, G)
    ffn: Tensor | None = None  # (L, I)

    def at(self, i: int) -> "Gates":
        """The gates of layer i: layer (), hidden (D,), head (G,), ffn (I,)."""
        return Gates(*(z if z is None or name == "hidden" else z[i] for name, z in zip(self._fields, self)))

    @property
    def out(self) -> Tensor | None:
        """Of one layer's gates: the gate on all that its two blocks add to the residual stream, z_layer · z_hidden."""
        if self.layer is None or self.hidden is None:
            return self.hidden if self.layer is None else self.layer
        return self.layer * self.hidden


def scale_rows(weight: Tensor, z: Tensor | None) -> Tensor:
    """z·W: gate the outputs of a linear map, one z per row, or one for all where z is a scalar."""
    return weight if z is None else weight * z.to(weight.dtype)[..., None]


class OneDNNLinear(torch.autograd.Function):
    """x (..., I), weight (O, I) -> x Wᵀ (..., O) in float32 on the CPU by oneDNN, with its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return OneDNNLinear.product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        x_rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        return OneDNNLinear.product(grad, weight.t()), OneDNNLinear.product(grad_rows.t(), x_rows.t())

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        """a bᵀ (..., N) of a (..., K) and b (N, K)."""
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I), weight (O, I) -> x Wᵀ (..., O), to rounding F.linear's. For float32 on x86 CPUs that multiplies by
    MKL, which on AMD's is much slower than oneDNN: there oneDNN does it, with first derivatives only, unless
    `torch.backends.mkldnn.enabled` is False."""
    if (
        not torch.compiler.is_compiling()  # it may not read the rest, and has no lowering for oneDNN in training
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= 32 * x.shape[-1]  # to set oneDNN up takes longer than a product of few rows, as in decoding
        and not torch.is_autocast_enabled("cpu")
        and ONEDNN_FOR_MKL
        and torch.backends.mkldnn.enabled
    ):
        return OneDNNLinear.apply(x, weight)
    return F.linear(x, weight)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for the 16-bit dtypes, else the dtype itself: where squares, angles and losses are computed."""
    return torch.promote_types(dtype, torch.float32)


def rope(position: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` needs of the rotary embedding at positions (T,): cosines and signed sines (T, K)."""
    pair = torch.arange(0, config.head_dim, 2, device=position.device, dtype=dtype)
    frequency = config.rope_theta ** (-pair / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        # Llama 3: what turns often within the original context stays, what turns rarely is slowed down by `factor`
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        stays = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (stays + (1 - stays) / scaling["factor"])
    angle = position[:, None] * frequency
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) of x (B, heads, T, K) by its angle: Hugging Face's half-split form."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.Module):
    """x / rms(x) · weight. Under a hidden gate z the output is gated by z, too, and the mean square is over the
    surviving dimensions only, as it will be in the small model (the pruned ones are 0 in x: the divisor changes)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        weight, surviving = self.weight, x.shape[-1]
        if z is not None:
            weight, surviving = weight * z.to(weight.dtype), (z != 0).sum().clamp(min=1)
        x_high = x.to(at_least_float32(x.dtype))  # the factor in bfloat16 would be off by the same for the whole row
        mean_square = x_high.square().sum(-1, keepdim=True) / surviving
        return (x_high * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions; G key/value heads serve H/G query heads each (GQA)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim, self.gqa = config.head_dim, config.n_head != config.n_kv_head
        q_size, kv_size = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.d_model, q_size, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.d_model, bias=False)

    def forward(self, x: Tensor, cos_sin, z_head: Tensor | None, z_out: Tensor | None, cache) -> Tensor:
        # a head whose values are 0 adds nothing
        v_rows = None if z_head is None else z_head.repeat_interleave(self.head_dim)
        q, k = linear(x, self.q_proj.weight), linear(x, self.k_proj.weight)
        v = linear(x, scale_rows(self.v_proj.weight, v_rows))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # (B, H or G, T, K)
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        if cache is not None:
            k, v = cache.append(k, v)
        # a single new token may look at everything before it; a prompt is causal within itself
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=self.gqa)
        return linear(y.transpose(1, 2).flatten(2), scale_rows(self.o_proj.weight, z_out))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ffn, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ffn, bias=False)
        self.down_proj = nn.Linear(config.d_ffn, config.d_model, bias=False)

    def forward(self, x: Tensor, z_ffn: Tensor | None, z_out: Tensor | None) -> Tensor:
        gate, up = linear(x, self.gate_proj.weight), linear(x, scale_rows(self.up_proj.weight, z_ffn))
        return linear(F.silu(gate) * up, scale_rows(self.down_proj.weight, z_out))


class Layer(nn.Module):
    """Two residual blocks: attention, then feed-forward, each behind a norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor, cos_sin, z: Gates, cache=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, z.hidden), cos_sin, z.head, z.out, cache)
        return x + self.mlp(self.post_attention_layernorm(x, z.hidden), z.ffn, z.out)


class KVCache:
    """Keys and values (B, G, T, K) of the tokens one layer has seen, in room for `length` tokens."""

    def __init__(self, length: int):
        self.length, self.used, self.kv = length, 0, None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values, return all so far. A prompt comes first, then one token at a time."""
        if self.kv is None:
            self.kv = [
                torch.empty(*x.shape[:2], self.length, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v)
            ]
        start, self.used = self.used, self.used + k.shape[2]
        for store, new in zip(self.kv, (k, v)):
            store[:, :, start : self.used] = new
        return tuple(store[:, :, : self.used] for store in self.kv)


class Llama(nn.Module):
    """Decoder-only Llama. Parameters bear Hugging Face's names, less the leading `model.`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpoint_layers = False  # keep only each layer's input for the backward pass, compute the rest again
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each parameter of a model from scratch, float32 on the CPU, one at a time.

        N(0, 0.02²), maps into the residual stream smaller by 1/sqrt(2L) (GPT-2). It needs shapes only (a model on the
        meta device), so that processes which hold a part of the model each draw the same numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            weight = torch.ones(parameter.shape)
            if weight.dim() > 1:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * self.config.n_layer) ** 0.5 if into_stream else 0.02
                nn.init.normal_(weight, std=std, generator=generator)
            yield name, weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Draw all weights, see `initial_weights`. Returns self."""
        for parameter, (_, weight) in zip(self.parameters(), self.initial_weights(seed)):
            parameter.copy_(weight)
        return self

    def forward(
        self,
        tokens: Tensor,
        z: Gates | None = None,
        targets: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); with `targets` (B, T) their cross entropies (B, T), nats, float32 or more.

        z: gates, see `Gates`; None for the plain Llama. cache: one KVCache per layer, appended to.
        """
        z = Gates() if z is None else z
        start = 0 if cache is None else cache[0].used
        position = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embed_tokens(tokens)
        if z.hidden is not None:
            x = x * z.hidden.to(x.dtype)
        cos_sin = [part.to(x.dtype) for part in rope(position, self.config, at_least_float32(x.dtype))]
        for i, layer in enumerate(self.layers):
            inputs = (x, cos_sin, z.at(i), None if cache is None else cache[i])
            if self.checkpoint_layers and torch.is_grad_enabled():  # nothing is random inside: no generator to keep
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*inputs)
        x = self.norm(x, z.hidden)
        return linear(x, self.lm_head.weight) if targets is None else self._cross_entropy(x, targets)

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        def piece(x, targets):
            logits = linear(x, self.lm_head.weight)
            return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), targets, reduction="none")

        size = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        pieces = list(zip(x.flatten(0, 1).split(size), targets.flatten().split(size)))
        if len(pieces) == 1:
            return piece(*pieces[0]).view_as(targets)
        # float32 logits of a whole micro-batch would be the largest tensor of all: recompute each piece's backwards
        again = partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*p) for p in pieces]).view_as(targets)

    @torch.no_grad()
    def generate(self, tokens: Tensor, n: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Continue tokens (B, T) by n sampled ones, the most likely where temperature is 0: (B, T + n)."""
        generator = torch.Generator(tokens.device).manual_seed(seed)
        cache = [KVCache(tokens.shape[1] + n) for _ in self.layers]
        new = tokens
        for _ in range(n):
            logits = self(new, cache=cache)[:, -1].float()
            if temperature > 0:
                new = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            else:
                new = logits.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens

    # -- Hugging Face's format: config.json + model.safetensors ------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> "Llama":
        """Read a Hugging Face Llama directory. ValueError or OSError names what is missing, misshapen or unknown."""
        with torch.device("meta"):
            model = cls(read_config(Path(path)))
        read = open_weights(Path(path), model)
        weights = {name: read(name).to(dtype, copy=True) for name, _ in model.named_parameters()}
        return cls.of_weights(model.config, weights)

    @classmethod
    def of_weights(cls, config: LlamaConfig, weights: dict[str, Tensor]) -> "Llama":
        """A model whose parameters are these tensors, by name; nothing is copied. A tied lm_head need not be there."""
        with torch.device("meta"):
            model = cls(config)
        if config.tie_embeddings:
            weights = {**weights, "lm_head.weight": weights["embed_tokens.weight"]}
        model.load_state_dict(weights, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9) -> None:
        """Write config.json and model.safetensors as `transformers` loads them, in `dtype` if given.

        What is larger than max_shard_bytes is written as several files with an index.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        weights = {n if n.startswith("lm_head.") else f"model.{n}": w for n, w in self.named_parameters()}  # tied: once
        dtype = dtype or next(iter(weights.values())).dtype
        shards, size, total = [[]], 0, 0
        for name, weight in weights.items():
            n_bytes = weight.numel() * dtype.itemsize
            if shards[-1] and size + n_bytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size, total = size + n_bytes, total + n_bytes
        places = {}
        for i, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            state = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}
            try:
                save_file(state, path / f"{file}.partial", metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{path / file}: {error}") from None
            os.replace(path / f"{file}.partial", path / file)
            places |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (path / (SINGLE if len(shards) > 1 else INDEX)).unlink(missing_ok=True)  # of an older model, not to be read
        c = self.config
        config = {
            "architectures": ["LlamaForCausalLM"],
            **HF_REQUIRED,
            "torch_dtype": str(dtype).removeprefix("torch."),
            **{theirs: getattr(c, ours) for theirs, ours in HF_KEYS.items()},
        }
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers, too, reads the first if it is there
HF_KEYS = {  # Hugging Face's config.json key -> LlamaConfig field
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "hidden_size": "d_model",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "intermediate_size": "d_ffn",
    "max_position_embeddings": "max_seq_len",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
HF_REQUIRED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def open_weights(path: Path, model: Llama) -> Callable[..., Tensor]:
    """Open the safetensors files of a model directory: read(name, rows=slice(None)) gives a parameter, or some rows of
    it, as they are stored. Only headers are read here. ValueError unless the files hold just `model`'s parameters."""
    index = path / INDEX
    names = [SINGLE]
    if index.exists() and not (path / SINGLE).exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors files ({error!r})") from None
    places, expected = {}, dict(model.named_parameters())
    for file in (path / name for name in names):
        if not file.is_file():
            raise ValueError(f"{file}: no such file; a model directory holds config.json and model.safetensors")
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    places[key.removeprefix("model.")] = file, key, tuple(tensors.get_slice(key).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    # older files have the rotary frequencies, which follow from rope_theta; some writers store a tied weight twice
    redundant = ("rotary_emb.inv_freq",) + ("lm_head.weight",) * model.config.tie_embeddings
    places = {name: place for name, place in places.items() if not name.endswith(redundant)}
    wrong = [f"{n} is missing" for n in expected.keys() - places.keys()]
    wrong += [f"{n} is not part of this Llama" for n in places.keys() - expected.keys()]
    wrong += [
        f"{n} has shape {places[n][2]}, config.json says {tuple(expected[n].shape)}"
        for n in expected.keys() & places.keys()
        if places[n][2] != expected[n].shape
    ]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit: {', '.join(sorted(wrong)[:4])}")

    def read(name: str, rows: slice = slice(None)) -> Tensor:
        file, key, _ = places[name]
        with safe_open(file, framework="pt") as tensors:  # a mapping each: pages that were copied do not stay in memory
            return tensors.get_slice(key)[rows]

    return read


def read_config(path: Path) -> LlamaConfig:
    """LlamaConfig from a Hugging Face config.json; ValueError names a key that this Llama cannot represent."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no model here (no config.json)")
    try:
        raw = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not a model's config ({error})") from None
    for key, needed in HF_REQUIRED.items():
        if raw.get(key, needed) != needed:
            raise ValueError(f"{file}: {key} = {raw[key]!r} is not supported, only {needed!r}")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}  # the old key and the new one
    raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{file}: rope_type = {kind!r} is not supported, only 'default' and 'llama3'")
    if kind == "llama3" and (absent := [key for key in LLAMA3_ROPE if key not in rope]):
        raise ValueError(f"{file}: {', '.join(absent)} missing in rope_scaling")
    raw["rope_scaling"] = {"rope_type": kind, **{k: rope[k] for k in LLAMA3_ROPE}} if kind == "llama3" else None
    values = {ours: raw[theirs] for theirs, ours in HF_KEYS.items() if raw.get(theirs) is not None}
    values.setdefault("n_kv_head", values.get("n_head"))
    values.setdefault("norm_eps", 1e-6)  # transformers' default
    if "head_dim" not in values and "n_head" in values and "d_model" in values:
        values["head_dim"] = values["d_model"] // values["n_head"]
    required = {f.name for f in fields(LlamaConfig) if f.default is MISSING}
    missing = [theirs for theirs, ours in HF_KEYS.items() if ours in required - values.keys()]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing")
    return LlamaConfig(**values)
