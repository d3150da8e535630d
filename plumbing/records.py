"""The shape of each JSON file that is read, and one reader that checks a file against its shape.

    meta.json                      Meta           a prepared data set (writer.py)
    config.json of a model         ModelConfig    Hugging Face's keys (huggingface.py)
    model.safetensors.index.json   WeightIndex    which file holds which weight
    config.json of a run           RunConfig      its settings (run.py)
    state.json                     State          a checkpoint
    pruning.json                   Pruning        what was kept (choices.py)
    trained_with.json              TrainedWith    a model's tokenizer, and how far the data were read (models.py)
    checksums.json                 Checksums      of the files beside it (checksums.py)
    tokenizer_config.json          TokenizerConfig
    metrics.jsonl                  MetricsLine    one line of a run's measurements (log.py)
    questions, a .jsonl file       QuestionLine   one question (continuation.py)

A file that was damaged, cut short, made by hand or by another program ends in one line that names the file and the
place in it. Keys that are not declared here are ignored. Numbers are finite: JSON has no NaN.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from typing_extensions import NotRequired, TypedDict

T = TypeVar("T")

MAX_INT, MAX_WINDOW = 2**62, 2**31
MAX_LAYERS, MAX_SIZE, MAX_HEAD_DIM = 4096, 2**20, 2**16  # of a model, beyond any that exists
Natural = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_INT)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


def read(file: Path, kind: type[T], what: str) -> T:
    """The content of a JSON file of this kind. ValueError where it is none, with the file, what it was to be and the
    place where it differs; OSError where it cannot be read."""
    return parse(file.read_bytes(), kind, f"{file}: not {what}")


def parse(text: bytes, kind: type[T], complaint: str) -> T:
    """The content of one JSON text. ValueError begins with the complaint and says what is wrong."""
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError:
        raise ValueError(f"{complaint}: it is nested too deep") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{complaint}: {error}") from None


def convert(value: Any, kind: type[T], complaint: str) -> T:
    """A value of this kind from a part that was read without one. ValueError as in `parse`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{complaint}: {error}") from None


# -- data -----------------------------------------------------------------------------------------------------------


class SplitCounts(TypedDict):
    """What a token file holds."""

    tokens: Positive
    documents: Natural
    bytes: Positive


class DomainCounts(TypedDict):
    """The token files of a domain."""

    train: SplitCounts
    val: SplitCounts
    test: SplitCounts


class FileFacts(TypedDict):
    """The largest id in a token file, and its CRC-32 as zlib computes it."""

    max_id: Natural
    crc32: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{8}$")]


class DomainFiles(TypedDict):
    """The token files of a domain."""

    train: FileFacts
    val: FileFacts
    test: FileFacts


class Meta(TypedDict):
    """meta.json. A file that was written before a key was added does not have it."""

    format: int
    tokenizer: Text
    tokenizer_fingerprint: Text
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=2**32)]
    bos: NotRequired[Natural | None]
    eot: Natural
    dtype: Literal["uint16", "uint32"]
    window: Annotated[int, msgspec.Meta(ge=2, le=MAX_WINDOW)]
    seed: NotRequired[Natural]
    options: NotRequired[dict[str, Any]]
    shared: NotRequired[dict[str, Share | None]]
    domains: Annotated[dict[Text, DomainCounts], msgspec.Meta(min_length=1)]
    files: NotRequired[dict[Text, DomainFiles]]


class QuestionLine(TypedDict):
    """One two-choice question."""

    question: str
    choice1: Text
    choice2: Text
    label: Annotated[int, msgspec.Meta(ge=0, le=2)]


# -- models ---------------------------------------------------------------------------------------------------------


Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]  # of one dimension of a matrix
TokenIds = Natural | Annotated[list[Natural], msgspec.Meta(min_length=1)] | None


