"""DeepSpeed's ds_to_universal in a process of its own, in which no pickle runs anything: ``python -m relora_ds.universal …``.

Takes ds_to_universal's arguments, and ``--trust``.
"""

from __future__ import annotations

import sys

from deepspeed.checkpoint import ds_to_universal

from relora_ds import unpickle
from relora_ds.errors import ConfigError

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
