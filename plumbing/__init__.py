"""What a first reading of the code skips, one concept a file.

settings      the settings of a run: what they are, what they may be
command_line  config files and options to values; how a mistake ends
output        files that a command writes: checked before the work, written whole, held by the disk
records       the shape of every JSON file that is read, and the reader that holds a file against it
sources       what a run is made of, opened and found to be right
randomness    the random streams: what each is for, what it is keyed by
dataset       a prepared data set, opened and checked
data          batches by domain weight
folder        which files of a user's folder hold text
documents     a file, read as documents
left_out      what of a user's text is not used, counted
installed     text that every machine with the requirements has
shared        how much of the held-out text stands in train
writer        the token files of a data set, written whole or not at all
workers       several processes that tokenize
tokenizer     text to token ids and back
huggingface   a model in Hugging Face's format: config.json and safetensors
foreign       what a file is that is not what its name says
models        what a path given as a model holds, what stands beside the weights
choices       which structures to keep without learning: random, magnitude, activation, taylor, a file
cut           from the gated model to the small one, within a run
products      matrix products, faster on some CPUs
transfer      from the host to the device, without waiting
parallel      several processes: who am I, what do I hold, how do we agree
checkpoint    the tensors of a checkpoint on disk
checksums     of the files of a directory: damage is seen when they are read
run           a run's directory, and how it survives anything
log           the lines of metrics.jsonl, and what is printed
metrics       what metrics.jsonl says of a run, read again
cost          the dry run: what a run will need
continuation  two-choice questions on text
tables        the tables that eval.py prints
"""
