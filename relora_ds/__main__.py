"""``python -m relora_ds``, for those who have no relora-ds on their path."""

from relora_ds.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
