"""``python -m relora_ds``, for those who have no relora-ds on their path."""

from relora_ds.cli import entry_point

if __name__ == "__main__":
    entry_point()