class Rope(TypedDict):
    """How the rotary embedding is scaled."""

    rope_type: NotRequired[str | None]
    type: NotRequired[str | None]
    rope_theta: NotRequired[Above0 | None]
    factor: NotRequired[Above0 | None]
    low_freq_factor: NotRequired[Above0 | None]
    high_freq_factor: NotRequired[Above0 | None]
    original_max_position_embeddings: NotRequired[Positive | None]


class ModelConfig(TypedDict):
    """config.json in Hugging Face's format. Which values a Llama may have is checked in huggingface.py and model.py."""

    model_type: NotRequired[str]
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=2**32)]
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: NotRequired[Size | None]
    head_dim: NotRequired[Annotated[int, msgspec.Meta(ge=1, le=MAX_HEAD_DIM)] | None]
    intermediate_size: Size
    max_position_embeddings: NotRequired[Positive]
    original_max_position_embeddings: NotRequired[Positive | None]
    sliding_window: NotRequired[Natural | None]
    layer_types: NotRequired[list[str] | None]
    rms_norm_eps: NotRequired[Above0 | None]
    rope_theta: NotRequired[Above0 | None]
    rope_scaling: NotRequired[Rope | None]
    rope_parameters: NotRequired[Rope | None]
    tie_word_embeddings: NotRequired[bool | None]
    bos_token_id: NotRequired[Natural | None]
    eos_token_id: NotRequired[TokenIds]


class WeightIndex(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[str, Text]


class Shape(TypedDict):
    """LlamaConfig.shape."""

    n_layer: Positive
    d_model: Positive
    n_head: Positive
    n_kv_head: Positive
    head_dim: Positive
    d_ffn: Positive


class Kept(TypedDict):
    """What is kept of `layer` and `hidden`, in the order of the small model."""

    kept: list[Natural]
    gates: NotRequired[list[Share]]


class KeptByLayer(TypedDict):
    """What is kept of `head` and `ffn`, a list for each layer of the source."""

    kept: list[list[Natural]]
    gates: NotRequired[list[list[Share]]]


class Pruning(TypedDict):
    """pruning.json, see `choices.describe`."""

    source: Shape
    target: Shape
    layer: Kept
    hidden: Kept
    head: KeptByLayer
    ffn: KeptByLayer


class AddedToken(TypedDict):
    """A token with its properties."""

    content: str


class TokenizerConfig(TypedDict):
    """tokenizer_config.json, and the config.json of the model: which token ends a text."""

    eos_token: NotRequired[str | AddedToken | None]
    eos_token_id: NotRequired[TokenIds]


class ReaderState(TypedDict):
    """How far the data were read, see `BatchReader.state_dict`."""

    data: Text
    seq_len: Positive
    order_seed: Natural
    sequences: dict[Text, Natural]
    first: dict[Text, Natural]
    others: dict[Text, Natural]


class TrainedWith(TypedDict):
    """trained_with.json."""

    tokenizer: Text
    fingerprint: Text
    reader: NotRequired[ReaderState | None]


# -- runs -----------------------------------------------------------------------------------------------------------


class RunConfig(TypedDict):
    """config.json of a run: all settings. Here is what must be there; settings.py has all."""

    steps: Positive


class History(TypedDict):
    """The points of the scaling law, one entry per evaluation."""

    tokens: list[list[Natural]]
    losses: list[list[float]]
    params: list[Above0]
    rates: list[float]


class MixtureState(TypedDict):
    """What changes in a dro.Mixture, one value per domain."""

    weights: list[NotNegative]
    ratio: list[NotNegative]
    reference: list[float | None]
    reference_is: list[Literal["given", "predicted", "seen"] | None]
    history: History


class State(TypedDict):
    """state.json of a checkpoint. `source` and `target` are the fields of a LlamaConfig."""

    step: Natural
    metrics_bytes: Natural
    settings: dict[str, Any]
    digests: dict[str, str]
    source: dict[str, Any]
    target: dict[str, Any] | None
    settled: bool  # whether the gates' choice is fixed
    kept: Pruning | None  # what is kept, once the small model was cut out
    mixture: MixtureState
    reader: ReaderState
    tokenizer: NotRequired[Text]
    fingerprint: NotRequired[Text]
    unlogged: list[list[float]]
    seconds: NotNegative


Checksums = dict[Text, Text]  # name of a file -> its checksum
FirstRows = dict[Text, Natural]  # name of a tensor -> number of its first row in a file of a checkpoint


# -- metrics.jsonl: docs/metrics.md says what each key means --------------------------------------------------------

Number = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]  # a measurement that a picture can show
ByName = dict[str, Number | None]  # by domain, or by granularity


