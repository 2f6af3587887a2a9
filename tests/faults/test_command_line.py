"""Words on the command line that are wrong."""

from faults.frame import BadInput, bad_inputs, launch

TINY = "--config=configs/mnist.py:tiny"


def said(name, says, *words):
    return BadInput(name, lambda folder: launch(*(w.format(folder=folder) for w in words)), says)


test_words = bad_inputs(
    [
        said("a command mistyped", "'smaple' is not a command; did you mean 'sample'", "smaple"),
        said("a flag mistyped", "did you mean '--seed'", "sample", "--sed=1"),
        said(
            "a value without its equals sign",
            "write --config.train.num_steps=3, with an equals sign",
            TINY, "--config.train.num_steps", "3",
        ),
        said("nothing to train", "nothing to train", "train"),
        said("a config that is not there", "nope.py does not exist", "--config=nope.py"),
        said("a variant mistyped", "'tinyy' is unknown; did you mean 'tiny'", TINY + "y"),
        said("a run that is not there", "/nowhere", "--resume=/nowhere"),
        said("a folder without a run", r"error: .*folder", "sample", "--workdir={folder}"),
        said("a report of nothing", "nowhere", "report", "--workdir=/nowhere"),
        said(
            "a section mistyped", "did you mean 'optimizer'",
            TINY, "--workdir={folder}/run", "--config.optimzer.b1=0.5",
        ),
        said(
            "a word for a number", "num_steps = 'many' should be",
            TINY, "--workdir={folder}/run", "--config.train.num_steps=many",
        ),
    ]
)  # fmt: skip
