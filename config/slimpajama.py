"""What the runs on SlimPajama share: the data, the method, and how 8 GPUs are used. The other configs start from it."""

base = "paper.py"
data = "data/slimpajama"
domains = [
    "RedPajamaCommonCrawl",
    "RedPajamaC4",
    "RedPajamaGithub",
    "RedPajamaBook",
    "RedPajamaWikipedia",
    "RedPajamaArXiv",
    "RedPajamaStackExchange",
]
ratio = {
    "RedPajamaCommonCrawl": 0.67,
    "RedPajamaC4": 0.15,
    "RedPajamaGithub": 0.045,
    "RedPajamaBook": 0.045,
    "RedPajamaWikipedia": 0.045,
    "RedPajamaArXiv": 0.025,
    "RedPajamaStackExchange": 0.02,
}

law = "paper"

seq_len = 4096
lr = 1e-4
dtype = "bfloat16"
parallel = "fsdp"
compile = True
eval_sequences = 64
