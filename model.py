"""The Llama, with a hook for every gate that structured pruning needs.

    x      = embed(tokens) · z_hidden
    x      = x + z_layer · z_hidden · attention(norm(x, z_hidden), z_head)
    x      = x + z_layer · z_hidden · ffn(norm(x, z_hidden), z_ffn)
    logits = lm_head(norm(x, z_hidden))

A gate z in [0, 1] multiplies what one component gives to the rest: 0 is "pruned", 1 is "as before". A gate on the
output of a linear map is a gate on the rows of its weight, z·(W x) = (z·W) x, and weights are far smaller than
activations. The hooks below are written in this way (`scale_rows`). So a gated step costs about as much as a dense one,
and the small model that `masks.extract` cuts out computes exactly the same function.

Shapes: B batch, T time, D d_model, H query heads, G key/value heads (groups), K head_dim, I d_ffn, V vocabulary.

    python eval.py out/toy_pretrain --data data/demo --sample "def main("
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plumbing import huggingface
from plumbing.products import linear  # F.linear, faster on some CPUs

LOGITS_AT_ONCE = 2**27  # 512 MiB in float32: all logits at once would be the largest tensor of a step

# call a function, keep only its inputs, and compute the rest again in the backward pass; nothing random is inside
recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama. ValueError for one that cannot exist."""

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
    rope_scaling: dict | None = None  # Llama 3's, with Hugging Face's keys: see `rope`
    qkv_bias: bool = False  # Qwen2: q, k and v have biases
    qk_norm: bool = False  # Qwen3: q and k are normed, each head for itself
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    others: dict = field(default_factory=dict, compare=False)  # keys of a config.json that are written as they were

    def __post_init__(self):
        for name in ("vocab_size", *self.shape, "max_seq_len"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} = {value!r} must be a whole number of at least 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head = {self.n_head} must be a multiple of n_kv_head = {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: rotary embeddings turn pairs")

    @property
    def shape(self) -> dict[str, int]:
        """The six numbers that pruning is about, for logs and files."""
        names = ("n_layer", "d_model", "n_head", "n_kv_head", "head_dim", "d_ffn")
        return {name: getattr(self, name) for name in names}

    def n_params(self) -> int:
        """Number of parameters, tied embeddings counted once."""
        layers = self.n_layer * self.layer_params(self.d_model, self.n_kv_head, self.d_ffn)
        return layers + self.embedding_params(self.d_model) + self.d_model

    def embedding_params(self, d):
        """Parameters of the embedding and of lm_head where d hidden dimensions are left."""
        return self.vocab_size * (1 if self.tie_embeddings else 2) * d

    def layer_params(self, d, groups, ffn):
        """Parameters of one layer where d hidden dimensions, so many KV groups and so many feed-forward dimensions are
        left: numbers, or tensors of a number per layer."""
        return self.attention_params(d, groups) + d * (3 * ffn + 2)

    def attention_params(self, d, groups):
        """Parameters of its attention alone."""
        q_and_k = groups * (self.n_head // self.n_kv_head + 1) * self.head_dim
        biases = q_and_k + groups * self.head_dim if self.qkv_bias else 0
        return 2 * d * q_and_k + biases + (2 * self.head_dim if self.qk_norm else 0)


class Gates(NamedTuple):
    """The gates z: a value per component, None where nothing is pruned. `masks.py` makes them, the model multiplies."""

    layer: Tensor | None = None  # (L,)
    hidden: Tensor | None = None  # (D,)
    head: Tensor | None = None  # (L, G)
    ffn: Tensor | None = None  # (L, I)

    def at(self, i: int) -> "Gates":
        """The gates of layer i: layer (), hidden (D,), head (G,), ffn (I,)."""
        layer, head, ffn = (None if z is None else z[i] for z in (self.layer, self.head, self.ffn))
        return Gates(layer, self.hidden, head, ffn)

    @property
    def out(self) -> Tensor | None:
        """For one layer: z_layer · z_hidden, the gate on all that its two blocks add to x. (), (D,) or None."""
        if self.layer is None:
            return self.hidden
        if self.hidden is None:
            return self.layer
        return self.layer * self.hidden


def scale_rows(weight: Tensor | None, z: Tensor | None) -> Tensor | None:
    """z·W: gate the outputs of a linear map W (O, I), of its bias or of a norm (O,). z: one per output (O,), or one for
    all (). None as a weight is a bias that is not there."""
    if z is None or weight is None:
        return weight
    if weight.dim() == 2:
        z = z[..., None]
    return weight * z.to(weight.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that squares, angles and losses are computed in: float32 for a 16-bit dtype, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def rope(position: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (T, K) of the rotary embedding at positions (T,), in `dtype`, for `rotate`."""
    pair = torch.arange(0, config.head_dim, 2, device=position.device, dtype=at_least_float32(dtype))
    frequency = config.rope_theta ** (-pair / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        # Llama 3: what turns often within the original context stays, what turns rarely is slowed down by `factor`
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        stays = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (stays + (1 - stays) / scaling["factor"])
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) of x (B, heads, T, K) by its angle: Hugging Face's half-split form."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, and under a hidden gate z: x / rms(x) · weight · z, with the mean over the survivors only.

    The pruned dimensions are 0 in x, so the sum of squares is right as it is; dividing it by the number of dimensions
    with z != 0 makes it the small model's mean square.
    Why is the output multiplied by z, too? Where z is 0, this changes nothing. But the norm undoes any factor that all
    of x has: with every gate at 0.5 its output would be as before. Multiplied by z, it is half. (x is gated, too: a
    single gate of 0.5, among gates of 1, leaves about a quarter. The published code does the same.)
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        surviving = x.shape[-1] if z is None else (z != 0).sum().clamp(min=1)
        x_high = x.to(at_least_float32(x.dtype))  # rounding the factor to bfloat16 would shift all of a token's values
        mean_square = x_high.square().sum(-1, keepdim=True) / surviving
        return (x_high * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * scale_rows(self.weight, z)


class KVCache:
    """Keys and values (B, G, T, K) of the T tokens that one layer has seen."""

    def __init__(self):
        self.used, self.k, self.v = 0, None, None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values, return all so far. A prompt comes first, then one token at a time."""
        if self.used:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.used, self.k, self.v = k.shape[2], k, v
        return k, v


class Attention(nn.Module):
    """Causal self-attention with rotary positions; G key/value heads serve H/G query heads each (GQA).

    The families differ here, and only here: Qwen2 has biases, Qwen3 has norms of q and k. Llama and Mistral have none.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.d_model, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.d_model, bias=False)
        # over the dimensions of one head, which are never pruned
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos_sin, z_head: Tensor | None, z_out: Tensor | None, cache) -> Tensor:
        # a group's gate scales its values, K rows of v_proj: a group whose values are 0 adds nothing
        z_v = None if z_head is None else z_head.repeat_interleave(self.head_dim)
        q, k = linear(x, self.q_proj.weight, self.q_proj.bias), linear(x, self.k_proj.weight, self.k_proj.bias)
        v = linear(x, scale_rows(self.v_proj.weight, z_v), scale_rows(self.v_proj.bias, z_v))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # (B, H or G, T, K)
        q, k = rotate(self.q_norm(q), *cos_sin), rotate(self.k_norm(k), *cos_sin)
        if cache is not None:
            k, v = cache.append(k, v)
        if q.is_cuda and q.dtype == torch.float32 and not torch.is_autocast_enabled("cuda") and k.shape[1] < q.shape[1]:
            # CUDA's float32 kernel knows no groups: another one would hold all scores (B, H, T, T) at once
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        # a single new token may look at everything before it; a prompt is causal within itself
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=k.shape[1] != q.shape[1])
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

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], z: Gates, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, z.hidden), cos_sin, z.head, z.out, cache)
        return x + self.mlp(self.post_attention_layernorm(x, z.hidden), z.ffn, z.out)


class Llama(nn.Module):
    """Decoder-only Llama. Its parameters have Hugging Face's names, without the leading `model.`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpoint_layers = False  # if set, `recompute` each layer: less memory, more work
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def initial_weights(self, seed: int) -> Iterator[Tensor]:
        """The weights of a model from scratch, in the order of its parameters, float32 on the CPU, one at a time.

        N(0, 0.02²), and smaller by 1/sqrt(2L) for the maps into the residual stream (GPT-2); norms 1, biases 0. Only
        the shapes of the parameters are used: processes that each hold a part of the model (on the meta device) draw
        the same numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            weight = torch.full(parameter.shape, 0.0 if name.endswith(".bias") else 1.0)
            if weight.dim() > 1:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * self.config.n_layer) ** 0.5 if into_stream else 0.02
                nn.init.normal_(weight, std=std, generator=generator)
            yield weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Fill all parameters with `initial_weights`. Returns self."""
        for parameter, weight in zip(self.parameters(), self.initial_weights(seed)):
            parameter.copy_(weight)
        return self

    def forward(
        self,
        tokens: Tensor,
        z: Gates | None = None,
        targets: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """tokens (B, T) -> logits (B, T, V); with targets (B, T), cross entropies (B, T) in nats, at least float32.

        z: the gates; None is the plain Llama. cache: one KVCache per layer. It is appended to.
        """
        z = Gates() if z is None else z
        start = 0 if cache is None else cache[0].used
        position = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embed_tokens(tokens)
        if z.hidden is not None:
            x = x * z.hidden.to(x.dtype)
        cos_sin = rope(position, self.config, x.dtype)
        for i, layer in enumerate(self.layers):
            inputs = (x, cos_sin, z.at(i), None if cache is None else cache[i])
            if self.checkpoint_layers and torch.is_grad_enabled():
                x = recompute(layer, *inputs)
            else:
                x = layer(*inputs)
        x = self.norm(x, z.hidden)
        return linear(x, self.lm_head.weight) if targets is None else self._cross_entropy(x, targets)

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """x (B, T, D), the last norm's output -> cross entropies (B, T)."""

        def cross_entropy(x, targets):
            logits = linear(x, self.lm_head.weight)
            return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), targets, reduction="none")

        size = max(1, LOGITS_AT_ONCE // self.config.vocab_size)  # tokens in a piece
        pieces = list(zip(x.flatten(0, 1).split(size), targets.flatten().split(size)))
        if len(pieces) == 1:
            losses = cross_entropy(*pieces[0])
        else:
            losses = torch.cat([recompute(cross_entropy, *piece) for piece in pieces])
        return losses.view_as(targets)

    @torch.no_grad()
    def generate(self, tokens: Tensor, n: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """tokens (B, T) -> (B, T + n): n more tokens, sampled, or always the most likely one where temperature is 0.
        FloatingPointError where the logits are not finite."""
        generator = torch.Generator(tokens.device).manual_seed(seed)
        cache = [KVCache() for _ in self.layers]
        new = tokens
        for _ in range(n):
            logits = self(new, cache=cache)[:, -1].float()
            if not logits.isfinite().all():
                raise FloatingPointError("the logits are not finite")
            if temperature > 0:
                new = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            else:
                new = logits.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens

    # -- to and from a directory in Hugging Face's format (plumbing/huggingface.py) -----------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> "Llama":
        """The model of a directory that `transformers` or `save_pretrained` wrote. ValueError or OSError names what is
        missing, misshapen or unknown."""
        config = read_config(path)
        weights = {name: place.read().to(dtype, copy=True) for name, place in open_weights(path, config).items()}
        return cls.of_weights(config, weights)

    @classmethod
    def of_weights(cls, config: LlamaConfig, weights: dict[str, Tensor]) -> "Llama":
        """A model whose parameters are these tensors, by name. Nothing is copied. A tied lm_head may be left out."""
        with torch.device("meta"):
            model = cls(config)
        if config.tie_embeddings:
            weights = {**weights, "lm_head.weight": weights["embed_tokens.weight"]}
        model.load_state_dict(weights, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9) -> None:
        """Write config.json and model.safetensors as `transformers` loads them, in `dtype` if it is given.

        A model larger than max_shard_bytes is written as several files. ValueError if a value is too large for `dtype`.
        """
        weights = dict(self.named_parameters())  # a tied lm_head is not in it
        dtype = dtype or self.embed_tokens.weight.dtype
        huggingface.write(Path(path), asdict(self.config), weights, dtype, max_shard_bytes)


def read_config(path: str | Path) -> LlamaConfig:
    """The shape of the model in a directory. ValueError names what is missing, or what this Llama cannot represent."""
    return huggingface.read_config(Path(path), LlamaConfig)


def open_weights(path: str | Path, config: LlamaConfig) -> dict[str, huggingface.Place]:
    """Where a directory holds each parameter: `read` of a place gives it, or some rows of it. ValueError unless the
    directory has just the parameters of a model of this shape."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    return huggingface.open_weights(Path(path), shapes, config.tie_embeddings)
