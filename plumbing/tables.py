"""What eval.py shows: results as tables, with a line per domain and a block of columns per model; and the time left."""

import unicodedata

from tqdm import tqdm

# title, key in the results, width, decimals
LOSS_COLUMNS = (
    ("loss", "loss", 9, 3),
    ("ppl", "perplexity", 8, 2),
    ("bits/byte", "bits_per_byte", 11, 3),
    ("+loss", "degradation", 8, 3),
)
MODEL_LINES = (  # title, key in the results
    ("parameters", "parameters"),
    ("prefill tokens/s", "prefill_tokens_per_second"),
    ("decode tokens/s", "decode_tokens_per_second"),
)
ANSWER_WIDTH = 30
PATIENCE = 3  # seconds without a word about the time left


def loss_table(results: dict[str, dict]) -> str:
    """Losses of each domain, their average and worst; size and speed of each model, and their ratio to the first's."""
    lines = by_label(results, "average", "worst")
    width = max(columns(label) for label, _ in (*lines, *MODEL_LINES))
    block = sum(wide for _, _, wide, _ in LOSS_COLUMNS)
    titles = "".join(f"{title:>{wide}}" for title, _, wide, _ in LOSS_COLUMNS)
    text = [heading(results, width, block), " " * width + titles * len(results)]
    for label, measured in lines:
        cells = [f"{model[key]:>{wide}.{digits}f}" for model in measured for _, key, wide, digits in LOSS_COLUMNS]
        text.append(padded(label, width) + "".join(cells))
    models = list(results.values())
    for label, key in MODEL_LINES:
        cells = [f"{model[key]:,.0f} ({model[key] / models[0][key]:.2f}x)" for model in models]
        text.append(padded(label, width) + "".join(f"{cell:>{block}}" for cell in cells))
    return "\n".join(text)


def answer_table(results: dict[str, dict]) -> str:
    """Accuracy and standard error of each domain and their average, in percent."""
    lines = by_label(results, "average")
    width = max(columns(label) for label, _ in lines)
    text = [heading(results, width, ANSWER_WIDTH)]
    for label, measured in lines:
        cells = [f"{100 * model['accuracy']:.1f} ± {100 * model['standard_error']:.1f}" for model in measured]
        text.append(padded(label, width) + "".join(f"{cell:>{ANSWER_WIDTH}}" for cell in cells))
    domains = next(iter(results.values()))["domains"].values()  # the questions are the same for all models
    merged, asked = (sum(domain[key] for domain in domains) for key in ("merged", "questions"))
    if merged:
        text.append(
            f"In {merged:,} of {asked:,} questions the tokenizer merges the end of the question with a choice: what is "
            "scored begins a little earlier there."
        )
    return "\n".join(text)


def by_label(results: dict[str, dict], *summaries: str) -> list[tuple[str, list[dict]]]:
    """(label, what was measured of each model): first the domains, then the summaries. A domain may have the name of a
    summary, so this is a list and no dict."""
    models = list(results.values())
    domains = [(name, [model["domains"][name] for model in models]) for name in models[0]["domains"]]
    return domains + [(name, [model[name] for model in models]) for name in summaries]


def heading(results: dict[str, dict], width: int, block: int) -> str:
    """The names of the models, each above its block. Of a long path the end is shown, which tells paths apart."""
    room = block - 2
    names = [name if len(name) <= room else "…" + name[-room + 1 :] for name in results]
    return " " * width + "".join(f"{name:>{block}}" for name in names)


def columns(text: str) -> int:
    """How many columns a terminal needs for a text: two for each Chinese character, none for an accent of its own."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def padded(text: str, width: int) -> str:
    """The text, and spaces up to this many columns."""
    return text + " " * (width - columns(text))


def time_left(name: str, total: int, unit: str) -> tqdm:
    """A bar on stderr that shows how much is done and how long the rest takes. What takes a moment only has none."""
    return tqdm(desc=name, total=total, unit=f" {unit}", delay=PATIENCE, mininterval=1, leave=False)
