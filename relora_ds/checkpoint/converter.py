"""DeepSpeed's ds_to_universal in a process of its own, in which no pickle runs anything.

``python -m relora_ds.checkpoint.converter …`` takes ds_to_universal's arguments, and ``--trust``.
"""

from __future__ import annotations

import sys

from deepspeed.checkpoint import ds_to_universal

from relora_ds.errors import ConfigError
from relora_ds.run import unpickle

TRUST = "--trust"


def main() -> None:
    trust = TRUST in sys.argv
    sys.argv = [word for word in sys.argv if word != TRUST]
    try:
        with unpickle.guarded(trust=trust):
            ds_to_universal.main(ds_to_universal.parse_arguments())
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
