from functools import partial

from rl_plugins.trl.scripts import online

make_parser = partial(online.make_parser, "mtp-critic")
