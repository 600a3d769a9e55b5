"""``python -m relora_ds …``, which is the command ``relora-ds``."""

from relora_ds.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