class Curve(TypedDict):
    """The predicted course of a run."""

    step: Annotated[list[Number], msgspec.Meta(min_length=1)]
    loss: dict[str, list[Number] | None]


class GateValues(TypedDict):
    """The gates of each granularity that is pruned."""

    layer: NotRequired[list[Number] | None]
    hidden: NotRequired[list[Number] | None]
    head: NotRequired[list[list[Number]] | None]
    ffn: NotRequired[list[list[Number]] | None]


class RunLine(TypedDict):
    """What kind of run it is."""

    type: Literal["run"]
    name: NotRequired[str]
    stage: Literal["pretrain", "prune", "continue"]
    steps: Positive
    tokens_per_step: Positive
    domains: Annotated[list[Text], msgspec.Meta(min_length=1, max_length=1000)]
    schedule: NotRequired[str]
    dynamic_reference: NotRequired[bool]
    dynamic_ratio: NotRequired[bool]
    source: NotRequired[dict[str, Positive] | None]
    target: NotRequired[dict[str, Positive] | None]
    parameters: NotRequired[Natural]
    changed: NotRequired[dict[str, Any]]
    step: NotRequired[Natural]
    weights: NotRequired[ByName]
    ratio: NotRequired[ByName]


class Multiplier(TypedDict("Multiplier", {"lambda": NotRequired[ByName]})):
    """A key that is a word of Python's."""


class TrainLine(Multiplier):
    """The steps since the last one of its kind."""

    type: Literal["train"]
    step: Natural
    tokens: NotRequired[Natural]
    loss: NotRequired[Number]
    lr: NotRequired[Number]
    grad_norm: NotRequired[Number]
    weights: NotRequired[ByName]
    epochs: NotRequired[ByName]
    domain_loss: NotRequired[ByName]
    constraint: NotRequired[Number]
    sparsity: NotRequired[ByName]
    target_sparsity: NotRequired[ByName]
    undecided: NotRequired[ByName]
    phi: NotRequired[ByName]


class EvalLine(TypedDict):
    """An evaluation."""

    type: Literal["eval"]
    step: Natural
    tokens: Natural
    loss: ByName
    bits_per_byte: NotRequired[ByName]
    domain_tokens: NotRequired[dict[str, Natural]]
    parameters: NotRequired[Number]
    epochs: NotRequired[ByName]
    reference: NotRequired[ByName]
    reference_is: NotRequired[dict[str, Literal["given", "predicted", "seen"] | None]]
    prediction: NotRequired[ByName]
    no_prediction: NotRequired[dict[str, str | None]]
    curve: NotRequired[Curve | None]
    ratio: NotRequired[ByName]
    weights: NotRequired[ByName]
    gates: NotRequired[GateValues | None]
    sparsity: NotRequired[ByName]


class EndLine(TypedDict):
    """The finished model."""

    type: Literal["end"]
    step: Natural
    loss: ByName
    bits_per_byte: NotRequired[ByName]
    parameters: NotRequired[Natural]
    gates: NotRequired[GateValues | None]


METRICS = {"run": RunLine, "train": TrainLine, "eval": EvalLine, "end": EndLine}


class MetricsLine(TypedDict):
    """Which of them a line is."""

    type: Literal["run", "train", "eval", "end"]


def parse_metrics(text: bytes) -> dict[str, Any]:
    """One line of metrics.jsonl. ValueError for what is none."""
    complaint = "not a line of metrics"
    return parse(text, METRICS[parse(text, MetricsLine, complaint)["type"]], complaint)
