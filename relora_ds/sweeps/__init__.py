"""Sweeps: arms of one recipe, each with several seeds, trained one after the other or at once, and compared."""
